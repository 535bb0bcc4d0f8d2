"""Truncation of the ranks of tensor trains: one bond at a time, the one at which the least is lost.

Reference: MPOP, arXiv 2106.02205: the error of every bond is estimated, the bond with the least error is cut, and the model is
trained before the next cut.
"""

from __future__ import annotations

from dataclasses import replace as with_field
from typing import Any

import torch
from transformers import PreTrainedModel

from tenfold.models.plan import SitePlan
from tenfold.models.recipe import Squeeze
from tenfold.models.sites import FACTORIZED, Site, find_sites
from tenfold.models.surgery import finish, install
from tenfold.structure import TensorTrain


@torch.no_grad()
def truncate_ranks(model: PreTrainedModel, how: Squeeze, recipe: str = "") -> dict[str, float]:
    """Cut ``how.bonds`` bonds of the tensor trains of ``model``, in place, each time the one that loses least.

    A bond of rank ``r`` is cut to ``max(1, int(how.rank_ratio * r))``. Its error is ``||W - What|| / ||W||``, exact for
    these weights.

    Returns:
        The error of every site that was cut, by its path.

    Raises:
        ValueError: no tensor train of these roles has a bond to cut, or one shares its factors.
    """
    roles = [how.role] if isinstance(how.role, str) else how.role
    sites = {site.path: site for site in find_sites(model) if site.role in roles}
    open_bonds = {path: _list_bonds(model, path, how.rank_ratio) for path in sites}
    errors: dict[str, float] = {}
    for _ in range(how.bonds):
        found = [(*bond, path) for path, bonds in open_bonds.items() for bond in bonds]
        if not found and errors:
            break  # every rank is 1
        if not found:
            raise ValueError(
                f"no tensor train of role {how.role} has a bond that can be cut; factorise these roles "
                "first, without split or adapter"
            )
        _, bond, rank, path = min(found)
        error = _cut_bond(model, sites[path], bond, rank)
        errors[path] = (error**2 + errors[path] ** 2) ** 0.5 if path in errors else error
        open_bonds[path] = _list_bonds(model, path, how.rank_ratio)
    finish(model, recipe)
    return errors


def _list_bonds(model: PreTrainedModel, path: str, by: float) -> list[tuple[float, int, int]]:
    """Return ``(error, bond, new rank)`` of every bond of one site that can be cut."""
    layer = model.get_submodule(path)
    if not isinstance(layer, FACTORIZED) or not isinstance(layer.structure, TensorTrain):
        return []
    if layer.shared:
        raise ValueError(f"{path} shares {', '.join(layer.shared)} with others, so that its bonds can't be cut alone")
    found, factors = [], layer.factors()
    for bond, rank in enumerate(layer.structure.ranks):
        new = max(1, int(by * rank))
        if new < rank:
            squares = layer.structure.spectrum(factors, bond).square()
            found.append((float((squares[new:].sum() / squares.sum().clamp_min(1e-300)).sqrt()), bond, new))
    return found


def _cut_bond(model: PreTrainedModel, site: Site, bond: int, rank: int) -> float:
    """Cut one bond of one site, and return its error."""
    layer: Any = model.get_submodule(site.path)
    before = layer.dense()
    structure, factors = layer.structure.truncate_bond(layer.factors(), bond, rank)
    bias = getattr(layer, "bias", None)
    entry = SitePlan(with_field(site, bias=bias is not None), structure, bias is not None, frozen=layer.frozen)
    install(model, entry, factors, bias)
    new: Any = model.get_submodule(site.path)
    return float((new.dense() - before).norm() / before.norm().clamp_min(1e-30))
