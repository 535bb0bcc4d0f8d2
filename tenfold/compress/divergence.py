"""How far predictions move when matrices of one block are wrong: measured, by running all blocks behind it.

Gradients tell what a small error costs. One that is not small costs more where it goes through a softmax, or comes out of
matrices that were chosen on the same tokens: 1.1 to 4 times as much as they say on SmolLM2. At one size of every item, what
is measured takes their place, and scales the whole curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.compress.activations import Streams, passing, without_cache
from tenfold.compress.allocate import TradeoffCurve
from tenfold.compress.calibration import Batch
from tenfold.compress.weight_source import Weights
from tenfold.models.distributed import all_reduce_number, num_processes

Correction = tuple[Tensor, Tensor | None]  # What - W (out, in), and the change of the bias
ROWS = 128  # tokens whose distributions are in float32 at once
FAINT = 0.02  # of an error: what it still moves is rounding


@dataclass
class Trial:
    """Items at one size, and what that makes wrong.

    Args:
        sizes: ``{name of a curve: option}``.
        wrong: ``{path of a site: correction}``.
    """

    sizes: dict[str, Any]
    wrong: dict[str, Correction]


@torch.no_grad()
def scale_by_trials(
    curves: dict[str, TradeoffCurve],
    trials: Sequence[Trial],
    streams: Streams,
    weights: Weights,
    number: int,
    tokens: int,
) -> list[str]:
    """Scale ``curves``, in place, so that they lose at the sizes of ``trials`` what is measured there; return their names.

    Args:
        streams: with the states in front of block ``number`` and behind the last one.
        tokens: on about how many the divergences are measured.
    """
    if not trials:
        return []
    ways = [trial.wrong for trial in trials]
    if streams.bfloat16:
        ways.append({path: _faint(correction) for path, correction in ways[0].items()})
    measured = _measured(streams, weights, number, ways, tokens)
    rounding = measured[-1] if streams.bfloat16 else 0.0
    done = []
    for trial, nats in zip(trials, measured, strict=False):
        foreseen = sum(_loss_at(curves[name], size) for name, size in trial.sizes.items())
        nats = max(nats - rounding, nats / 4)
        if foreseen > 0 and nats > 0:
            for name in trial.sizes:
                curves[name].losses = curves[name].losses * (nats / foreseen)
            done += trial.sizes
    return done


def _faint(correction: Correction) -> Correction:
    matrix, bias = correction
    return FAINT * matrix, None if bias is None else FAINT * bias


def _loss_at(curve: TradeoffCurve, size: int) -> float:
    near = min(range(len(curve.options)), key=lambda k: abs(curve.options[k] - size))
    return float(curve.losses[near])


def _measured(
    streams: Streams, weights: Weights, number: int, ways: list[dict[str, Correction]], tokens: int
) -> list[float]:
    """``KL(original || wrong)`` of every way in which block ``number``, whose weights are there, may be wrong."""
    count, last = batches_with(streams, math.ceil(tokens / num_processes())), len(streams.blocks)
    before = [streams.shelf.get(f"before-{number}-{k}").to(streams.device) for k in range(count)]
    states = [[through(streams, number, x, k, way) for way in ways] for k, x in enumerate(before)]
    for later in range(number + 1, last):
        with weights.at(streams.paths[later]):
            states = [[through(streams, later, x, k, {}) for x in row] for k, row in enumerate(states)]
    originals = [streams.shelf.get(f"before-{last}-{k}").to(streams.device) for k in range(count)]
    with weights.outside():
        return divergences(streams, [[x, *row] for x, row in zip(originals, states, strict=True)])


def batches_with(streams: Streams, tokens: int) -> int:
    """Return how many batches of this process hold ``tokens`` tokens; all, if these are fewer."""
    counts = np.cumsum([int(kept.sum()) for kept in streams.kept])
    return min(len(counts), int(np.searchsorted(counts, tokens)) + 1)


def through(streams: Streams, number: int, states: Tensor, batch: int, way: dict[str, Correction]) -> Tensor:
    """Return ``states`` behind block ``number`` where the matrices of the sites in ``way`` are corrected."""

    def hook(module: nn.Module, arguments: tuple, out: Tensor, path: str) -> Tensor:
        matrix, bias = way[path]
        change = arguments[0] @ matrix.T.to(arguments[0])
        return out + change if bias is None else out + change + bias.to(change)

    handles = [streams.model.get_submodule(p).register_forward_hook(partial(hook, path=p)) for p in way]
    try:
        return streams.run(number, streams.blocks[number], states, batch)
    finally:
        for handle in handles:
            handle.remove()


def divergences(streams: Streams, states: list[list[Tensor]]) -> list[float]:
    """Return ``KL(first || other)`` in nats a token for all but the first of every row of ``states``, behind the last block.

    Raises:
        ValueError: the model returns no logits.
    """
    sums, tokens = torch.zeros(len(states[0]) - 1, dtype=torch.float64), 0
    for k, row in enumerate(states):
        kept = streams.kept[k].reshape(streams.batches[k]["attention_mask"].shape)
        for sample in range(len(row[0])):  # one at a time: logits are large
            given = {name: value[sample : sample + 1].to(streams.device) for name, value in streams.batches[k].items()}
            at = kept[sample].to(streams.device)
            first = _logits(streams, row[0][sample : sample + 1], given, at)
            for number, other in enumerate(row[1:]):
                sums[number] += _divergence(first, _logits(streams, other[sample : sample + 1], given, at))
            tokens += int(at.sum())
    return [all_reduce_number(float(value)) / max(1, all_reduce_number(tokens)) for value in sums]


def _divergence(logits: Tensor, others: Tensor) -> float:
    """Return the sum over tokens of ``KL(softmax(logits) || softmax(others))``, some tokens at a time."""
    found = 0.0
    for one, other in zip(logits.split(ROWS), others.split(ROWS), strict=True):
        first, log = one.float().log_softmax(-1), other.float().log_softmax(-1)
        found += float((first.exp() * (first - log)).sum())
    return found


def _logits(streams: Streams, states: Tensor, given: Batch, at: Tensor) -> Tensor:
    """``(tokens, vocabulary)`` at the tokens ``at`` of one sample, from what the last block returns."""
    with passing(streams.blocks, streams.form, states), streams.autocast():
        logits = getattr(streams.model(**given, **without_cache(streams.model)), "logits", None)
    if logits is None:
        raise ValueError(
            f"divergences are of predictions, and {type(streams.model).__name__} makes none; load the model with its head, or "
            "take another allocation"
        )
    return logits[0] if bool(at.all()) else logits[0][at]
