"""Allocation: under one budget for all, how much every item may keep so that the losses add up to the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Curve:
    """What one item can become: option ``k`` costs ``costs[k]`` parameters and about ``losses[k]`` nats a token.

    Args:
        name: of the item, unique.
        options: what is chosen; the last one is the item as it is.
    """

    name: str
    costs: np.ndarray
    losses: np.ndarray
    options: Sequence[Any]

    def __post_init__(self):
        self.whole = int(self.costs[-1])  # parameters of the item as it is
        order = np.lexsort((self.losses, self.costs))
        best, kept = np.inf, []
        for k in order:  # an option that is dearer and no better than another is none
            if self.losses[k] < best:
                best = self.losses[k]
                kept.append(k)
        self.costs, self.losses = np.asarray(self.costs)[kept], np.maximum(np.asarray(self.losses)[kept], 0.0)
        self.options = [self.options[k] for k in kept]


def allocate(curves: Sequence[Curve], budget: float) -> dict[str, Any]:
    """``{name: option}`` with the least sum of losses that Lagrange finds at a cost of at most ``budget``, then filled up.

    The first step is optimal for its own cost; what it leaves of the budget goes to the items that gain most per
    parameter. Deterministic.

    Raises:
        ValueError: the least that all items together can cost is above the budget.
    """
    least = sum(int(curve.costs[0]) for curve in curves)
    if least > budget:
        raise ValueError(
            f"the items can't be made smaller than {least:,} parameters, but {int(budget):,} are to be kept"
        )
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2 if low == 0 and high < 1e-30 else np.sqrt(max(low, 1e-40) * high)
        chosen = [_at(curve, middle) for curve in curves]
        low, high = (low, middle) if _cost(curves, chosen) <= budget else (middle, high)
    chosen = _filled(curves, [_at(curve, high) for curve in curves], budget)
    return {curve.name: curve.options[k] for curve, k in zip(curves, chosen, strict=True)}


def _at(curve: Curve, price: float) -> int:
    return int(np.argmin(curve.losses + price * curve.costs))


def _cost(curves: Sequence[Curve], chosen: Sequence[int]) -> int:
    return sum(int(curve.costs[k]) for curve, k in zip(curves, chosen, strict=True))


def _filled(curves: Sequence[Curve], chosen: list[int], budget: float) -> list[int]:
    left = budget - _cost(curves, chosen)
    while True:
        gains = []
        for number, (curve, k) in enumerate(zip(curves, chosen, strict=True)):
            more = np.arange(k + 1, len(curve.costs))
            more = more[curve.costs[more] - curve.costs[k] <= left]
            for j in more:
                gain = (curve.losses[k] - curve.losses[j]) / (curve.costs[j] - curve.costs[k])
                gains.append((gain, -number, int(j)))
        if not gains:
            return chosen
        _, number, j = max(gains)
        left -= curves[-number].costs[j] - curves[-number].costs[chosen[-number]]
        chosen[-number] = j


def uniform(curves: Sequence[Curve], keep: float) -> dict[str, Any]:
    """``{name: option}``: the dearest option within ``keep`` of every item's whole cost."""
    chosen = {}
    for curve in curves:
        fitting = np.flatnonzero(curve.costs <= keep * curve.whole)
        chosen[curve.name] = curve.options[int(fitting[-1]) if len(fitting) else 0]
    return chosen
