"""Measured divergence of the predictions when matrices are wrong: those of one block, and then those of all blocks together.

Gradients estimate the loss of a small error. A larger one costs more where it passes a softmax, or comes out of matrices that
were chosen on the same tokens: 1.1 to 4 times as much as estimated on SmolLM2. At one size of every item the measured divergence
replaces the estimate, and scales the whole curve. Then the errors of all blocks are tried together, role by role: any one block
can spare a head whose work others do, but not all blocks can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    """Items at one size, and the error of a site that this causes."""

    sizes: dict[str, Any]  # {name of a curve: option}
    path: str  # of the site
    correction: Correction
    together: bool = True  # whether all blocks are tried together, too


@torch.no_grad()
def measure_trials(
    trials: Sequence[Trial], activations: Activations, weights: Weights, number: int, tokens: int
) -> list[float]:
    """Return the divergence of the predictions in nats a token of every trial of block ``number``.

    Args:
        activations: with the states in front of the block, whose weights are loaded, and behind the last one.
        tokens: about how many to measure on.
    """
    variants = [{trial.path: trial.correction} for trial in trials]
    variants += [_faint(variants[0])] if activations.bfloat16 else []
    batches, states = range(batches_with_tokens(activations, tokens)), list[list[Tensor]]()
    for k in batches:
        before = activations.load(f"before-{number}-{k}")
        states.append([_run_corrected(activations, number, before, k, some) for some in variants])
    for later in range(number + 1, len(activations.blocks)):
        block = activations.blocks[later]
        with weights.at(activations.paths[later]):
            states = [[activations.run_block(later, block, x, k) for x in row] for k, row in enumerate(states)]
    with weights.outside():
        return _without_rounding(activations, states)


@torch.no_grad()
def measure_together(
    corrections: Callable[[int], list[dict[str, Correction]]], activations: Activations, weights: Weights, tokens: int
) -> list[float]:
    """Return the divergences when the matrices of all blocks are wrong at once.

    Args:
        corrections: returns the errors of a block in every variant that is measured.
        activations: with the states in front of the first block and behind the last one.
    """
    batches = range(batches_with_tokens(activations, tokens))
    states = [[activations.load(f"before-0-{k}")] for k in batches]
    for number, path in enumerate(activations.paths):
        with weights.at(path):
            variants = corrections(number)
            variants += [_faint(variants[-1])] if activations.bfloat16 else []
            states = [
                [
                    _run_corrected(activations, number, x, k, some)
                    for x, some in zip(row * (len(variants) // len(row)), variants, strict=True)
                ]
                for k, row in enumerate(states)
            ]
    with weights.outside():
        return _without_rounding(activations, states)


def scale_curves(curves: dict[str, TradeoffCurve], sizes: Mapping[str, Any], nats: float) -> bool:
    """Scale ``curves``, in place, so that their losses at ``sizes`` add up to ``nats``; return whether that can be."""
    estimate = sum(float(curves[name].losses[curves[name].options.index(size)]) for name, size in sizes.items())
    if not (estimate > 0 and nats > 0):
        return False
    for name in sizes:
        curves[name].losses = curves[name].losses * (nats / estimate)
    return True


def _faint(corrections: dict[str, Correction]) -> dict[str, Correction]:
    return {p: (FAINT * m, None if b is None else FAINT * b) for p, (m, b) in corrections.items()}


def _without_rounding(activations: Activations, states: list[list[Tensor]]) -> list[float]:
    """Return the divergences of all variants but that of a faint error, in bfloat16 the last one, which is taken from them."""
    last = len(activations.blocks)
    originals = [activations.load(f"before-{last}-{k}") for k in range(len(states))]
    measured = divergences(activations, originals, states)
    rounding = measured.pop() if activations.bfloat16 else 0.0
    return [max(nats - rounding, nats / 4) for nats in measured]


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
                sums[number] += divergence(first, other)
            tokens += int(at.sum())
    return [all_reduce_number(float(value)) / max(1, all_reduce_number(tokens)) for value in sums]


def divergence(logits: Tensor, others: Tensor) -> float:
    """Return the sum over tokens of ``KL(softmax(logits) || softmax(others))``."""
    summed = 0.0
    for one, other in zip(logits.split(ROWS), others.split(ROWS), strict=True):
        first, log = one.float().log_softmax(-1), other.float().log_softmax(-1)
        summed += float((first.exp() * (first - log)).sum())
    return summed
