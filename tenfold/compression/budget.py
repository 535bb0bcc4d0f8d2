"""Budgets in parameters, FLOPs or bytes, and what the items of the blocks become within them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tenfold.compression.allocation import ALLOCATORS, TradeoffCurve
from tenfold.models.config import Calibrate
from tenfold.models.cost import price, site_flops
from tenfold.models.recipe import Budget, Recipe
from tenfold.models.sites import FACTORIZED, Site, count_parameters, dtype_of
from tenfold.structure import Structure

ROWS = 1024  # a call, at which FLOPs are counted, as for a prompt


def choose_options(
    model: PreTrainedModel,
    recipe: Recipe,
    settings: Calibrate,
    sites: Sequence[Site],
    curves: Sequence[TradeoffCurve],
    influence: Mapping[str, float],
) -> dict[str, Any]:
    """Return ``{name: option}`` for every item within the budget of the recipe; settled items are not in the budget.

    Args:
        sites: those that the items change.
        influence: of every block.

    Raises:
        ValueError: there is no budget, it can't be met (the smallest possible one is named), or the allocation is not registered.
    """
    settled = {curve.name: curve.options[0] for curve in curves if curve.settled}
    if len(settled) == len(curves):
        if recipe.budget is not None:
            raise ValueError(
                f"every rule of recipe {recipe.name} has a size of its own, so that keep {recipe.budget.keep} changes nothing; "
                "leave --keep, or the budget, out"
            )
        return settled
    if recipe.budget is None:
        name = next(curve.name for curve in curves if not curve.settled)
        raise ValueError(f"nothing says how much of {name} to keep; give the recipe a budget, or --keep")
    if settings.allocate not in ALLOCATORS:
        raise ValueError(f"allocate {settings.allocate} is one of tenfold.baselines; import tenfold.baselines first")
    unit, of, keep = unit_of(model, recipe.budget), recipe.budget.of, recipe.budget.keep
    curves = [unit.convert(curve) for curve in curves]
    free = [curve for curve in curves if not curve.settled]
    saved = {site.path: unit.saved_already(site) for site in sites}
    dropped = sum(curve.whole - int(curve.costs[0]) for curve in curves if curve.settled)
    dropped -= sum(saved[path] for path in saved if path in settled)
    whole = sum(curve.whole for curve in free) - sum(saved[path] for path in saved if path not in settled)
    total, allowed, rest = whole, keep * whole, 0
    if of != "sites":
        total = unit.total(of)
        allowed, rest = whole - (1 - keep) * total + dropped, total - whole - dropped
    least = sum(int(curve.costs[0]) for curve in free)
    if allowed < least:
        raise ValueError(
            f"keep {keep} of the {of} can't be met: the smallest that these rules reach is "
            f"{rest + least:,} {unit.name}" + (f" (keep {(rest + least) / total:.3f})" if total else "")
        )
    return settled | ALLOCATORS[settings.allocate](settings, free, allowed, influence)


def budget_total(model: PreTrainedModel, budget: Budget) -> float:
    """Return the total that the budget keeps a share of; 0 for a budget of the sites."""
    return 0 if budget.of == "sites" else unit_of(model, budget).total(budget.of)


@dataclass
class Parameters:
    """Budget counted in parameters."""

    model: PreTrainedModel
    name = "parameters"

    def convert(self, curve: TradeoffCurve) -> TradeoffCurve:
        """Return ``curve`` with its costs in this unit."""
        return curve

    def total(self, of: str) -> float:
        """Return the size of the part ``of`` the model."""
        return count_parameters(self.model, of)

    def block_cost(self, path: str, sites: Sequence[Site]) -> float:
        """Return the cost of the whole block ``path``, whose matrices are ``sites``."""
        return sum(p.numel() for p in self.model.get_submodule(path).parameters())

    def saved_already(self, site: Site) -> float:
        """Return by how much a site that is factorised already is smaller than its matrix."""
        module = self.model.get_submodule(site.path)
        held = sum(p.numel() for name, p in module.named_parameters() if name != "bias")
        return site.shape[0] * site.shape[1] - held


class Flops(Parameters):
    """Budget counted in FLOPs per token."""

    name = "FLOPs a token"

    def convert(self, curve: TradeoffCurve) -> TradeoffCurve:
        flops = [
            option.flops(ROWS) / ROWS if isinstance(option, Structure) else 2 * int(products)
            for option, products in zip(curve.options, curve.products, strict=True)
        ]
        return _with_costs(curve, curve.calls * np.array(flops), 2 * curve.calls * curve.whole_products)

    def total(self, of: str) -> float:
        return price(self.model)["flops_per_token"][str(ROWS)]

    def block_cost(self, path: str, sites: Sequence[Site]) -> float:
        return sum(2 * site.calls * site.shape[0] * site.shape[1] for site in sites)

    def saved_already(self, site: Site) -> float:
        now = site_flops(site, self.model.get_submodule(site.path), ROWS) // ROWS
        return 2 * site.calls * site.shape[0] * site.shape[1] - now


class Bytes(Parameters):
    """Budget counted in bytes of the saved weights."""

    name = "bytes"

    def convert(self, curve: TradeoffCurve) -> TradeoffCurve:
        each = dtype_of(self.model).itemsize
        return _with_costs(curve, each * curve.costs + 4 * curve.indices, each * curve.whole)

    def total(self, of: str) -> float:
        layers = [module for module in self.model.modules() if isinstance(module, FACTORIZED)]
        maps = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
        return dtype_of(self.model).itemsize * count_parameters(self.model, "model") + maps

    def block_cost(self, path: str, sites: Sequence[Site]) -> float:
        return dtype_of(self.model).itemsize * super().block_cost(path, sites)

    def saved_already(self, site: Site) -> float:
        module, each = self.model.get_submodule(site.path), dtype_of(self.model).itemsize
        return each * super().saved_already(site) - sum(b.nbytes for b in module.buffers())


def _with_costs(curve: TradeoffCurve, costs: np.ndarray, whole: float) -> TradeoffCurve:
    given = {"settled": curve.settled, "tied": curve.tied, "whole": whole}
    return TradeoffCurve(curve.name, costs, curve.losses, curve.options, **given)


def unit_of(model: PreTrainedModel, budget: Budget) -> Parameters:
    """Return the unit that ``budget`` counts in."""
    return {"flops": Flops, "bytes": Bytes}.get(budget.of, Parameters)(model)
