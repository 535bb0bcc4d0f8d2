"""Allocation of one budget to all items, so that their losses add up to the least.

``ALLOCATORS`` holds the allocations that a recipe may name; ``tenfold.baselines`` adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenfold.models.config import Calibrate
from tenfold.models.sites import Site
from tenfold.structure import Structure

ARRAYS = ("costs", "losses", "products", "indices")


@dataclass
class TradeoffCurve:
    """Options of one item: option ``k`` costs ``costs[k]`` parameters and about ``losses[k]`` nats a token.

    Options that cost more than another one and lose no less are removed.

    Args:
        name: of the item, unique.
        losses: NaN where no loss is needed; such options all stay.
        options: the values to choose from; the last one leaves the item as it is.
        within: ``(out, in, fields)`` of the structure whose sizes the options are, where more sizes exist than are listed.
        settled: the rule alone decides what the item becomes; no budget counts it.
        products: multiply-adds per token; the parameters unless given.
        indices: integers stored beside the parameters; none unless given.
        tied: kind of the item; where shapes are stock, all items of a kind get the same option.
        calls: how often the item runs per token; less than once for an expert.
        whole: parameters of the item as it is; those of the last option unless given.
        whole_products: multiply-adds per token of the item as it is; likewise.
    """

    name: str
    costs: np.ndarray
    losses: np.ndarray
    options: Sequence[Any]
    within: tuple[int, int, dict[str, Any]] | None = None
    settled: bool = False
    products: np.ndarray = field(default_factory=lambda: np.array([]))
    indices: np.ndarray = field(default_factory=lambda: np.array([]))
    calls: float = 1
    tied: str = ""
    whole: float = 0
    whole_products: float = 0

    def __post_init__(self):
        costs, losses = np.asarray(self.costs), np.asarray(self.losses)
        products = self.products if len(self.products) else costs
        indices = self.indices if len(self.indices) else np.zeros(len(products), int)
        self.whole = self.whole or int(costs[-1])
        self.whole_products = self.whole_products or (self.whole if self.settled else int(products[-1]))
        best, kept = np.inf, []
        for k in np.lexsort((losses, costs)):
            if not losses[k] >= best:
                best = min(best, losses[k])
                kept.append(k)
        self.costs, self.losses = costs[kept], np.maximum(losses[kept], 0.0)
        self.options, self.products, self.indices = [self.options[k] for k in kept], products[kept], indices[kept]

    @staticmethod
    def settle(site: Site, structure: Structure | None, shared: int = 0) -> TradeoffCurve:
        """Return the curve of a site that becomes ``structure`` (None: it stays); ``shared`` elements count elsewhere."""
        whole = site.shape[0] * site.shape[1]
        numel, indices = (whole, 0) if structure is None else (structure.numel, structure.index_numel)
        costs, given = np.array([numel - shared]), {"indices": np.array([indices]), "calls": site.calls}
        return TradeoffCurve(site.path, costs, np.array([0.0]), [structure], settled=True, whole=whole, **given)

    def to_json(self) -> dict[str, Any]:
        """Return the curve as plain data."""
        options = [option.to_json() if isinstance(option, Structure) else option for option in self.options]
        return vars(self) | {name: getattr(self, name).tolist() for name in ARRAYS} | {"options": options}

    @staticmethod
    def from_json(plain: dict[str, Any]) -> TradeoffCurve:
        """Return the curve that ``to_json`` wrote."""
        options = [Structure.from_json(option) if isinstance(option, dict) else option for option in plain["options"]]
        changed: dict[str, Any] = plain | {name: np.array(plain[name]) for name in ARRAYS} | {"options": options}
        return TradeoffCurve(**changed)

    def scale(self, share: float) -> TradeoffCurve:
        """Return the curve with costs and losses times ``share``."""
        return TradeoffCurve(self.name, share * self.costs, share * self.losses, self.options)

    def describe(self, option: Any, unit: str) -> dict[str, Any]:
        """Return what choosing ``option`` means: its cost and its loss in ``unit``, None where the rule alone decides."""
        k = next(k for k, other in enumerate(self.options) if other is option or other == option)
        return {
            "item": self.name,
            "chosen": option.to_json() if isinstance(option, Structure) else option,
            "parameters": int(self.costs[k]),
            "of": self.whole,
            "loss": None if self.settled or np.isnan(self.losses[k]) else float(self.losses[k]),
            "unit": unit,
        }

    def index_within(self, cost: float) -> int:
        """Return the index of the most expensive option of at most ``cost`` parameters, 0 if there is none."""
        return max(0, int(np.searchsorted(self.costs, cost, side="right")) - 1)

    def add_within(self, cost: float) -> int:
        """Return ``index_within`` among all sizes of the structure, adding the option if it is not listed yet.

        The loss of a new option is interpolated.
        """
        k = self.index_within(cost)
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


def allocate_by_loss(curves: Sequence[TradeoffCurve], budget: float) -> dict[str, Any]:
    """Return ``{name: option}`` with the least sum of losses that a Lagrange multiplier finds at a cost within ``budget``.

    That choice is optimal for its own cost; the rest of the budget is spent greedily. Deterministic.

    Raises:
        ValueError: the cheapest options together cost more than the budget.
    """
    least = sum(int(curve.costs[0]) for curve in curves)
    if least > budget:
        raise ValueError(
            f"the items can't be made smaller than {least:,} parameters, but {int(budget):,} are to be kept"
        )
    slopes = [-np.diff(curve.losses) / np.diff(curve.costs) for curve in curves]

    def cheapest(price: float) -> list[int]:
        return [int(np.argmin(curve.losses + price * curve.costs)) for curve in curves]

    # at the highest price every item takes its cheapest option
    low, high = 0.0, 2 * max([1.0, *(float(slope.max()) for slope in slopes if len(slope))])
    for _ in range(200):
        middle = (low + high) / 2 if low == 0 and high < 1e-30 else np.sqrt(max(low, 1e-40) * high)
        low, high = (low, middle) if _total_cost(curves, cheapest(middle)) <= budget else (middle, high)
    chosen = spend_rest(curves, cheapest(high), budget)
    return {curve.name: curve.options[k] for curve, k in zip(curves, chosen, strict=True)}


def _total_cost(curves: Sequence[TradeoffCurve], chosen: Sequence[int]) -> int:
    return sum(int(curve.costs[k]) for curve, k in zip(curves, chosen, strict=True))


def spend_rest(curves: Sequence[TradeoffCurve], chosen: list[int], budget: float) -> list[int]:
    """Spend what the option indices ``chosen`` leave of ``budget`` where a parameter gains most; return the new indices."""
    left = budget - _total_cost(curves, chosen)
    while True:
        gains = []
        for number, (curve, k) in enumerate(zip(curves, chosen, strict=True)):
            more = np.arange(k + 1, len(curve.costs))
            for j in more[curve.costs[more] - curve.costs[k] <= left]:
                gain = (curve.losses[k] - curve.losses[j]) / (curve.costs[j] - curve.costs[k])
                gains.append((gain, -number, int(j)))
        if not gains:
            return chosen
        _, number, j = max(gains)
        left -= curves[-number].costs[j] - curves[-number].costs[chosen[-number]]
        chosen[-number] = j


def allocate_by_ratios(curves: Sequence[TradeoffCurve], ratios: Mapping[str, float]) -> dict[str, Any]:
    """Return ``{name: option}``: the most expensive option within the ratio of every item's whole cost.

    What rounding leaves of one item goes to the next, so that the total is within one step of the budget.
    """
    chosen, left = {}, 0.0
    for curve in sorted(curves, key=lambda curve: -curve.costs[0] / curve.whole):  # those that can't shrink spend first
        allowed = ratios[curve.name] * curve.whole + left
        k = curve.add_within(allowed)
        chosen[curve.name], left = curve.options[k], allowed - float(curve.costs[k])
    return chosen


# name -> (settings, curves, parameters that may stay, influence of every block) -> {name of an item: option}
ALLOCATORS: dict[str, Callable[[Calibrate, Sequence[TradeoffCurve], float, Mapping[str, float]], dict[str, Any]]] = {
    "sensitivity": lambda settings, curves, budget, influence: allocate_by_loss(curves, budget),
    "uniform": lambda settings, curves, budget, influence: allocate_by_ratios(
        curves, dict.fromkeys((curve.name for curve in curves), budget / max(1, sum(curve.whole for curve in curves)))
    ),
}
