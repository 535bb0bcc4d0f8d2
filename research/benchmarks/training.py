"""Pre-training at equal tokens: structured models, the dense model of the same shape, and dense rivals of equal size.

    python research/benchmarks/training.py --data DIR [--rows dense narrower ...] [--rates 2e-3 4e-3 8e-3]
    python research/benchmarks/training.py --table

Rows that are ``taught`` learn from the dense row's run, too: they are shown the same tokens, and cost its training beside theirs.
Every contender is trained from scratch on the same tokens in the same order, once for every learning rate; the best one counts.
A run is a resumable ``tenfold pretrain``; it writes research/results/training/SHAPE/ROW-RATE.json, and what
is there is not run again. ``narrower`` and ``shallower`` are dense and keep as many parameters as the
structured rows; rows that are contracted through
their factors have the FLOPs of these rivals, too. DIR is that of quality.py; text is kept in ``--work`` only.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch

from tenfold import api
from tenfold.evaluation.text_files import documents
from tenfold.models.sites import count_parameters
from tenfold.train.tokenizer import train_tokenizer
from tenfold.train.tokens import is_tokens, write_tokens

WINDOW = 256
BLOCKS = ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.gate", "mlp.out"]
MLP = ["mlp.in", "mlp.gate", "mlp.out"]
ZERO = {"fit": "noise", "options": {"branch": "zero"}}  # what ends a branch beside the stream begins at zero
KEEP = {"keep": 0.6, "of": "blocks"}
SHAPES = {"small": (1, 8_192_000), "tiny": (2, 2_048_000)}  # what all widths are divided by, and tokens


BALANCED_ZERO = {"fit": "balanced", "options": {"branch": "zero"}}
FROM_ZERO = {"replace": [{"role": BLOCKS, "structure": {"kind": "dense"}, "start": ZERO}]}


def everywhere(**structure) -> dict:
    return {"replace": [{"role": BLOCKS, "structure": structure, "start": "noise"}], "budget": KEEP}


def train_like(share: float) -> dict:
    """A tensor train in the feed-forward matrices, with the share of their parameters that a published rank has."""
    structure = {"kind": "tensor_train", "parts": 3}
    return {"replace": [{"role": MLP, "structure": structure, "keep": share, "start": "balanced"}]}


def shared(group: int, hidden: int, wide: int, adapter: int | None = None, start: dict | str = "balanced") -> dict:
    """Tensor trains of three cores, nothing cut, the middle one common to ``group`` neighbouring layers; beside it adapters."""
    inner, outer = [4, hidden // 16, 4], [4, wide // 16, 4]
    shapes = {("attn.q", "attn.k", "attn.v", "attn.out"): (inner, inner), ("mlp.in", "mlp.gate"): (outer, inner)}
    rules = []
    for roles, (outs, ins) in (shapes | {("mlp.out",): (inner, outer)}).items():
        structure = {"kind": "tensor_train", "outs": outs, "ins": ins, "rank": "full"}
        rule = {"role": list(roles), "structure": structure, "share": {"factors": ["core_1"], "group": group}}
        rules.append(rule | {"start": start} | ({"adapter": adapter} if adapter else {}))
    return {"replace": rules}


def shared_whole(group: int, adapter: int | None, start: dict | str = "noise") -> dict:
    """The whole matrix common to ``group`` neighbouring layers: an MPO of one core; beside it adapters."""
    rule = {"role": BLOCKS, "structure": {"kind": "dense"}, "start": start}
    rule |= {"share": {"factors": ["matrix"], "group": group}} | ({"adapter": adapter} if adapter else {})
    return {"replace": [rule]}


def shared_among(*groups: list[int]) -> dict:
    """The whole matrix common to the layers of a group, which need not be neighbours (arXiv 2104.06022); branches from zero."""
    share, structure = {"share": {"factors": ["matrix"]}}, {"kind": "dense"}
    return {"replace": [{"role": BLOCKS, "layers": g, "structure": structure, "start": ZERO} | share for g in groups]}


def shared_mlp(layers: int, wide: int) -> dict:
    """Attention of its own in every layer, one wide MLP for all of them (arXiv 2309.01826); branches from zero."""
    own = {"role": BLOCKS[:4], "structure": {"kind": "dense"}, "start": ZERO}
    rule = {
        "role": MLP,
        "structure": {"kind": "dense"},
        "start": ZERO,
        "share": {"factors": ["matrix"], "group": layers},
    }
    return {"model": {"num_hidden_layers": layers, "intermediate_size": wide}, "replace": [own, rule]}


def shared_attention(layers: int, wide: int) -> dict:
    """An MLP of its own in every layer, one attention for all of them; branches from zero."""
    rule = {"role": BLOCKS[:4], "structure": {"kind": "dense"}, "start": ZERO}
    rule |= {"share": {"factors": ["matrix"], "group": layers}}
    own = {"role": MLP, "structure": {"kind": "dense"}, "start": ZERO}
    return {"model": {"num_hidden_layers": layers, "intermediate_size": wide}, "replace": [rule, own]}


def cola(attention: int, mlp: int) -> dict:
    rules = [(BLOCKS[:4], attention), (MLP, mlp)]
    return {"replace": [{"role": r, "structure": {"kind": "cola", "rank": k}, "start": "noise"} for r, k in rules]}


def contenders(part: int) -> dict[str, dict]:
    """The recipe of every row, all widths divided by ``part``."""
    rank = -(-23 // part)
    taught = {"train": {"teacher": "dense"}}  # the dense row's run, at its best rate
    twice = {"model": {"num_hidden_layers": 8, "intermediate_size": 1016 // part}} | shared_whole(2, None, ZERO)
    pairs = {"model": {"num_hidden_layers": 6, "intermediate_size": 712 // part}} | shared_whole(2, None, ZERO)
    narrower = {
        "hidden_size": 320 // part, "intermediate_size": 672 // part, "num_attention_heads": 5, "num_key_value_heads": 5,
    }  # fmt: skip
    shallower = {"num_hidden_layers": 3, "intermediate_size": 712 // part}
    return {
        "dense": {},
        "dense, branches from zero": FROM_ZERO,
        "narrower": {"model": narrower},
        "narrower, branches from zero": {"model": narrower} | FROM_ZERO,
        "shallower": {"model": shallower},
        "shallower, branches from zero": {"model": shallower} | FROM_ZERO,
        "low rank": everywhere(kind="low_rank"),
        "block train": everywhere(kind="block_train", blocks=4),
        "block train, rates by fans": everywhere(kind="block_train", blocks=4)
        | {"train": {"optimizer": "adamw", "lr_scaling": "fans"}},
        "Kronecker sum": everywhere(kind="kronecker", inner=[4, 4]),
        "low rank, guided": everywhere(kind="low_rank") | {"train": {"self_guided_fraction": 0.5}},
        "compressed midway": {
            "replace": [{"prune": "mlp"}, {"prune": "attention"}],
            "calibrate": {"num_samples": 192},
            "budget": KEEP,
            "train": {"compress_at": 0.5},
        },
        "low rank in the MLPs": {
            "replace": [{"role": MLP, "structure": {"kind": "low_rank"}, "start": "noise"}],
            "budget": KEEP,
        },
        "CoLA": cola(115 // part, 166 // part),
        "pairs of layers share": shared(2, 384 // part, 1024 // part, rank),
        "pairs of layers share, whole": shared_whole(2, rank),
        "pairs of layers share, whole, branches from zero": shared_whole(2, rank, ZERO),
        "6 layers, threes share whole": {"model": {"num_hidden_layers": 6}} | shared_whole(3, 16 // part),
        "6 layers, pairs share whole, branches from zero": pairs,
        "6 layers, pairs share whole, branches from zero, taught": pairs | taught,
        "6 layers, a cycle of three, branches from zero": pairs | shared_among([0, 3], [1, 4], [2, 5]),
        "6 layers, mirrored, branches from zero": pairs | shared_among([0, 5], [1, 4], [2, 3]),
        "shallower, taught": {"model": shallower} | taught,
        "narrower, taught": {"model": narrower} | taught,
        "dense, taught": taught,
        "low rank, taught": everywhere(kind="low_rank") | taught,
        "8 layers, pairs share whole": twice | shared_whole(2, None),
        "8 layers, pairs share whole, branches from zero": twice,
        "8 layers, pairs share whole, branches from zero, taught": twice | taught,
        "8 layers, a cycle of four, branches from zero": twice | shared_among([0, 4], [1, 5], [2, 6], [3, 7]),
        "8 layers, pairs share": {"model": {"num_hidden_layers": 8, "intermediate_size": 992 // part}}
        | shared(2, 384 // part, 992 // part),
        "8 layers, pairs share, branches from zero": {
            "model": {"num_hidden_layers": 8, "intermediate_size": 992 // part}
        }
        | shared(2, 384 // part, 992 // part, None, BALANCED_ZERO),
        "one MLP for all layers": shared_mlp(4, 1640 // part),
        "one attention for all layers": shared_attention(4, 792 // part),
        "ttm-16": train_like(0.006),
        "ttm-32": train_like(0.07),
        "ttm-64": train_like(0.28),
    }  # fmt: skip


def recipe_of(row: str, rate: float, given) -> dict:
    part, tokens = SHAPES[given.shape]
    model = {
        "model_type": "llama", "hidden_size": 384 // part, "intermediate_size": 1024 // part, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64 // part, "max_position_embeddings": WINDOW,
        "tie_word_embeddings": True, "attn_implementation": "eager",  # short windows on a CPU: faster
    }  # fmt: skip
    own = contenders(part)[row]
    train = {
        "tokens": given.tokens or tokens,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": rate,
        "schedule": "linear",
        "compile": given.compile,
    }
    if own.get("train", {}).get("teacher"):
        train["teacher"] = str(given.work / f"{given.shape}-dense-{best_rate(given.output):g}")
    made = {"name": row, "model": model | own.get("model", {}), "train": own.get("train", {}) | train}
    return made | {key: own[key] for key in ("replace", "budget", "calibrate") if key in own}


def best_rate(output: Path) -> float:
    """Of the dense row."""
    runs = [json.loads(file.read_text()) for file in output.glob("dense-*.json")]
    runs = [run for run in runs if run["row"] == "dense"]
    if not runs:
        raise SystemExit("a row with a teacher needs the dense row first: --rows dense")
    return min(runs, key=lambda run: run["scores"]["perplexity"])["rate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(contenders(1)))
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="small", help="7 or 1.8 million parameters in the blocks"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--tokens", type=int, help="trained on; by the shape unless given")
    parser.add_argument("--scored", type=int, default=100_000, help="held-out tokens")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("training-work"), help="where runs live")
    parser.add_argument("--output", type=Path, help="research/results/training/SHAPE unless given")
    parser.add_argument(
        "--table", action="store_true", help="only write docs/training-results.md from the result files"
    )
    given = parser.parse_args()
    given.output = given.output or Path("research/results/training") / given.shape
    if not given.table:
        given.output.mkdir(parents=True, exist_ok=True)
        for row in given.rows:
            for rate in given.rates:
                run(row, rate, given)
    write_table(given.output.parent, Path("docs/training-results.md"))


def run(row: str, rate: float, given) -> None:
    file = given.output / f"{row.replace(' ', '-').replace(',', '')}-{rate:g}.json"
    if file.exists():
        return
    folder = given.work / f"{given.shape}-{file.stem}"
    report = api.pretrain(recipe_of(row, rate, given), [tokens_of(given)], folder, torch.float32)
    model, tokenizer = api.load(folder, dtype="float32")
    scores = api.evaluate(
        model, tokenizer, [given.data / "corpus" / "valid.jsonl.xz"], limit=given.scored, batch_size=16
    )
    price = api.price(model)
    result = {"row": row, "rate": rate, "scores": scores, "training": report}
    result |= {"parameters": price["parameters"] | {"blocks": count_parameters(model, "blocks")}}
    result |= {"flops_per_token": price["flops_per_token"], "threads": torch.get_num_threads()}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{row} at {rate:g}: perplexity {scores['perplexity']:.2f}, {report['seconds_of_last_run']} s", flush=True)


def tokens_of(given) -> Path:
    """The same tokens for all runs of a shape."""
    wanted = given.tokens or SHAPES[given.shape][1]
    folder, files = given.work / f"tokens-{wanted}", sorted((given.data / "corpus").glob("train-*.jsonl.xz"))
    if not is_tokens(folder):
        tokenizer = train_tokenizer(islice(documents(files), 5000), 4096, WINDOW)
        write_tokens(folder, files, tokenizer, wanted)
    return folder


def write_table(results: Path, target: Path) -> None:
    lines = [
        "# Pre-training at equal tokens\n",
        "Written by `python research/benchmarks/training.py --table` from the files in `research/results/training/`. Every row",
        "is the best of its learning rates; **relative** is its held-out perplexity over that of the dense",
        "model of the same shape. A row that",
        "was tried at fewer rates than another is at a disadvantage: compare these at one rate, in the files.\n",
    ]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        best = {}
        for found in sorted(runs, key=lambda found: -found["scores"]["perplexity"]):
            best[found["row"]] = found
        dense = best.get("dense")
        lines += [f"## {folder.name}\n"]
        lines += [
            "| row | blocks | parameters | FLOPs a token at 1,024 rows | tokens | rates tried | rate | perplexity | relative |"
        ]
        lines += ["|" + "---|" * 9]
        for row in (name for name in contenders(1) if name in best):
            one, tried = best[row], sorted(found["rate"] for found in runs if found["row"] == row)
            score = one["scores"]["perplexity"]
            relative = f"{score / dense['scores']['perplexity']:.3f}" if dense else ""
            size, flops = one["parameters"], one["flops_per_token"]["1024"]
            lines.append(
                f"| {row} | {size['blocks']:,} | {size['total']:,} | {flops:,} | {one['training']['tokens']:,} | "
                f"{', '.join(f'{rate:g}' for rate in tried)} | {one['rate']:g} | {score:.2f} | {relative} |"
            )
        lines.append("")
    target.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
