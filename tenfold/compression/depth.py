"""Loss of a model without some of its blocks, measured forward: a greedy order in which they go.

In each round every candidate is left out in turn, and the one without which the predictions differ least goes:
``KL(original || without)`` in nats a token. Candidates of later rounds are the best of the first.

Reference: SLEB, arXiv 2402.09025 (greedy choice with measuring anew, there by perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tenfold.compression.activations import Activations
from tenfold.compression.divergence import batches_with_tokens, divergences
from tenfold.compression.progress import Progress, no_progress
from tenfold.compression.weight_source import Weights

CANDIDATES = 10  # of the rounds after the first


@torch.no_grad()
def measure_removals(
    activations: Activations,
    weights: Weights,
    tokens: int,
    sizes: list[float],
    excess: float,
    limit: float = math.inf,
    progress: Progress = no_progress,
) -> list[tuple[int, float]]:
    """Return ``(number of a block, nats a token without it and those before it)`` in the order in which blocks go.

    Args:
        activations: in front of the first block.
        tokens: about how many to measure on.
        sizes: of every block.
        excess: the order ends when the blocks that are gone have this size; one block stays.
        limit: of the loss, at which it ends, too.
        progress: wraps the blocks of every round.
    """
    count = batches_with_tokens(activations, tokens)
    left, order = list(range(len(sizes))), list[tuple[int, float]]()
    candidates, ranking, original = left, [], None
    while excess > 0 and len(left) > 1:
        blocks = progress(left, f"depth, round {len(order) + 1}")
        last, without = _run_without_each(activations, weights, blocks, candidates, count)
        original = original or last
        with weights.outside():
            rows = [[without[number][k] for number in candidates] for k in range(count)]
            losses = dict(zip(candidates, divergences(activations, original, rows), strict=True))
        ranking = ranking or sorted(candidates, key=losses.__getitem__)
        gone = min(candidates, key=losses.__getitem__)
        if losses[gone] > limit:
            break
        order.append((gone, losses[gone]))
        left = [number for number in left if number != gone]
        candidates, excess = [number for number in ranking if number in left][:CANDIDATES], excess - sizes[gone]
    return order


def _run_without_each(
    activations: Activations, weights: Weights, left: Iterable[int], candidates: list[int], count: int
) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
    """Return the last states of the blocks ``left``, per batch, and those without each of ``candidates``."""
    states = [activations.states(k)[0] for k in range(count)]
    without: dict[int, list[Tensor]] = {}
    for number in left:
        with weights.at(activations.paths[number]):
            block, before = activations.blocks[number], states
            without = {
                gone: [activations.run_block(number, block, x, k) for k, x in enumerate(some)]
                for gone, some in without.items()
            }
            states = [activations.run_block(number, block, x, k) for k, x in enumerate(states)]
        if number in candidates:
            without[number] = before
    return states, without
