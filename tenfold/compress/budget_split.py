"""How a budget is shared out, by the name that a recipe gives in ``allocate``.

:mod:`tenfold.baselines` adds its own to both tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tenfold.compress.allocate import TradeoffCurve, allocate, equal_shares
from tenfold.models.config import Calibrate

# name -> (settings, curves, parameters that may stay, influence of every block) -> {name of an item: option}
ALLOCATORS: dict[str, Callable[[Calibrate, Sequence[TradeoffCurve], float, Mapping[str, float]], dict[str, Any]]] = {
    "sensitivity": lambda settings, curves, budget, influence: allocate(curves, budget),
    "uniform": lambda settings, curves, budget, influence: equal_shares(curves, budget),
}

# name -> what measures the model before, and changes the losses of the curves:
# (model, works, batches, settings, weights, journal, folder, curves, progress); see tenfold.baselines.lems.measure
LOSS_MODELS: dict[str, Callable[..., None]] = {}


def share_out(
    settings: Calibrate, curves: Sequence[TradeoffCurve], budget: float, influence: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """``{name: option}`` for every item, as ``settings.allocate`` says.

    Raises:
        ValueError: a baseline's way that is not registered, or whatever the way raises.
    """
    if settings.allocate not in ALLOCATORS:
        raise ValueError(f"allocate {settings.allocate} is one of tenfold.baselines; import tenfold.baselines first")
    return ALLOCATORS[settings.allocate](settings, curves, budget, influence or {})
