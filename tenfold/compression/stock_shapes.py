"""Allocation of a budget to shapes that a plain configuration says: one MLP width, as many heads everywhere, fewer blocks.

With ``m_b(w)`` and ``a_b(h)`` the losses of block ``b`` when its MLP keeps ``w`` hidden units and its attention ``h`` groups of
heads, and ``d(k)`` that of the model without the first ``k`` blocks in the order in which they go, it minimises

    ``d(k) + sum over the blocks that are left of m_b(w) + a_b(h)``

within the budget, over all ``k``, ``w`` and ``h``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tenfold.compression.actions import BlockPlan
from tenfold.compression.allocation import TradeoffCurve, allocate_by_loss
from tenfold.compression.budget import unit_of
from tenfold.models.recipe import Budget
from tenfold.models.stock import stock_head_counts

DROPPED = "dropped"  # what becomes of a block that goes


class NoStockShapes(ValueError):
    """Raised with the least cost that stock shapes have."""


@dataclass
class StockShapes:
    """Shapes that were chosen.

    Args:
        options: ``{kind of item: option}``, the same in all blocks that are left.
        dropped: paths of the blocks that go, in their order.
        loss: foreseen, in nats a token.
        cost: of the items and blocks together.
    """

    options: dict[str, int]
    dropped: list[str]
    loss: float
    cost: float


def choose_stock_shapes(
    curves: Sequence[TradeoffCurve],
    allowed: Mapping[str, Sequence[int]],
    blocks: Mapping[str, float],
    removals: Sequence[tuple[str, float]],
    budget: float,
) -> StockShapes:
    """Return the shapes of least loss whose cost is within ``budget``.

    Args:
        curves: of items whose ``tied`` names their kind; the path of an item begins with that of its block.
        allowed: ``{kind: options}`` that a configuration can say.
        blocks: ``{path: cost}`` of the whole blocks.
        removals: paths of blocks in the order in which they go, with the loss once they are gone.
        budget: what the blocks may cost.

    Raises:
        NoStockShapes: none fit.
    """
    of_block = {path: [curve for curve in curves if curve.name.startswith(f"{path}.")] for path in blocks}
    kinds = sorted(allowed)
    best, least = None, float("inf")
    for count in range(len(removals) + 1):
        dropped, loss = [path for path, _ in removals[:count]], removals[count - 1][1] if count else 0.0
        left = [path for path in blocks if path not in dropped]
        whole = sum(blocks[path] for path in left)
        tables = {
            kind: _sum_curves([c for p in left for c in of_block[p] if c.tied == kind], allowed[kind]) for kind in kinds
        }
        for options in product(*(range(len(allowed[kind])) for kind in kinds)):
            saved = sum(tables[kind][0][k] for kind, k in zip(kinds, options, strict=True))
            lost = loss + sum(tables[kind][1][k] for kind, k in zip(kinds, options, strict=True))
            least = min(least, whole - saved)
            if whole - saved <= budget and (best is None or lost < best.loss):
                chosen = {kind: allowed[kind][k] for kind, k in zip(kinds, options, strict=True)}
                best = StockShapes(chosen, dropped, float(lost), float(whole - saved))
    if best is None:
        raise NoStockShapes(least)
    return best


def _sum_curves(curves: Sequence[TradeoffCurve], options: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return what every option saves and loses, summed over ``curves``; between two sizes the loss of the smaller one counts."""
    saved, lost = np.zeros(len(options)), np.zeros(len(options))
    for curve in curves:
        saved += curve.whole * (1 - np.array(options) / _full(curve))
        lost += [_loss_at(curve, option) for option in options]
    return saved, lost


def _loss_at(curve: TradeoffCurve, option: int) -> float:
    return float(curve.losses[_index_at(curve, option)])


def _index_at(curve: TradeoffCurve, option: int) -> int:
    return curve.index_within(curve.whole * option / _full(curve) + 0.5)


def _full(curve: TradeoffCurve) -> int:
    """Return the option that leaves the item as it is, which is not listed where a smaller one loses nothing."""
    return round(curve.whole * curve.options[0] / curve.costs[0])


