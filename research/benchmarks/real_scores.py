"""Score one model for real_models.py: perplexity and KL divergence on texts, LAMBADA, size. Reads a JSON file, writes another.

    python research/benchmarks/real_scores.py ASKED.json SCORES.json

ASKED.json: ``model`` and ``original`` (folders), ``texts`` ({name: JSON lines}), ``window``, ``windows``, ``lambada`` (JSON
lines), ``passages``, ``states`` (a file for those of the original), ``device``, ``dtype``, and ``parts``: ``size``, ``texts``,
``lambada``, ``full``, or some of them. ``bits`` (8 or 4): the matrices of the blocks are rounded to integers first, embeddings
and heads to eight bits (quality_bytes.py); bytes are those of the integers, scales in float32 and the rest in bfloat16.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from quality_bytes import quantise
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenfold import api
from tenfold.evaluation.perplexity import check_tokens
from tenfold.evaluation.text_files import documents, token_stream
from tenfold.models.precision import multiplies_bfloat16
from tenfold.models.weight_files import weight_files
from tenfold_cli.memory import reuse_freed_memory

ROWS = 256  # whose distributions are in float32 at once


def read_windows(file: str, model, tokenizer, window: int, count: int) -> Tensor:
    """Return the first ``count`` windows of a text, ``(count, window)``.

    Raises:
        ValueError: the text is shorter.
    """
    tokens = token_stream(documents([file]), tokenizer, window * count)
    check_tokens(tokens, model, window * count)
    return torch.from_numpy(tokens).long().reshape(count, window)


@torch.no_grad()
def score_windows(model, windows: Tensor, original: Callable[[int, Tensor], Tensor] | None = None) -> dict:
    """Return the perplexity per token on ``windows`` and, beside an original, the mean KL(original || model) per token.

    Args:
        original: returns its logits, ``(window, vocabulary)``, for the number of a window and its tokens, ``(1, window)``.
    """
    nats, divergence, device = 0.0, 0.0, next(model.parameters()).device
    for number, ids in enumerate(windows.to(device)):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        theirs = None if original is None else original(number, ids[None])[:-1]
        for begin in range(0, len(logits), ROWS):
            part = slice(begin, begin + ROWS)
            ours = logits[part].float().log_softmax(-1)
            nats -= float(ours.gather(1, ids[1:][part, None]).double().sum())
            if theirs is not None:
                wanted = theirs[part].float().log_softmax(-1)
                sums = torch.nn.functional.kl_div(ours, wanted, reduction="none", log_target=True).sum(-1)
                divergence += float(sums.double().sum())
    tokens = windows[:, 1:].numel()
    found = {"perplexity": math.exp(nats / tokens), "tokens": tokens}
    return found if original is None else found | {"kl": divergence / tokens}


@torch.no_grad()
def score_last_words(model, tokenizer, passages: Sequence[str], batch: int = 16) -> dict[str, float]:
    """Return how often the last word of a passage is the likeliest, token by token, and its perplexity per word.

    As lm-evaluation-harness does: a passage and all of it but its last word are tokenised, each with the tokenizer's own special
    tokens; the tokens behind the latter's are the word's.
    """
    rows = []
    for passage in passages:
        whole = tokenizer(passage.rstrip())["input_ids"]
        rows.append((whole, len(tokenizer(passage.rstrip().rsplit(" ", 1)[0])["input_ids"])))
    rows.sort(key=lambda row: len(row[0]))
    device, right, nats = next(model.parameters()).device, 0, 0.0
    for begin in range(0, len(rows), batch):
        group = rows[begin : begin + batch]
        ids = torch.zeros(len(group), max(len(row) for row, _ in group), dtype=torch.long)
        for k, (row, _) in enumerate(group):
            ids[k, : len(row)] = torch.tensor(row)  # a causal model does not see what stands behind
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        for k, (row, first) in enumerate(group):
            word = torch.tensor(row[first:], device=device)
            guess = logits[k, first - 1 : len(row) - 1].float().log_softmax(-1)
            right += bool((guess.argmax(-1) == word).all())
            nats -= float(guess.gather(1, word[:, None]).double().sum())
    return {"accuracy": right / len(rows), "perplexity": math.exp(nats / len(rows)), "passages": len(rows)}


class Original:
    """The original's logits; what its head reads is kept in a file, so that the rows that come later run its head alone.

    Nothing is kept of a model that does more to the logits than its head.
    """

    def __init__(self, model, file: str):
        self.model, self.file, self.new = model, Path(file), dict[str, Tensor]()
        self.head = model.get_output_embeddings()
        self.stored = load_file(self.file) if self.file.is_file() else {}

    @torch.no_grad()
    def __call__(self, text: str, number: int, ids: Tensor) -> Tensor:
        key, read = f"{text}.{number}", list[Tensor]()
        if key in self.stored:
            return self.head(self.stored[key].to(ids.device))[0]
        hook = self.head.register_forward_pre_hook(lambda module, given: read.append(given[0]))
        logits = self.model(input_ids=ids, use_cache=False).logits
        hook.remove()
        if len(read) == 1 and torch.equal(self.head(read[0]), logits):
            self.new[key] = read[0].cpu().clone()
        return logits[0]

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.new:
            unfinished = self.file.with_suffix(".new")
            save_file(self.stored | self.new, unfinished)
            unfinished.replace(self.file)


def measure_size(model, folder: str) -> dict:
    """Return parameters with and without embeddings, bytes of the saved weights, FLOPs per token at 1,024 rows a call."""
    priced = api.price(model)
    ends = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    outer = {id(p): p.numel() for layer in ends for p in layer.parameters()}
    total = priced["parameters"]["total"]
    return {
        "parameters": total,
        "without_embeddings": total - sum(outer.values()),
        "bytes": sum(file.stat().st_size for file in weight_files(folder)),
        "flops_per_token": priced["flops_per_token"]["1024"],
    }


def score_texts(model, tokenizer, asked: dict, device: str, dtype: str) -> dict:
    """Return the scores on every text, and the mean of their divergences."""
    found, original = {}, None
    if asked["original"] != asked["model"] or asked.get("bits"):
        original = Original(api.load(asked["original"], device, dtype)[0], asked["states"])
    for name, file in asked["texts"].items():
        windows = read_windows(file, model, tokenizer, asked["window"], asked["windows"])
        found[name] = score_windows(model, windows, original and partial(original, name))
    if original is not None:
        original.save()
        found["kl"] = sum(scores["kl"] for scores in found.values()) / len(found)
    return found


def score(asked: dict) -> dict:
    """Return the parts that are asked for, with the seconds of each."""
    device = str(api.resolve_device(asked["device"]))
    dtype = asked["dtype"] or ("bfloat16" if multiplies_bfloat16(device.split(":")[0]) else "float32")
    model, tokenizer = api.load(asked["model"], device, dtype)
    if tokenizer is None:
        raise ValueError(f"{asked['model']} has no tokenizer; copy tokenizer.json there")
    held = {"bytes": quantise(model, asked["bits"], 8, 2)} if asked.get("bits") else {}

    def last_words() -> dict:
        passages = list(documents([asked["lambada"]]))[: asked["passages"]]
        return score_last_words(model, tokenizer, passages)

    def full() -> dict:
        files, window = list(asked["texts"].values())[:1], asked["window"]
        kept = api.evaluate(model, tokenizer, files, window, batch_size=1)
        return {name: kept[name] for name in ("perplexity", "bits_per_byte", "tokens")}

    parts = {
        "size": lambda: measure_size(model, asked["model"]) | held,
        "texts": lambda: score_texts(model, tokenizer, asked, device, dtype),
        "lambada": last_words,
        "full": full,
    }
    found: dict = {"seconds": {}}
    for name in asked["parts"]:
        begun = time.perf_counter()
        found[name] = parts[name]()
        found["seconds"][name] = round(time.perf_counter() - begun, 1)
    about = {"device": device, "dtype": dtype, "threads": torch.get_num_threads()}
    if device == "cpu":
        about["cpu"] = torch.backends.cpu.get_cpu_capability()
    return found | {"machine": about}


def main(question: str, answer: str) -> None:
    Path(answer).write_text(json.dumps(score(json.loads(Path(question).read_text()))))


if __name__ == "__main__":
    reuse_freed_memory()
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError, ImportError) as reason:
        sys.exit(f"real_scores: {' '.join(str(reason).split())}")
