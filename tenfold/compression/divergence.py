"""Measured divergence of the predictions when matrices of one block are wrong, by running all blocks behind it.

Gradients estimate the loss of a small error. A larger one costs more where it passes a softmax, or comes out of matrices that
were chosen on the same tokens: 1.1 to 4 times as much as estimated on SmolLM2. At one size of every item the measured divergence
replaces the estimate, and scales the whole curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.compression.activations import Activations
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.weight_source import Weights
from tenfold.models.distributed import all_reduce_number, num_processes

Correction = tuple[Tensor, Tensor | None]  # What - W (out, in), and the change of the bias
ROWS = 128  # tokens whose distributions are in float32 at once
FAINT = 0.02  # scale at which an error moves the predictions by rounding only


class Trial(NamedTuple):
    """Items at one size, and the errors that this causes."""

    sizes: dict[str, Any]  # {name of a curve: option}
    corrections: dict[str, Correction]  # {path of a site: correction}


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
    batches, last = range(batches_with_tokens(activations, tokens)), len(activations.blocks)
    states = [activations.load(f"before-{number}-{k}") for k in batches]
    rows = [[_run_corrected(activations, number, x, k, some) for some in variants] for k, x in enumerate(states)]
    for later in range(number + 1, len(activations.blocks)):
        block = activations.blocks[later]
        with weights.at(activations.paths[later]):
            rows = [[activations.run_block(later, block, x, k) for x in row] for k, row in enumerate(rows)]
    with weights.outside():
        measured = divergences(activations, [activations.load(f"before-{last}-{k}") for k in batches], rows)
    rounding = measured[-1] if activations.bfloat16 else 0.0
    scaled = []
    for trial, nats in zip(trials, measured, strict=False):
        estimate = sum(
            float(curves[name].losses[curves[name].options.index(size)]) for name, size in trial.sizes.items()
        )
        nats = max(nats - rounding, nats / 4)
        if estimate > 0 and nats > 0:
            for name in trial.sizes:
                curves[name].losses = curves[name].losses * (nats / estimate)
            scaled += trial.sizes
    return scaled


def _run_corrected(
    activations: Activations, number: int, states: Tensor, batch: int, corrections: dict[str, Correction]
) -> Tensor:
    def hook(module: nn.Module, arguments: tuple, out: Tensor, path: str) -> Tensor:
        matrix, bias = corrections[path]
        change = arguments[0] @ matrix.T.to(arguments[0])
        return out + change if bias is None else out + change + bias.to(change)

    with ExitStack() as hooks:
        for path in corrections:
            module = activations.model.get_submodule(path)
            hooks.callback(module.register_forward_hook(partial(hook, path=path)).remove)
        return activations.run_block(number, activations.blocks[number], states, batch)


def batches_with_tokens(activations: Activations, tokens: int) -> int:
    """Return how many batches of this process hold about its part of ``tokens``; all, if these are fewer."""
    counts = np.cumsum([int(mask.sum()) for mask in activations.masks])
    return min(len(counts), int(np.searchsorted(counts, math.ceil(tokens / num_processes()))) + 1)


def divergences(activations: Activations, originals: list[Tensor], states: list[list[Tensor]]) -> list[float]:
    """Return ``KL(original || variant)`` in nats a token of every variant: states behind the last block, a row per batch."""
    sums, tokens = torch.zeros(len(states[0]), dtype=torch.float64), 0
    for k, (original, row) in enumerate(zip(originals, states, strict=True)):
        batch = activations.batches[k]
        mask = activations.masks[k].reshape(batch["attention_mask"].shape)
        for sample in range(len(original)):  # one at a time: logits are large
            inputs, at = activations.to_device(batch, sample), mask[sample].to(activations.device)
            logits = (activations.run_head(x[sample : sample + 1], inputs)[0][at] for x in [original, *row])
            first = next(logits)
            for number, other in enumerate(logits):
                sums[number] += _divergence(first, other)
            tokens += int(at.sum())
    return [all_reduce_number(float(value)) / max(1, all_reduce_number(tokens)) for value in sums]


def _divergence(logits: Tensor, others: Tensor) -> float:
    """Return the sum over tokens of ``KL(softmax(logits) || softmax(others))``."""
    summed = 0.0
    for one, other in zip(logits.split(ROWS), others.split(ROWS), strict=True):
        first, log = one.float().log_softmax(-1), other.float().log_softmax(-1)
        summed += float((first.exp() * (first - log)).sum())
    return summed
