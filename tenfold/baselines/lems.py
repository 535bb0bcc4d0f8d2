"""Layer-wise error model search (LEMS): a measured error for every matrix, and an integer program over their ranks.

The error of matrix ``i`` in block ``b`` of ``B`` at rank ``r`` is modelled as

``e_i(r) = m_b  K_i  l_i(r) / l_i(r_0)``, ``m_b = 1 + GAMMA (B - 1 - b) / (B - 1)``

``l_i(r)``: local importance, the sum of the squared singular values beyond ``r`` in the metrics of inputs and outputs;
``K_i``: global importance, the measured Kullback-Leibler divergence of the model in which this matrix alone has rank
``r_0 = 0.1 mn / (m + n)``, in nats a token; ``m_b``: propagation: errors of early blocks grow on their way through the model.
Ranks minimise ``sum_i e_i(r_i)`` within the budget, exactly.

Reference: Thoma et al., Advancing SVD-based LLM Compression via Layer-Wise Error Model Search, ICML 2026, and its code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.baselines.knapsack import solve_knapsack
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Block
from tenfold.compression.divergence import Trial
from tenfold.compression.fit_actions import FactorizeSite
from tenfold.models.config import Calibrate

GAMMA = 5.0  # in the published configuration, with alpha 0
REFERENCE = 0.1  # ratio of the whole cost at which the divergence is measured
LEAST = (0.3, 0.1)  # ratio that every matrix keeps, where half or more is kept in all, and where less is


def allocate_by_error_model(
    settings: Calibrate, curves: Sequence[TradeoffCurve], budget: float, influence: Mapping[str, float]
) -> dict[str, Any]:
    """Return ``{name: option}`` with the least sum of modelled errors; every item keeps at least the ratio ``LEAST``.

    Args:
        curves: with losses that are scaled to divergences, as by ``MeasuredSite``.
        budget: parameters of all items together.
    """
    least = LEAST[0] if budget >= 0.5 * sum(curve.whole for curve in curves) else LEAST[1]
    masks = [curve.costs >= min(least * curve.whole, curve.costs[-1]) for curve in curves]
    if sum(curve.costs[mask].min() for curve, mask in zip(curves, masks, strict=True)) > budget:
        masks = [curve.costs > 0 for curve in curves]
    modelled = []
    for curve, mask, factor in zip(curves, masks, propagation([curve.name for curve in curves]), strict=True):
        options = [option for option, allowed in zip(curve.options, mask, strict=True) if allowed]
        modelled.append(TradeoffCurve(curve.name, curve.costs[mask], factor * curve.losses[mask], options))
    return solve_knapsack(modelled, budget)


def propagation(names: Sequence[str]) -> list[float]:
    """Return ``m_b`` for items by their paths, whose first number is that of the block."""
    blocks = [int(number[0]) if (number := re.search(r"\d+", name)) else 0 for name in names]
    last = max(blocks)
    return [1 + GAMMA * (last - block) / max(1, last) for block in blocks]


class MeasuredSite(FactorizeSite):
    """One site in a structure; ``calibrate: {divergence: ..}`` measures it at the size ``REFERENCE``, alone."""

    def curves(self, block: Block) -> list[TradeoffCurve]:
        (curve,) = super().curves(block)
        self.reference = None if curve.settled else curve.options[curve.index_within(REFERENCE * curve.whole)]
        return [curve]

    def trials(self, block: Block, sizes: Mapping[str, Any]) -> list[Trial]:
        path, structure, bias = self.site.path, self.reference, block.bias(self.site.path)
        if structure is None:
            return []
        near = structure.dense(self.fit(block, structure))
        new = block.corrected_bias(path, near)
        shift = None if bias is None or new is None else new - bias
        return [Trial({path: structure}, path, (near - block.weight(path), shift), together=False)]
