"""Allocation against every combination of options, on small curves drawn at random."""

import numpy as np
import pytest
from curves import budgets, drawn, is_used_up, least_loss, spent

from tenfold.compression.allocation import TradeoffCurve, allocate_by_loss

seeds = pytest.mark.parametrize("seed", range(15))


def largest_step(curves) -> float:
    return max(float(-np.diff(curve.losses).min(initial=0.0)) for curve in curves)


@seeds
@pytest.mark.parametrize("convex", [True, False])
def test_the_budget_is_kept_and_used_up(seed, convex):
    curves = drawn(seed, convex)
    for budget in budgets(curves, seed):
        assert is_used_up(curves, allocate_by_loss(curves, budget), budget)


@seeds
def test_at_most_one_step_is_lost_on_convex_curves(seed):
    curves = drawn(seed)
    for budget in budgets(curves, seed):
        _, loss = spent(curves, allocate_by_loss(curves, budget))
        assert loss <= least_loss(curves, budget) + largest_step(curves) + 1e-12


@seeds
@pytest.mark.parametrize("convex", [True, False])
def test_nothing_is_lost_at_the_budgets_that_a_price_asks_for(seed, convex):
    """At ``price`` per parameter every item takes the option with the least ``loss + price * cost``."""
    curves = drawn(seed, convex)
    for price in np.random.default_rng(seed).exponential(size=6):
        budget = sum(curve.costs[np.argmin(curve.losses + price * curve.costs)] for curve in curves)
        cost, loss = spent(curves, allocate_by_loss(curves, budget))
        assert cost == budget and loss == pytest.approx(least_loss(curves, budget), abs=1e-9)


def test_what_is_left_goes_where_it_gains_most_a_parameter():
    steps = {"does not fit": (10, 10.0), "gains most": (5, 4.0), "gains less": (6, 3.0)}
    curves = [TradeoffCurve(name, [1, 1 + cost], [gain, 0.0], [False, True]) for name, (cost, gain) in steps.items()]
    chosen = allocate_by_loss(curves, 4 + 6)
    assert [name for name, taken in chosen.items() if taken] == ["gains most"]


@seeds
def test_a_curve_keeps_what_no_other_option_beats(seed):
    draw = np.random.default_rng(seed)
    costs, losses = draw.integers(1, 12, size=8), draw.integers(0, 6, size=8) / 2
    curve = TradeoffCurve("item", costs, losses, list("abcdefgh"))
    pairs = list(zip(costs, losses, strict=True))
    good = {(c, v) for c, v in pairs if not any(d <= c and w <= v and (d, w) != (c, v) for d, w in pairs)}
    assert list(zip(curve.costs, curve.losses, strict=True)) == sorted(good)
    assert [pairs["abcdefgh".index(option)] for option in curve.options] == sorted(good)
    assert curve.whole == costs[-1]


def test_items_with_one_option_leave_nothing_to_choose():
    curves = [TradeoffCurve(name, np.array([cost]), np.array([0.0]), [cost]) for name, cost in (("a", 3), ("b", 4))]
    assert allocate_by_loss(curves, 7) == {"a": 3, "b": 4}


@pytest.mark.parametrize("seed", range(5))
def test_a_scaled_curve_has_the_same_prices(seed):
    for curve in drawn(seed):
        part = curve.scale(0.25)
        np.testing.assert_allclose(
            np.diff(part.losses) / np.diff(part.costs), np.diff(curve.losses) / np.diff(curve.costs)
        )
        assert part.costs[-1] == 0.25 * curve.costs[-1] and part.options == curve.options
