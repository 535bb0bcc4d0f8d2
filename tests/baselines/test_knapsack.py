"""The knapsack against every combination of options."""

import pytest
from curves import budgets, drawn, is_used_up, least_loss, spent

from tenfold.baselines import knapsack as module
from tenfold.baselines.knapsack import solve_knapsack
from tenfold.compression.allocation import TradeoffCurve, allocate_by_loss

seeds = pytest.mark.parametrize("seed", range(20))


@seeds
@pytest.mark.parametrize("convex", [True, False])
def test_no_combination_within_the_budget_loses_less(seed, convex):
    curves = drawn(seed, convex)
    for budget in budgets(curves, seed):
        cost, loss = spent(curves, solve_knapsack(curves, budget))
        assert cost <= budget and loss == pytest.approx(least_loss(curves, budget), abs=1e-9)


def test_it_beats_a_price_that_is_filled_up():
    """Greedily the small gain of "a" comes first, after which "b", which gains more, has no room."""
    curves = [TradeoffCurve("a", [0, 4], [5.0, 0.0], [0, 4]), TradeoffCurve("b", [0, 6], [7.0, 0.0], [0, 6])]
    assert allocate_by_loss(curves, 9) == {"a": 4, "b": 0} and solve_knapsack(curves, 9) == {"a": 0, "b": 6}


@seeds
def test_a_coarse_grid_keeps_the_budget_and_spends_it(seed, monkeypatch):
    monkeypatch.setattr(module, "GRID", 7)
    curves = drawn(seed, convex=False)
    for budget in budgets(curves, seed):
        assert is_used_up(curves, solve_knapsack(curves, budget), budget)


def test_too_small_a_budget_is_refused():
    curves = [TradeoffCurve("a", [5, 9], [1.0, 0.0], [0, 1])]
    with pytest.raises(ValueError, match="can't be made smaller than 5, but 4 is to be kept"):
        solve_knapsack(curves, 4)
