"""Calibration text as batches of tokens, cut the way the model reads text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenfold.evaluate.text_files import HUB, documents, token_stream
from tenfold.models.text_mode import context_of, is_causal_lm

Batch = dict[str, Tensor]
AT_ONCE = 1024  # tokens: no slower than twice as many, whose activations were a quarter of the peak memory
STRANGE = 2.0  # bits per byte
READ_AHEAD = (
    4  # of a hub's data set, whose end is far, this many times the samples are read, and they are spread over it
)


@dataclass
class Calibration:
    """Batches ``{"input_ids": (samples, window), "attention_mask": ..}``, and where they came from."""

    batches: list[Batch]
    source: dict[str, Any]

    @property
    def tokens(self) -> int:
        """How many tokens count: padding does not."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)


def calibration(
    model,
    tokenizer,
    files: Sequence[str | Path],
    samples: int = 128,
    window: int | None = None,
    batch: int | None = None,
) -> Calibration:
    """The first ``samples`` samples of ``files``.

    A causal model reads windows of ``window`` tokens cut from the text as one stream, evenly spread over it; any other
    model reads one document (one line of a plain text file) a sample, cut to the window and padded.

    Args:
        batch: samples run at once; as many as make ``AT_ONCE`` tokens unless given.

    Raises:
        ValueError: there is no text, or not enough for one window, or the tokenizer is another model's.
    """
    longest = context_of(model)
    window = min(window or min(longest, 1024), longest)
    if samples < 1 or (batch is not None and batch < 1):
        raise ValueError(f"{samples} samples in batches of {batch} can't be drawn; ask for one or more")
    cut = _windows if is_causal_lm(model) else _documents
    batches = cut(tokenizer, files, samples, window, batch)
    largest, known = max(int(b["input_ids"].max()) for b in batches), model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise ValueError(
            f"the calibration text has token {largest} but the model knows {known}: use the tokenizer that the model was "
            "trained with"
        )
    source = {"files": [Path(f).name for f in files], "samples": samples, "window": window}
    return Calibration(batches, source | {"bytes_per_token": _bytes_per_token(tokenizer, batches[0])})


def check_text(text: Calibration, nats: float) -> None:
    """Warn where the model, which needs ``nats`` a token for the text, does not know what this is about.

    Bits per byte tell: what a model was trained on takes it 0.8 to 1.6, and another language as UTF-8, line noise or another
    tokenizer's tokens 2 and more, although their short tokens may have low perplexities.
    """
    bits = nats / math.log(2) / text.source.get("bytes_per_token", math.inf)
    if bits > STRANGE:
        told = f"the model's perplexity on the calibration text is {math.exp(min(nats, 700)):,.0f}, {bits:.1f} bits per byte"
        warnings.warn(f"{told}; is it the right text, in a language that the model was trained on?", stacklevel=2)


@torch.no_grad()
def nats_per_token(model, batches: Sequence[Batch]) -> float | None:
    """What a model needs for a token of ``batches``, in the mean; None where it predicts no next token."""
    if not is_causal_lm(model) or model.get_output_embeddings() is None:
        return None
    found, tokens, device, training = 0.0, 0, next(model.parameters()).device, model.training
    model.eval()
    for batch in batches:
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].bool().to(device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        both = mask[:, 1:] & mask[:, :-1]
        found += float(cross_entropy(logits[both].float(), ids[:, 1:][both], reduction="sum"))
        tokens += int(both.sum())
    model.train(training)
    return found / max(1, tokens)


def _bytes_per_token(tokenizer, batch: Batch) -> float:
    read = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return sum(len(text.encode()) for text in tokenizer.batch_decode(read, skip_special_tokens=True)) / sum(
        len(ids) for ids in read
    )


def _windows(tokenizer, files, samples: int, window: int, batch: int | None) -> list[Batch]:
    endless = any(str(file).startswith(HUB) for file in files)
    limit = READ_AHEAD * samples * window if endless else None
    tokens = torch.from_numpy(token_stream(documents(files, tokenizer), tokenizer, limit)).long()
    whole = len(tokens) // window
    if whole == 0:
        raise ValueError(
            f"the calibration text {', '.join(map(str, files))} has {len(tokens)} tokens, fewer than one window of {window}: "
            "give more text, twice as many tokens as the widest matrix has inputs"
        )
    chosen = torch.linspace(0, whole - 1, min(samples, whole)).round().long()
    rows = tokens[: whole * window].reshape(whole, window)[chosen]
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in rows.split(batch or max(1, AT_ONCE // window))
    ]


def _documents(tokenizer, files, samples: int, window: int, batch: int | None) -> list[Batch]:
    endless = any(str(file).startswith(HUB) for file in files)
    lines = (line for text in documents(files, tokenizer) for line in text.splitlines() if line.strip())
    texts = list(islice(lines, READ_AHEAD * samples if endless else None))
    if not texts:
        raise ValueError(f"the calibration text {', '.join(map(str, files))} is empty; give some sentences")
    chosen = torch.linspace(0, len(texts) - 1, min(samples, len(texts))).round().long().tolist()
    rows = tokenizer([texts[k] for k in chosen], truncation=True, max_length=window)["input_ids"]
    rows.sort(key=len)  # of like length, so that little is padded
    groups: list[list[list[int]]] = []
    for row in rows:
        if not groups or len(groups[-1]) == (batch or max(1, AT_ONCE // len(row))):
            groups.append([])
        groups[-1].append(row)
    return [dict(tokenizer.pad({"input_ids": group}, return_tensors="pt")) for group in groups]
