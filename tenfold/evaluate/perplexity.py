"""Perplexity and bits per byte of a causal language model, under a protocol that is part of the result."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.evaluate.text_files import documents, token_stream
from tenfold.models.text_mode import context_of, is_masked_lm


@dataclass(frozen=True)
class Protocol:
    """What must be equal before two figures may be compared.

    Args:
        window: tokens that the model sees at once.
        stride: how far the window moves; below ``window`` every prediction but the first window's has context.
        text: ``raw``, or ``tokenised`` for files with spaced punctuation and ``<unk>`` (WikiText's ``.tokens``).
        normaliser: what nats are divided by for the perplexity: ``tokens`` of the model's tokenizer, or ``words``.
    """

    window: int
    stride: int
    text: str = "raw"
    normaliser: str = "tokens"

    def __post_init__(self):
        if not 1 <= self.stride <= self.window or self.window < 2:
            raise ValueError(
                f"stride {self.stride} must be from 1 to the window, {self.window}, which must be 2 or more"
            )
        if self.text not in ("raw", "tokenised") or self.normaliser not in ("tokens", "words"):
            raise ValueError(
                f"text is raw or tokenised, not {self.text!r}; normaliser tokens or words, not {self.normaliser!r}"
            )


def perplexity(
    model,
    tokenizer,
    files: Sequence[str | Path],
    window: int | None = None,
    stride: int | None = None,
    text: str = "raw",
    normaliser: str = "tokens",
    batch_size: int = 8,
    limit: int | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Score ``files`` with ``model``: windows of ``window`` tokens, each target counted once, the very first left out.

    Args:
        window: the model's context, 1,024 at most, unless given.
        stride: the window unless given: windows that do not overlap (the first token of each is only context).
        limit: score only this many tokens; the result says how many it were.

    Returns:
        ``perplexity``, ``bits_per_byte``, ``nats`` (their sum), ``tokens`` (scored), ``bytes``, ``words``, ``text``
        (names and a digest) and ``protocol``.

    Raises:
        ValueError: the text is shorter than a window, the tokenizer does not belong to the model, or the model is a masked one.
    """
    if is_masked_lm(model):
        raise ValueError(
            f"a {type(model).__name__} predicts hidden tokens, not next ones, so that it has no perplexity; compare its held-out "
            "loss in training.json, or its score on a task (tenfold finetune)"
        )
    longest = context_of(model)
    window = window or min(longest, 1024)
    if window > longest:
        raise ValueError(f"window {window} is more than the model's context of {longest}; use at most that")
    protocol = Protocol(window, stride or window, text, normaliser)
    texts = list(documents(files, tokenizer))
    tokens = token_stream(texts, tokenizer, limit)
    check_tokens(tokens, model, window)
    nats, scored = _score(model, torch.from_numpy(tokens.astype(np.int64)), protocol, batch_size, progress)
    seen = texts if limit is None else [tokenizer.decode(tokens, skip_special_tokens=True)]
    size, words = (
        sum(len(part) for part in parts) for parts in ([t.encode() for t in seen], [t.split() for t in seen])
    )
    part = scored / len(tokens)  # bytes and words of what was scored, in proportion
    return {
        "perplexity": math.exp(nats / (scored if normaliser == "tokens" else words * part)),
        "bits_per_byte": nats / math.log(2) / (size * part),
        "nats": nats,
        "tokens": scored,
        "bytes": round(size * part),
        "words": round(words * part),
        "text": {"files": [Path(f).name for f in files], "sha256": _digest(texts), "limit": limit},
        "protocol": asdict(protocol),
    }


def check_tokens(tokens: np.ndarray, model, window: int) -> None:
    """Refuse a text shorter than a window and tokens that the model does not know."""
    if len(tokens) < window:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than one window of {window}: give more text or --window"
        )
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokens) and int(tokens.max()) >= known:
        raise ValueError(
            f"the tokenizer gives token {int(tokens.max())} but the model knows {known}; use the tokenizer that the model "
            "was trained with"
        )


def _digest(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _score(model, tokens: Tensor, protocol: Protocol, batch: int, progress) -> tuple[float, int]:
    """The sum of nats and the number of targets; a last, shorter window is scored too."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    nats, scored, done = 0.0, 0, 1
    spans = []
    for begin in range(0, max(1, len(tokens) - 1), protocol.stride):
        end = min(begin + protocol.window, len(tokens))
        first = max(begin + 1, done if protocol.stride < protocol.window else begin + 1)
        if first < end:
            spans.append((begin, end, first))
        done = end
        if end == len(tokens):
            break
    groups = [spans[k : k + batch] for k in range(0, len(spans), batch)]
    for group in progress([part for g in groups for part in _same_length(g)]):
        ids = torch.stack([tokens[begin:end] for begin, end, _ in group]).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for row, (begin, _, first) in zip(loss.reshape(len(group), -1), group, strict=True):
            nats += float(row[first - begin - 1 :].double().sum())
            scored += len(row) - (first - begin - 1)
    model.train(was)
    return nats, scored


def _same_length(group: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """A group in parts of equal window length: only the very last window is shorter."""
    full = [span for span in group if span[1] - span[0] == group[0][1] - group[0][0]]
    rest = [span for span in group if span not in full]
    return [full, rest] if rest else [full]


def comparable(results: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless all results have one protocol and one text."""
    first = results[0]
    for other in results[1:]:
        for key in ("protocol", "text"):
            if other[key] != first[key]:
                raise ValueError(
                    f"these figures can't be compared: {key} is {first[key]} in one and {other[key]} in the other; "
                    "evaluate both in the same way"
                )
