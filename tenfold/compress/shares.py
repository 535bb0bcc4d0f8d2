"""How a budget is shared out, by the name that a recipe gives in ``allocate``.

:mod:`tenfold.baselines` adds its own to both tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tenfold.compress.allocate import Curve, allocate, by_shares, equal_shares
from tenfold.compress.influence import influence_shares
from tenfold.models.settings import Calibrate

# name -> (settings, curves, parameters that may stay, influence of every block) -> {name of an item: option}
SHARED: dict[str, Callable[[Calibrate, Sequence[Curve], float, Mapping[str, float]], dict[str, Any]]] = {
    "sensitivity": lambda settings, curves, budget, influence: allocate(curves, budget),
    "uniform": lambda settings, curves, budget, influence: equal_shares(curves, budget),
    "influence": lambda settings, curves, budget, influence: by_shares(
        curves, influence_shares(curves, influence, budget, settings.temperature)
    ),
}

# name -> what measures the model before, and changes the losses of the curves:
# (model, works, batches, settings, weights, journal, folder, curves, progress); see tenfold.baselines.lems.measure
MEASURED: dict[str, Callable[..., None]] = {}


def share_out(
    settings: Calibrate, curves: Sequence[Curve], budget: float, influence: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """``{name: option}`` for every item, as ``settings.allocate`` says.

    Raises:
        ValueError: a baseline's way that is not registered, or whatever the way raises.
    """
    if settings.allocate not in SHARED:
        raise ValueError(f"allocate {settings.allocate} is one of tenfold.baselines; import tenfold.baselines first")
    return SHARED[settings.allocate](settings, curves, budget, influence or {})
