"""Perplexity and bits per byte of a causal language model, under a protocol that is part of the result."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.evaluation.text_files import check_tokenizer, documents, list_files, token_stream
from tenfold.models.suggestions import check_name
from tenfold.models.text_mode import context_of, is_masked_lm


@dataclass(frozen=True)
class EvalProtocol:
    """Settings that must be equal for two results to be comparable.

    Args:
        window: tokens in a sequence.
        stride: step between windows; below ``window``, every prediction outside of the first window has context.
        text: ``raw``, or ``tokenised`` for files with spaced punctuation and ``<unk>`` (WikiText's ``.tokens``).
        normaliser: the divisor of the nats in the perplexity: ``tokens`` of the model's tokenizer, or ``words``.
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
        check_name(self.text, ("raw", "tokenised"), "kind of text")
        check_name(self.normaliser, ("tokens", "words"), "normaliser")


def perplexity(
    model,
    tokenizer,
    files: str | Path | Sequence[str | Path],
    window: int | None = None,
    stride: int | None = None,
    text: str = "raw",
    normaliser: str = "tokens",
    batch_size: int = 8,
    limit: int | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Score ``files`` with ``model`` in windows of ``window`` tokens; every token but the first is predicted at most once.

    Args:
        window: the model's context, 1,024 at most, unless given.
        stride: the window unless given: windows don't overlap, and the first token of each is only context.
        limit: score only this many tokens; it is part of the result.

    Returns:
        ``perplexity``, ``bits_per_byte``, ``nats`` (their sum), ``tokens`` (scored), ``bytes``, ``words``, ``text``
        (names and a digest) and ``protocol``.

    Raises:
        ValueError: the text is shorter than a window, the tokenizer does not belong to the model, or the model is a masked one.
    """
    check_tokenizer(tokenizer)
    if is_masked_lm(model):
        raise ValueError(
            f"a {type(model).__name__} predicts hidden tokens, not next ones, so that it has no perplexity; compare its held-out "
            "loss in training.json, or its score on a task (tenfold finetune)"
        )
    context = context_of(model)
    window = window or min(context, 1024)
    if window > context:
        raise ValueError(f"window {window} is more than the model's context of {context}; use at most that")
    protocol = EvalProtocol(window, stride or window, text, normaliser)
    paths, digest, size, words = list_files(files), hashlib.sha256(), 0, 0

    def read() -> Iterator[str]:
        nonlocal size, words
        for part in documents(paths, tokenizer):
            digest.update(raw := part.encode())
            size, words = size + len(raw), words + len(part.split())
            yield part

    tokens = token_stream(
        read(), tokenizer, limit
    )  # no more is read than that takes, and the digest is of what is read
    check_tokens(tokens, model, window)
    nats, scored = _score(model, torch.from_numpy(tokens.astype(np.int64)), protocol, batch_size, progress)
    if limit is not None:
        part = tokenizer.decode(tokens, skip_special_tokens=True)
        size, words = len(part.encode()), len(part.split())
    fraction = scored / len(tokens)  # bytes and words of the scored tokens are in proportion
    return {
        "perplexity": math.exp(nats / (scored if normaliser == "tokens" else words * fraction)),
        "bits_per_byte": nats / math.log(2) / (size * fraction),
        "nats": nats,
        "tokens": scored,
        "bytes": round(size * fraction),
        "words": round(words * fraction),
        "text": {
            "files": [Path(file).name for file in paths],
            "sha256": digest.hexdigest()[:16],
            "limit": limit,
        },
        "protocol": asdict(protocol),
    }


def check_tokens(tokens: np.ndarray, model, window: int) -> None:
    """Raise ValueError if a text is shorter than a window, or has tokens outside of the model's vocabulary."""
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


@torch.no_grad()
def _score(model, tokens: Tensor, protocol: EvalProtocol, batch: int, progress) -> tuple[float, int]:
    """Return the sum of nats and the number of targets; a shorter window at the end is scored, too."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    nats, scored, done = 0.0, 0, 1
    spans = []  # (begin, end, first target)
    for begin in range(0, max(1, len(tokens) - 1), protocol.stride):
        end = min(begin + protocol.window, len(tokens))
        if (first := max(begin + 1, done)) < end:
            spans.append((begin, end, first))
        done = end
        if end == len(tokens):
            break
    for group in progress(_batches(spans, batch)):
        ids = torch.stack([tokens[begin:end] for begin, end, _ in group]).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for row, (begin, _, first) in zip(loss.reshape(len(group), -1), group, strict=True):
            nats += float(row[first - begin - 1 :].double().sum())
            scored += len(row) - (first - begin - 1)
    model.train(training)
    return nats, scored


def _batches(spans: list[tuple[int, int, int]], batch: int) -> list[list[tuple[int, int, int]]]:
    """Return batches of windows of equal length: the very last one, if it is shorter, is alone."""
    full = len(spans) - (spans[-1][1] - spans[-1][0] < spans[0][1] - spans[0][0])
    return [spans[k : min(k + batch, full)] for k in range(0, full, batch)] + [spans[full:]] * (full < len(spans))


def comparable(results: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless all results have the same protocol and text."""
    first = results[0]
    for other in results[1:]:
        for key in ("protocol", "text"):
            if other[key] != first[key]:
                raise ValueError(
                    f"these figures can't be compared: {key} is {first[key]} in one and {other[key]} in the other; "
                    "evaluate both in the same way"
                )