def choose_stock(
    model: PreTrainedModel,
    budget: Budget,
    plans: Sequence[BlockPlan],
    curves: Sequence[TradeoffCurve],
    measure_depth: Callable[[list[float], float, float], list[tuple[int, float]]],
) -> tuple[dict[str, Any], list[TradeoffCurve], dict[str, dict[str, Any]]]:
    """Return what every item and every block that goes becomes, ``{name: option}``, their curves, and what they are.

    These are ``{name: {"kind": .., "size": .., "of": .., "free": ..}}``: ``free`` is the loss where every block has widths of its
    own within the same budget, None where these can't meet it.

    Args:
        measure_depth: called with the cost of every block, what must go, and the loss at which it is no longer of use; returns
            numbers of blocks in the order in which they go, with the loss once each is gone.

    Raises:
        ValueError: an item has no stock shapes, or none fit the budget.
    """
    if other := next((curve.name for curve in curves if not curve.tied), None):
        raise ValueError(
            f"{other} has no stock shapes: a recipe of shapes: stock has rules that prune mlp and heads only"
        )
    unit = unit_of(model, budget)
    sizes = {plan.path: unit.block_cost(plan.path, plan.sites) for plan in plans}
    everything = sum(sizes.values())
    total = everything if budget.of == "sites" else unit.total(budget.of)
    excess = (1 - budget.keep) * total
    allowed = {kind: _allowed(model, budget, kind, curves) for kind in sorted({curve.tied for curve in curves})}
    costs = [unit.convert(one) for one in curves]
    budgeted, limit = everything - excess, float("inf")
    with suppress(NoStockShapes):  # once blocks that are gone lose more than this, no mix with them can be the best
        limit = choose_stock_shapes(costs, allowed, sizes, [], budgeted).loss
    removals = [(plans[number].path, loss) for number, loss in measure_depth(list(sizes.values()), excess, limit)]
    try:
        shapes = choose_stock_shapes(costs, allowed, sizes, removals, budgeted)
    except NoStockShapes as reason:
        least = reason.args[0] + total - everything
        raise ValueError(
            f"keep {budget.keep} of the {budget.of} can't be met by stock shapes: the smallest have {least:,.0f} {unit.name} "
            f"(keep {least / total:.3f}); keep more, or take free shapes"
        ) from None
    chosen: dict[str, Any] = dict.fromkeys(shapes.dropped, DROPPED)
    found, about, before = [], {}, 0.0
    free = _losses_of_free_widths(costs, sum(one.whole for one in costs) - excess)
    for path, loss in removals[: len(shapes.dropped)]:
        found.append(TradeoffCurve(path, np.zeros(1), np.array([loss - before]), [DROPPED], whole=sizes[path]))
        inside = [loss for name, loss in free.items() if name.startswith(f"{path}.")]
        about[path] = {"kind": "block", "size": 0, "of": 1, "free": sum(inside) if free else None}
        before = loss
    for curve in curves:
        if not curve.name.startswith(tuple(f"{path}." for path in shapes.dropped)):
            option = chosen[curve.name] = shapes.options[curve.tied]
            cost, loss = curve.whole * option / _full(curve), _loss_at(curve, option)
            found.append(TradeoffCurve(curve.name, np.array([cost]), np.array([loss]), [option], whole=curve.whole))
            about[curve.name] = {"kind": curve.tied, "size": option, "of": _full(curve), "free": free.get(curve.name)}
    return chosen, found, about


def expect_stock_sizes(
    model: PreTrainedModel, budget: Budget, paths: Sequence[str], curves: Sequence[TradeoffCurve], saved: float
) -> dict[str, Any]:
    """Return ``{name: option}``: the stock sizes that would save so much if there were no other items.

    A kind that would stay whole has its next smaller size, so that its loss is measured, too.

    Args:
        paths: of the blocks.
    """
    allowed = {kind: _allowed(model, budget, kind, curves) for kind in sorted({curve.tied for curve in curves})}
    blocks = {path: float(sum(c.whole for c in curves if c.name.startswith(f"{path}."))) for path in paths}
    try:
        options = choose_stock_shapes(curves, allowed, blocks, [], sum(blocks.values()) - saved).options
    except NoStockShapes:
        options = {kind: sizes[0] for kind, sizes in allowed.items()}
    sizes = {kind: min(option, allowed[kind][-2:][0]) for kind, option in options.items()}
    return {curve.name: curve.options[_index_at(curve, sizes[curve.tied])] for curve in curves}


def _losses_of_free_widths(curves: Sequence[TradeoffCurve], budget: float) -> dict[str, float]:
    """Return ``{name: loss}`` where every item has a size of its own, nothing where that can't meet the budget."""
    try:
        chosen = allocate_by_loss(curves, budget)
    except ValueError:
        return {}
    return {curve.name: float(curve.losses[curve.options.index(chosen[curve.name])]) for curve in curves}


def _allowed(model: PreTrainedModel, budget: Budget, kind: str, curves: Sequence[TradeoffCurve]) -> list[int]:
    """Return the options of a kind of items that a configuration can say."""
    if kind == "heads":
        return stock_head_counts(model)
    full = next(_full(curve) for curve in curves if curve.tied == kind)
    return [*range(budget.align, full, budget.align), full]
