"""What a budget leaves to the items of the blocks, in parameters or in FLOPs, and what they become within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tenfold.compress.allocate import Curve
from tenfold.compress.shares import share_out
from tenfold.models.cost import price, site_flops
from tenfold.models.recipe import Calibrate, Recipe
from tenfold.models.sites import Site, share_of
from tenfold.structure import Structure

ROWS = 1024  # a call, at which FLOPs are counted, as for a prompt


def choose(
    model: PreTrainedModel,
    recipe: Recipe,
    settings: Calibrate,
    sites: Sequence[Site],
    curves: Sequence[Curve],
    influence: Mapping[str, float],
) -> dict[str, Any]:
    """``{name: option}`` for every item within the budget of the recipe; what a rule settles by itself is not in the budget.

    Args:
        sites: those that the items change.
        influence: of every block.

    Raises:
        ValueError: there is no budget, or it can't be met; the smallest one that can is named.
    """
    settled = {curve.name: curve.options[0] for curve in curves if curve.settled is not None}
    if len(settled) == len(curves):
        return settled
    if recipe.budget is None:
        name = next(curve.name for curve in curves if curve.settled is None)
        raise ValueError(f"nothing says how much of {name} to keep; give the recipe a budget, or --keep")
    in_flops = recipe.budget.of == "flops"
    curves = [as_flops(curve) for curve in curves] if in_flops else list(curves)
    dropped = sum(curve.whole - int(curve.costs[0]) for curve in curves if curve.settled is not None)
    free = [curve for curve in curves if curve.settled is None]
    whole = sum(curve.whole for curve in free) - _folded_away(model, sites, settled, in_flops)
    if recipe.budget.of == "sites":
        allowed, rest = recipe.budget.keep * whole, 0
    else:
        total = price(model)["flops_per_token"][str(ROWS)] if in_flops else share_of(model, recipe.budget.of)
        allowed = whole - (1 - recipe.budget.keep) * total + dropped
        rest = total - whole - dropped
    least = sum(int(curve.costs[0]) for curve in free)
    if allowed < least:
        raise ValueError(
            f"keep {recipe.budget.keep} of the {recipe.budget.of} can't be met: the smallest that these rules reach is "
            f"{rest + least:,} {'FLOPs a token' if in_flops else 'parameters'}"
        )
    return settled | share_out(settings, free, allowed, influence)


def as_flops(curve: Curve) -> Curve:
    """``curve`` with FLOPs a token for parameters."""
    costs = [
        option.flops(ROWS) / ROWS if isinstance(option, Structure) else 2 * int(products)
        for option, products in zip(curve.options, curve.products, strict=True)
    ]
    settled = None if curve.settled is None else 2 * curve.settled
    return Curve(curve.name, np.array(costs), curve.losses, curve.options, settled=settled)


def _folded_away(model: PreTrainedModel, sites: Sequence[Site], settled: Mapping[str, Any], in_flops: bool) -> int:
    """By how much the sites of a folded model are smaller than their matrices, those that are settled left out."""
    away = 0
    for site in {site.path: site for site in sites if site.path not in settled}.values():
        module, size = model.get_submodule(site.path), site.shape[0] * site.shape[1]
        held = sum(p.numel() for name, p in module.named_parameters() if name != "bias")
        away += 2 * size - site_flops(site, module, ROWS) // ROWS if in_flops else size - held
    return away
