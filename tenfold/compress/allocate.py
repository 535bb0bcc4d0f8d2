"""Allocation: under one budget for all, how much every item may keep so that the losses add up to the least.

The baselines have equal shares for all items, or shares by block (:mod:`tenfold.compress.block_influence`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.structure import Structure


@dataclass
class TradeoffCurve:
    """What one item can become: option ``k`` costs ``costs[k]`` parameters and about ``losses[k]`` nats a token.

    Args:
        name: of the item, unique.
        losses: NaN where nothing asks for them; such options are all kept.
        options: what is chosen; the last one is the item as it is.
        within: ``(out, in, fields)`` of the structure whose sizes the options are, where there are more than are listed.
        products: multiply-adds a token, where they are not the parameters.
        indices: whole numbers that are stored beside the parameters, where there are any.
        calls: how often it runs for one token; an expert, less than once.
        settled: how many parameters the item has as it is, where its rule alone says what it becomes; no budget counts it.
    """

    name: str
    costs: np.ndarray
    losses: np.ndarray
    options: Sequence[Any]
    within: tuple[int, int, dict[str, Any]] | None = None
    settled: int | None = None
    products: np.ndarray | None = None
    indices: np.ndarray | None = None
    calls: float = 1

    def __post_init__(self):
        products = np.asarray(self.costs if self.products is None else self.products)
        indices = np.zeros(len(products), int) if self.indices is None else np.asarray(self.indices)
        self.whole = int(self.costs[-1]) if self.settled is None else self.settled  # parameters of the item as it is
        self.whole_products = int(products[-1])
        order = np.lexsort((self.losses, self.costs))
        best, kept = np.inf, []
        for k in order:  # an option that is dearer and no better than another is none
            if not self.losses[k] >= best:
                best = min(best, self.losses[k])
                kept.append(k)
        self.costs, self.losses = np.asarray(self.costs)[kept], np.maximum(np.asarray(self.losses)[kept], 0.0)
        self.options, self.products, self.indices = [self.options[k] for k in kept], products[kept], indices[kept]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        numbers = {name: getattr(self, name).tolist() for name in ("costs", "losses", "products", "indices")}
        options = [option.to_json() if isinstance(option, Structure) else option for option in self.options]
        whole = [self.whole, self.whole_products]
        plain = {"name": self.name, "within": self.within, "settled": self.settled, "calls": self.calls, "whole": whole}
        return plain | numbers | {"options": options}

    @staticmethod
    def from_json(plain: dict[str, Any]) -> TradeoffCurve:
        """What :meth:`to_json` gave."""
        whole, rest = plain["whole"], {name: value for name, value in plain.items() if name != "whole"}
        made = TradeoffCurve(
            **rest | {name: np.array(plain[name]) for name in ("costs", "losses", "products", "indices")}
        )
        made.options = [Structure.from_json(option) if isinstance(option, dict) else option for option in made.options]
        made.whole, made.whole_products = whole
        return made

    def fitting(self, cost: float) -> int:
        """The number of the dearest option of at most ``cost`` parameters, the first one if there is none.

        It joins the list if it was not there; its loss is estimated from those of its neighbours.
        """
        k = max(0, int(np.searchsorted(self.costs, cost, side="right")) - 1)
        if self.within is None or cost >= self.whole:
            return k
        try:
            option = Structure.within(*self.within, cost)
        except ValueError:
            return k
        if option.numel <= self.costs[k]:
            return k
        loss = np.interp(option.numel, self.costs, self.losses)
        self.costs, self.losses = np.insert(self.costs, k + 1, option.numel), np.insert(self.losses, k + 1, loss)
        self.options = [*self.options[: k + 1], option, *self.options[k + 1 :]]
        self.products = np.insert(self.products, k + 1, option.numel)
        self.indices = np.insert(self.indices, k + 1, option.index_numel)
        return k + 1


def allocate(curves: Sequence[TradeoffCurve], budget: float) -> dict[str, Any]:
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
    slopes = [-np.diff(curve.losses) / np.diff(curve.costs) for curve in curves]
    low, high = (
        0.0,
        2 * max([1.0, *(float(slope.max()) for slope in slopes if len(slope))]),
    )  # there all are at their least
    for _ in range(200):
        middle = (low + high) / 2 if low == 0 and high < 1e-30 else np.sqrt(max(low, 1e-40) * high)
        chosen = [_at(curve, middle) for curve in curves]
        low, high = (low, middle) if _cost(curves, chosen) <= budget else (middle, high)
    chosen = filled(curves, [_at(curve, high) for curve in curves], budget)
    return {curve.name: curve.options[k] for curve, k in zip(curves, chosen, strict=True)}


def _at(curve: TradeoffCurve, price: float) -> int:
    return int(np.argmin(curve.losses + price * curve.costs))


def _cost(curves: Sequence[TradeoffCurve], chosen: Sequence[int]) -> int:
    return sum(int(curve.costs[k]) for curve, k in zip(curves, chosen, strict=True))


def filled(curves: Sequence[TradeoffCurve], chosen: list[int], budget: float) -> list[int]:
    """Give what the options ``chosen``, by their numbers, leave of ``budget`` to the items that gain most per parameter."""
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


def uniform(curves: Sequence[TradeoffCurve], keep: float) -> dict[str, Any]:
    """``{name: option}``: the dearest option within ``keep`` of every item's whole cost."""
    chosen = {}
    for curve in curves:
        fitting = np.flatnonzero(curve.costs <= keep * curve.whole)
        chosen[curve.name] = curve.options[int(fitting[-1]) if len(fitting) else 0]
    return chosen


def by_shares(curves: Sequence[TradeoffCurve], shares: Mapping[str, float]) -> dict[str, Any]:
    """``{name: option}``: the dearest option within the share of every item's whole cost.

    What rounding leaves of one item goes to the next, so that all together are within one step of their budget.
    """
    chosen, left = {}, 0.0
    for curve in sorted(curves, key=lambda curve: -curve.costs[0] / curve.whole):  # those that can't shrink spend first
        allowed = shares[curve.name] * curve.whole + left
        k = curve.fitting(allowed)
        chosen[curve.name], left = curve.options[k], allowed - float(curve.costs[k])
    return chosen


def equal_shares(curves: Sequence[TradeoffCurve], budget: float) -> dict[str, Any]:
    """Every item keeps the same share of its parameters."""
    share = budget / max(1, sum(curve.whole for curve in curves))
    return by_shares(curves, {curve.name: share for curve in curves})
