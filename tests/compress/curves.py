"""Small tradeoff curves drawn at random, and every combination of their options."""

from itertools import product

import numpy as np

from tenfold.compression.allocation import TradeoffCurve


def drawn(seed: int, convex: bool = True) -> list[TradeoffCurve]:
    """Return curves whose losses fall with the cost, where ``convex`` by less and less per parameter."""
    draw, curves = np.random.default_rng(seed), []
    for number in range(draw.integers(1, 5)):
        slopes = draw.exponential(size=draw.integers(1, 5))
        slopes = np.sort(slopes)[::-1] if convex else slopes
        costs = draw.integers(1, 9, size=len(slopes) + 1).cumsum()
        losses = np.append((slopes * np.diff(costs))[::-1].cumsum()[::-1], 0.0)
        curves.append(TradeoffCurve(f"item {number}", costs, losses, list(range(len(costs)))))
    return curves


def budgets(curves, seed: int) -> list[float]:
    """Return the least and the most that all items can cost, and some budgets between."""
    least, whole = (sum(curve.costs[k] for curve in curves) for k in (0, -1))
    return [least, *np.random.default_rng(seed).uniform(least, whole, size=4), whole]


def spent(curves, chosen) -> tuple[float, float]:
    """Return the total cost and the total loss."""
    at = [curve.options.index(chosen[curve.name]) for curve in curves]
    pairs = list(zip(curves, at, strict=True))
    return sum(curve.costs[k] for curve, k in pairs), sum(curve.losses[k] for curve, k in pairs)


def is_used_up(curves, chosen, budget: float) -> bool:
    """Tell whether the cost is within ``budget``, and no item could have a more expensive option."""
    cost, at = spent(curves, chosen)[0], [curve.options.index(chosen[curve.name]) for curve in curves]
    pairs = zip(curves, at, strict=True)
    return cost <= budget and all((cost - c.costs[k] + c.costs[k + 1 :] > budget).all() for c, k in pairs)


def least_loss(curves, budget: float) -> float:
    every = product(*(zip(curve.costs, curve.losses, strict=True) for curve in curves))
    return min(sum(loss for _, loss in one) for one in every if sum(cost for cost, _ in one) <= budget)
