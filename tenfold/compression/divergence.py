"""Measured divergence of the predictions when matrices of one block are wrong, by running all blocks behind it.

Gradients estimate the loss of a small error. A larger one costs more where it passes a softmax, or comes out of matrices that
were chosen on the same tokens: 1.1 to 4 times as much as estimated on SmolLM2. At one size of every item the measured divergence
replaces the estimate, and scales the whole curve.
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

from tenfold.compression.activations import Activations
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.calibration import Batch
from tenfold.compression.weight_source import Weights
from tenfold.models.distributed import all_reduce_number, num_processes

Correction = tuple[Tensor, Tensor | None]  # What - W (out, in), and the change of the bias
ROWS = 128  # tokens whose distributions are in float32 at once
FAINT = 0.02  # scale at which an error moves the predictions by rounding only


@dataclass
class Trial:
    """Items at one size, and the errors that this causes.

    Args:
        sizes: ``{name of a curve: option}``.
        corrections: ``{path of a site: correction}``.
    """

    sizes: dict[str, Any]
    corrections: dict[str, Correction]


@torch.no_grad()
def scale_by_trials(
    curves: dict[str, TradeoffCurve],
    trials: Sequence[Trial],
    activations: Activations,
    weights: Weights,
    number: int,
    tokens: int,
) -> list[str]:
    """Scale ``curves``, in place, to the divergences measured at the sizes of ``trials``; return the names of those scaled.

    Args:
        activations: with the states in front of block ``number``, whose weights are loaded, and behind the last one.
        tokens: about how many to measure divergences on.
    """
    if not trials:
        return []
    variants = [trial.corrections for trial in trials]
    if activations.bfloat16:
        faint = {p: (FAINT * m, None if b is None else FAINT * b) for p, (m, b) in variants[0].items()}
        variants.append(faint)
    count, last = batches_with_tokens(activations, math.ceil(tokens / num_processes())), len(activations.blocks)
    states = [activations.load(f"before-{number}-{k}") for k in range(count)]
    corrected = run_variants(activations, weights, number, states, variants)
    originals = [activations.load(f"before-{last}-{k}") for k in range(count)]
    with weights.outside():
        measured = divergences(activations, [[x, *row] for x, row in zip(originals, corrected, strict=True)])
    rounding = measured[-1] if activations.bfloat16 else 0.0
    scaled = []
    for trial, nats in zip(trials, measured, strict=False):
        estimate = sum(_loss_at(curves[name], size) for name, size in trial.sizes.items())
        nats = max(nats - rounding, nats / 4)
        if estimate > 0 and nats > 0:
            for name in trial.sizes:
                curves[name].losses = curves[name].losses * (nats / estimate)
            scaled += trial.sizes
    return scaled


def _loss_at(curve: TradeoffCurve, size: int) -> float:
    near = min(range(len(curve.options)), key=lambda k: abs(curve.options[k] - size))
    return float(curve.losses[near])


def run_variants(
    activations: Activations,
    weights: Weights,
    number: int,
    states: Sequence[Tensor],
    variants: Sequence[dict[str, Correction]],
) -> list[list[Tensor]]:
    """Return, for every batch, what is behind the last block for every variant of block ``number``, whose weights are loaded.

    Args:
        states: in front of block ``number``, one tensor per batch.
        variants: corrections of its sites; the later blocks are as they are.
    """
    rows = [[_run_corrected(activations, number, x, k, some) for some in variants] for k, x in enumerate(states)]
    for later in range(number + 1, len(activations.blocks)):
        block = activations.blocks[later]
        with weights.at(activations.paths[later]):
            rows = [[activations.run_block(later, block, x, k) for x in row] for k, row in enumerate(rows)]
    return rows


def batches_with_tokens(activations: Activations, tokens: int) -> int:
    """Return how many batches of this process hold ``tokens`` tokens; all, if these are fewer."""
    counts = np.cumsum([int(mask.sum()) for mask in activations.masks])
    return min(len(counts), int(np.searchsorted(counts, tokens)) + 1)


def _run_corrected(
    activations: Activations, number: int, states: Tensor, batch: int, corrections: dict[str, Correction]
) -> Tensor:
    def hook(module: nn.Module, arguments: tuple, out: Tensor, path: str) -> Tensor:
        matrix, bias = corrections[path]
        change = arguments[0] @ matrix.T.to(arguments[0])
        return out + change if bias is None else out + change + bias.to(change)

    handles = [
        activations.model.get_submodule(path).register_forward_hook(partial(hook, path=path)) for path in corrections
    ]
    try:
        return activations.run_block(number, activations.blocks[number], states, batch)
    finally:
        for handle in handles:
            handle.remove()


def divergences(activations: Activations, states: list[list[Tensor]]) -> list[float]:
    """Return ``KL(first || other)`` in nats a token for all but the first of every row of ``states``, behind the last block.

    Raises:
        ValueError: the model returns no logits.
    """
    sums, tokens = torch.zeros(len(states[0]) - 1, dtype=torch.float64), 0
    for k, row in enumerate(states):
        batch = activations.batches[k]
        mask = activations.masks[k].reshape(batch["attention_mask"].shape)
        for sample in range(len(row[0])):  # one at a time: logits are large
            inputs, at = activations.to_device(batch, sample), mask[sample].to(activations.device)
            first = _logits(activations, row[0][sample : sample + 1], inputs, at)
            for number, other in enumerate(row[1:]):
                sums[number] += _divergence(first, _logits(activations, other[sample : sample + 1], inputs, at))
            tokens += int(at.sum())
    return [all_reduce_number(float(value)) / max(1, all_reduce_number(tokens)) for value in sums]


def _divergence(logits: Tensor, others: Tensor) -> float:
    """Return the sum over tokens of ``KL(softmax(logits) || softmax(others))``."""
    summed = 0.0
    for one, other in zip(logits.split(ROWS), others.split(ROWS), strict=True):
        first, log = one.float().log_softmax(-1), other.float().log_softmax(-1)
        summed += float((first.exp() * (first - log)).sum())
    return summed


def _logits(activations: Activations, states: Tensor, inputs: Batch, at: Tensor) -> Tensor:
    """Return the logits ``(tokens, vocabulary)`` of one sample at the tokens ``at``."""
    logits = getattr(activations.run_head(states, inputs), "logits", None)
    if logits is None:
        raise ValueError(
            f"divergences are of predictions, and {type(activations.model).__name__} makes none; load the model with its head, "
            "or take another allocation"
        )
    return logits[0] if bool(at.all()) else logits[0][at]
