"""What a budget leaves to the items of the blocks, in parameters, FLOPs or bytes, and what they become within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tenfold.compress.allocate import TradeoffCurve
from tenfold.compress.budget_split import share_out
from tenfold.models.config import Calibrate
from tenfold.models.cost import price, site_flops
from tenfold.models.recipe import Budget, Recipe
from tenfold.models.sites import FACTORIZED, Site, count_parameters, dtype_of
from tenfold.structure import Structure

ROWS = 1024  # a call, at which FLOPs are counted, as for a prompt


def choose(
    model: PreTrainedModel,
    recipe: Recipe,
    settings: Calibrate,
    sites: Sequence[Site],
    curves: Sequence[TradeoffCurve],
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
        if recipe.budget is not None:
            raise ValueError(
                f"every rule of recipe {recipe.name} has a size of its own, so that keep {recipe.budget.keep} changes nothing; "
                "leave --keep, or the budget, out"
            )
        return settled
    if recipe.budget is None:
        name = next(curve.name for curve in curves if curve.settled is None)
        raise ValueError(f"nothing says how much of {name} to keep; give the recipe a budget, or --keep")
    unit = UNITS.get(recipe.budget.of, Parameters)(model)
    curves = [unit.curve(curve) for curve in curves]
    dropped = sum(curve.whole - int(curve.costs[0]) for curve in curves if curve.settled is not None)
    dropped -= sum(unit.folded_away(site) for site in _once(sites, settled, True))
    free = [curve for curve in curves if curve.settled is None]
    whole = sum(curve.whole for curve in free) - sum(unit.folded_away(site) for site in _once(sites, settled))
    if recipe.budget.of == "sites":
        allowed, rest, total = recipe.budget.keep * whole, 0, whole
    else:
        total = unit.total(recipe.budget.of)
        allowed = whole - (1 - recipe.budget.keep) * total + dropped
        rest = total - whole - dropped
    least = sum(int(curve.costs[0]) for curve in free)
    if allowed < least:
        raise ValueError(
            f"keep {recipe.budget.keep} of the {recipe.budget.of} can't be met: the smallest that these rules reach is "
            f"{rest + least:,} {unit.name}" + (f" (keep {(rest + least) / total:.3f})" if total else "")
        )
    return settled | share_out(settings, free, allowed, influence)


def total_of(model: PreTrainedModel, budget: Budget) -> float:
    """What the share to keep is counted on."""
    return 0 if budget.of == "sites" else UNITS.get(budget.of, Parameters)(model).total(budget.of)


def _once(sites: Sequence[Site], settled: Mapping[str, Any], whether: bool = False) -> list[Site]:
    """The sites that are not ``settled``, or are, each once."""
    return list({site.path: site for site in sites if (site.path in settled) == whether}.values())


@dataclass
class Parameters:
    """What a budget is counted in."""

    model: PreTrainedModel
    name = "parameters"

    def curve(self, curve: TradeoffCurve) -> TradeoffCurve:
        """``curve`` with this unit for parameters."""
        return curve

    def total(self, of: str) -> float:
        """Of the part of the model that the budget is a share of."""
        return count_parameters(self.model, of)

    def folded_away(self, site: Site) -> float:
        """By how much a site of a folded model is smaller than its matrix."""
        module = self.model.get_submodule(site.path)
        held = sum(p.numel() for name, p in module.named_parameters() if name != "bias")
        return site.shape[0] * site.shape[1] - held


class Flops(Parameters):
    """FLOPs a token."""

    name = "FLOPs a token"

    def curve(self, curve: TradeoffCurve) -> TradeoffCurve:
        costs = [
            curve.calls * (option.flops(ROWS) / ROWS if isinstance(option, Structure) else 2 * int(products))
            for option, products in zip(curve.options, curve.products, strict=True)
        ]
        settled = None if curve.settled is None else 2 * curve.calls * curve.settled
        made = TradeoffCurve(curve.name, np.array(costs), curve.losses, curve.options, settled=settled)
        made.whole = 2 * curve.calls * curve.whole_products if settled is None else settled
        return made

    def total(self, of: str) -> float:
        return price(self.model)["flops_per_token"][str(ROWS)]

    def folded_away(self, site: Site) -> float:
        now = site_flops(site, self.model.get_submodule(site.path), ROWS) // ROWS
        return 2 * site.calls * site.shape[0] * site.shape[1] - now


class Bytes(Parameters):
    """Bytes of the weights as they are saved."""

    name = "bytes"

    def curve(self, curve: TradeoffCurve) -> TradeoffCurve:
        each = dtype_of(self.model).itemsize
        settled = None if curve.settled is None else each * curve.settled
        made = TradeoffCurve(
            curve.name, each * curve.costs + 4 * curve.indices, curve.losses, curve.options, settled=settled
        )
        made.whole = each * curve.whole
        return made

    def total(self, of: str) -> float:
        each = dtype_of(self.model).itemsize
        maps = sum(
            b.nbytes for module in self.model.modules() if isinstance(module, FACTORIZED) for b in module.buffers()
        )
        return each * count_parameters(self.model, "model") + maps

    def folded_away(self, site: Site) -> float:
        module, each = self.model.get_submodule(site.path), dtype_of(self.model).itemsize
        return each * super().folded_away(site) - sum(b.nbytes for b in module.buffers())


UNITS: dict[str, type[Parameters]] = {"flops": Flops, "bytes": Bytes}
