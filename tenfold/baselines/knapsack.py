"""Multiple-choice knapsack: one option for every item, the least sum of losses within a budget.

``minimise sum_i loss_i(k_i)  subject to  sum_i cost_i(k_i) <= budget``, by dynamic programming over the cost. Unlike the Lagrange
multiplier of ``tenfold.compression.allocation.allocate_by_loss`` it reaches options inside the convex hull of a curve, too.

Reference: Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tenfold.compression.allocation import TradeoffCurve, spend_rest

GRID = 50_000  # steps of the cost
OPTIONS = 128  # of one item; of more, so many evenly spaced ones are tried


def solve_knapsack(curves: Sequence[TradeoffCurve], budget: float) -> dict[str, Any]:
    """Return ``{name: option}`` with the least sum of losses at a cost of at most ``budget``.

    Exact where the costs are whole numbers, no item has more than ``OPTIONS`` options, and at most ``GRID`` is left above the
    least that all items cost; otherwise costs are rounded up to ``1 / GRID`` of that. The rest of the budget is spent greedily.

    Args:
        curves: with known losses, which never rise with the cost.
        budget: in the unit of the costs.

    Raises:
        ValueError: the least that all items together can cost is above the budget.
    """
    spare = budget - sum(float(curve.costs[0]) for curve in curves)
    if spare < 0:
        raise ValueError(f"the items can't be made smaller than {budget - spare:,.0f}, but {budget:,.0f} is to be kept")
    unit = max(1.0, spare / GRID)
    room = int(spare / unit)
    best, picks = (
        np.zeros(room + 1),
        [],
    )  # best[c]: the least loss of the items so far for at most c units above their least
    for curve in curves:
        tried = np.unique(np.linspace(0, len(curve.costs) - 1, OPTIONS).round().astype(int))
        least, pick = np.full(room + 1, np.inf), np.zeros(room + 1, np.int32)
        for k in tried:
            more = int(np.ceil((curve.costs[k] - curve.costs[0]) / unit - 1e-9))
            if more > room:
                break
            loss = best[: room + 1 - more] + curve.losses[k]
            better = loss < least[more:]
            least[more:][better], pick[more:][better] = loss[better], k
        best = least
        picks.append(pick)
    chosen, left = [], room
    for curve, pick in zip(reversed(curves), reversed(picks), strict=True):
        k = int(pick[left])
        chosen.append(k)
        left -= int(np.ceil((curve.costs[k] - curve.costs[0]) / unit - 1e-9))
    chosen = spend_rest(curves, chosen[::-1], budget)
    return {curve.name: curve.options[k] for curve, k in zip(curves, chosen, strict=True)}
