"""Layer-wise error model search (LEMS): a measured error for every matrix, and an integer program over their ranks.

The error of matrix ``i`` in block ``b`` of ``B`` at rank ``r`` is modelled as

``e_i(r) = m_b  K_i  l_i(r) / l_i(r_0)``, ``m_b = 1 + GAMMA (B - 1 - b) / (B - 1)``

``l_i(r)``: local importance, the sum of the squared singular values beyond ``r`` in the metrics of inputs and outputs;
``K_i``: global importance, the measured Kullback-Leibler divergence of the model in which this matrix alone has rank
``r_0 = 0.1 mn / (m + n)``, in nats a token; ``m_b``: propagation, errors of early blocks grow on their way.
Ranks minimise ``sum_i e_i(r_i)`` within the budget, exactly.

Reference: Thoma et al., Advancing SVD-based LLM Compression via Layer-Wise Error Model Search, ICML 2026, and its code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenfold.baselines.knapsack import knapsack
from tenfold.compress.activations import Streams
from tenfold.compress.allocate import TradeoffCurve
from tenfold.compress.block import Block
from tenfold.compress.block_plan import BlockPlan
from tenfold.compress.blockwise import part_of
from tenfold.compress.calibration import Batch
from tenfold.compress.divergence import Correction, batches_with, divergences, through
from tenfold.compress.fit_actions import Fold
from tenfold.compress.progress import Phase, Progress
from tenfold.compress.tensor_store import TensorStore
from tenfold.models.config import Calibrate
from tenfold.models.distributed import shard_items

GAMMA = 5.0  # in the published configuration, with alpha 0
REFERENCE = 0.1  # the share of the whole cost at which the divergence is measured
LEAST = (0.3, 0.1)  # of its cost every matrix keeps, where half or more is kept in all, and where less is
TOKENS = 8192  # on which divergences are measured


def allocate(
    settings: Calibrate, curves: Sequence[TradeoffCurve], budget: float, influence: Mapping[str, float]
) -> dict[str, Any]:
    """Return ``{name: option}`` with the least sum of modelled errors; no item keeps less than the share ``LEAST``.

    Args:
        curves: with losses as :func:`measure` leaves them.
        budget: parameters of all items together.
    """
    least = LEAST[0] if budget >= 0.5 * sum(curve.whole for curve in curves) else LEAST[1]
    depth = propagation([curve.name for curve in curves])
    open_to = [curve.costs >= min(least * curve.whole, curve.costs[-1]) for curve in curves]
    if sum(curve.costs[some].min() for curve, some in zip(curves, open_to, strict=True)) > budget:
        open_to = [curve.costs > 0 for curve in curves]
    return knapsack([_part(*three) for three in zip(curves, open_to, depth, strict=True)], budget)


def _part(curve: TradeoffCurve, some: np.ndarray, factor: float) -> TradeoffCurve:
    """The options ``some`` of ``curve``, their losses times ``factor``."""
    options = [option for option, stays in zip(curve.options, some, strict=True) if stays]
    return TradeoffCurve(curve.name, curve.costs[some], factor * curve.losses[some], options)


def propagation(names: Sequence[str]) -> list[float]:
    """Return ``m_b`` for items by their paths, whose first number is that of the block."""
    blocks = [int(number[0]) if (number := re.search(r"\d+", name)) else 0 for name in names]
    last = max(blocks)
    return [1 + GAMMA * (last - block) / max(1, last) for block in blocks]


@torch.no_grad()
def measure(
    model: Any,
    works: list[BlockPlan],
    batches: list[Batch],
    settings: Calibrate,
    weights: Any,
    journal: Any,
    folder: Path | None,
    curves: list[TradeoffCurve],
    progress: Progress,
) -> None:
    """Scale the losses of every curve, in place, so that at ``REFERENCE`` they are what was measured there.

    A block is gone through once for every matrix in it and every block before it; the weights of one block are needed at a
    time. Divergences are means over about ``TOKENS`` tokens.

    Raises:
        ValueError: a rule does more than fold matrices one by one, or the model returns no logits.
    """
    some, steps = shard_items(part_of(batches, settings.survey)), journal.survey
    shelf = TensorStore(folder and folder / "measured")
    with weights.outside():
        streams = Streams(model, [work.path for work in works], some, shelf, settings.skip_first)
    still, open_ones = settings.model_copy(update={"refit": False}), {c.name: c for c in curves if c.settled is None}
    for number, work in enumerate(progress(works, Phase("divergences"))):

        def one(number: int, work: BlockPlan) -> dict[str, float]:
            with weights.at(work.path):
                block = Block(model, work.path, work.sites, streams, number, still, journal.matters(number), None)
                truncated = _truncated(work, block, open_ones)
                ways = [{}, *({path: correction} for path, correction in truncated.items())]
                count = batches_with(streams, TOKENS)
                states = [
                    [through(streams, number, streams.states(k)[0], k, way) for way in ways] for k in range(count)
                ]
            for later in range(number + 1, len(works)):
                with weights.at(works[later].path):
                    states = [[through(streams, later, x, k, {}) for x in row] for k, row in enumerate(states)]
            with weights.outside():
                return dict(zip(truncated, divergences(streams, states), strict=True))

        for path, divergence in steps.once(f"measured-{number}", partial(one, number, work)).items():
            _scale(open_ones[path], divergence)
        with weights.at(work.path):
            streams.advance(number)


def _at_reference(curve: TradeoffCurve) -> int:
    return max(0, int(np.searchsorted(curve.costs, REFERENCE * curve.whole, side="right")) - 1)


def _scale(curve: TradeoffCurve, divergence: float) -> None:
    loss = float(curve.losses[_at_reference(curve)])
    if loss > 0:
        curve.losses = curve.losses * (divergence / loss)


def _truncated(work: BlockPlan, block: Block, curves: dict[str, TradeoffCurve]) -> dict[str, Correction]:
    """``{path: (What - W, change of the bias)}`` at the reference of every item of the block that is not settled."""
    found = {}
    for action in work.actions:
        if not isinstance(action, Fold):
            raise ValueError(
                f"allocate lems measures matrices that are folded one by one, and {action.sites[0].path} is not; give it a plain "
                "rule, or another allocation"
            )
        curve = curves.get(action.site.path)
        if curve is not None:
            structure = curve.options[_at_reference(curve)]
            near = block.weight(curve.name) if structure is None else structure.dense(action.factors(block, structure))
            bias, new = block.bias(curve.name), block.new_bias(curve.name, near)
            found[curve.name] = near - block.weight(curve.name), None if bias is None else new - bias
    return found
