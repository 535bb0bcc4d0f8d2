"""The knapsack against every combination of options."""

from itertools import product

import numpy as np
import pytest

from tenfold.baselines import knapsack as module
from tenfold.baselines.knapsack import solve_knapsack
from tenfold.compression.allocation import TradeoffCurve, allocate_by_loss

seeds = pytest.mark.parametrize("seed", range(20))


def drawn(seed: int) -> list[TradeoffCurve]:
    """Return curves of any shape whose losses fall with the cost."""
    draw = np.random.default_rng(seed)
    curves = []
    for number in range(draw.integers(1, 6)):
        count = draw.integers(1, 6)
        costs, gains = draw.integers(1, 30, count).cumsum(), draw.exponential(size=count)
        losses = gains[::-1].cumsum()[::-1] - gains[-1]
        curves.append(TradeoffCurve(f"item {number}", costs, losses, list(range(count))))
    return curves


def every(curves: list[TradeoffCurve]) -> list[tuple[int, float]]:
    """Return cost and loss of every combination."""
    ways = product(*(zip(curve.costs, curve.losses, strict=True) for curve in curves))
    return [(sum(cost for cost, _ in way), sum(loss for _, loss in way)) for way in ways]


def spent(curves: list[TradeoffCurve], chosen: dict) -> tuple[int, float]:
    at = [curve.options.index(chosen[curve.name]) for curve in curves]
    pairs = list(zip(curves, at, strict=True))
    return sum(curve.costs[k] for curve, k in pairs), sum(curve.losses[k] for curve, k in pairs)


@seeds
def test_no_combination_within_the_budget_loses_less(seed):
    curves = drawn(seed)
    ways = every(curves)
    low, high = min(cost for cost, _ in ways), max(cost for cost, _ in ways)
    for budget in np.random.default_rng(seed).uniform(low, high + 1, 5):
        cost, loss = spent(curves, solve_knapsack(curves, budget))
        assert cost <= budget
        assert loss == pytest.approx(min(loss for cost, loss in ways if cost <= budget), abs=1e-9)


def test_it_beats_a_price_that_is_filled_up():
    """Greedily the small gain of "a" comes first, after which "b", which gains more, has no room."""
    curves = [TradeoffCurve("a", [0, 4], [5.0, 0.0], [0, 4]), TradeoffCurve("b", [0, 6], [7.0, 0.0], [0, 6])]
    assert allocate_by_loss(curves, 9) == {"a": 4, "b": 0} and solve_knapsack(curves, 9) == {"a": 0, "b": 6}


@seeds
def test_a_coarse_grid_keeps_the_budget_and_spends_it(seed, monkeypatch):
    monkeypatch.setattr(module, "GRID", 7)
    curves = drawn(seed)
    ways = every(curves)
    for budget in np.random.default_rng(seed).uniform(*np.quantile([cost for cost, _ in ways], [0, 1]), 5):
        cost, _ = spent(curves, chosen := solve_knapsack(curves, budget))
        assert cost <= budget
        for curve in curves:
            k = curve.options.index(chosen[curve.name])
            assert (cost - curve.costs[k] + curve.costs[k + 1 :] > budget).all()


def test_too_small_a_budget_is_refused():
    curves = [TradeoffCurve("a", [5, 9], [1.0, 0.0], [0, 1])]
    with pytest.raises(ValueError, match="can't be made smaller than 5, but 4 is to be kept"):
        solve_knapsack(curves, 4)
