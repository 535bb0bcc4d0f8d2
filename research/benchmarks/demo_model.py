"""The figures of the demo model: bits per byte against an interpolated bigram, and what plain SVD costs it.

    python research/benchmarks/demo_model.py MODEL --train FILES... --valid FILE [-o tenfold/demo/figures.json]

The bigram is counted on the tokens that the model was trained on (its tokens.npy, or the first so many tokens of
--train) and interpolated with the unigram, by Witten-Bell and by a fixed weight; the better of the two is the opponent.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np

import tenfold
from tenfold import api
from tenfold.evaluation.text_files import documents, token_stream

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path)
parser.add_argument("--train", type=Path, nargs="+", required=True)
parser.add_argument("--valid", type=Path, required=True)
parser.add_argument("--limit", type=int, help="score only the first tokens of the validation text")
parser.add_argument("-o", "--output", type=Path, default=Path("tenfold/demo/figures.json"))
given = parser.parse_args()

model, tokenizer = api.load(given.model, dtype="float32")
seen = json.loads((given.model / "training.json").read_text())["tokens"]
kept = given.model / "tokens.npy"
train = np.load(kept)[:seen] if kept.exists() else token_stream(documents(given.train), tokenizer, seen)
texts = list(documents([given.valid]))
valid = token_stream(texts, tokenizer)
size = sum(len(text.encode()) for text in texts)


def bigram_bits(train: np.ndarray, valid: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Bits per byte of ``valid`` under two interpolations of bigram and unigram."""
    train, valid = train.astype(np.int64), valid.astype(np.int64)
    pairs = np.bincount(train[:-1] * vocabulary + train[1:], minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    single = (np.bincount(train, minlength=vocabulary) + 1) / (len(train) + vocabulary)
    before, after = valid[:-1], valid[1:]
    count, total, kinds = pairs[before, after], pairs.sum(1)[before], (pairs > 0).sum(1)[before]
    witten_bell = (count + kinds * single[after]) / np.maximum(total + kinds, 1)
    chances = {"witten-bell": np.where(total > 0, witten_bell, single[after])}
    share = count / np.maximum(total, 1)
    for weight in (0.7, 0.8, 0.9, 0.95):
        chances[f"weight {weight}"] = weight * share + (1 - weight) * single[after]
    return {name: float(-np.log2(chance).sum()) / size for name, chance in chances.items()}


bigrams = bigram_bits(train, valid, len(tokenizer))
bigram = min(bigrams.values())
dense = api.evaluate(model, tokenizer, [given.valid], limit=given.limit)
shipped = [Path(tenfold.__file__).parent / "demo" / "heldout.jsonl"]
dense_shipped = api.evaluate(model, tokenizer, shipped)
costs = {}
for label, recipe in {
    "plain SVD, every block matrix at 0.5": api.recipe_for("low_rank", 0.5, "sites"),
    "Van Loan, 2x2 inner factor, feed-forward": {
        "replace": [
            {"role": "mlp.in", "structure": {"kind": "kronecker", "outs": [512, 2], "ins": [128, 2], "terms": 1}},
            {"role": "mlp.out", "structure": {"kind": "kronecker", "outs": [128, 2], "ins": [512, 2], "terms": 1}},
        ]
    },
}.items():
    folded, report = api.compress(copy.deepcopy(model), recipe)
    scores = api.evaluate(folded, tokenizer, shipped)
    costs[label] = {
        "parameters": report["parameters"],
        "perplexity": scores["perplexity"],
        "cost": scores["perplexity"] / dense_shipped["perplexity"] - 1,
    }
result = {
    "tokens_trained": seen,
    "valid": {"file": given.valid.name, **dense},
    "bigram_bits_per_byte": bigrams,
    "fewer_bits_than_bigram": 1 - dense["bits_per_byte"] / bigram,
    "heldout": dense_shipped,
    "without_training": costs,
    "nats_per_token_valid": math.log(dense["perplexity"]),
}
given.output.write_text(json.dumps(result, indent=1))
print(json.dumps(result, indent=1))
