"""Index maps that the hidden units of an MLP absorb: one permuted copy less at every call.

In ``W[rows[i], columns[j]] = base[i, j]`` (TQCompressor) the outputs of the base are permuted, and its inputs before them. Hidden
units may have any order: in that of one map this map disappears, and those of the other matrices follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.models.invariances.hidden_units import mlp_sites
from tenfold.models.plan import SitePlan
from tenfold.models.sites import Site, weight_of
from tenfold.models.surgery import install, set_matrix
from tenfold.structure import Dense, Scattered


@dataclass(frozen=True)
class _Side:
    """One matrix of an MLP, and which of its sides has the hidden units."""

    site: Site
    module: nn.Module

    @property
    def name(self) -> str:
        return "columns" if self.site.role == "mlp.out" else "rows"

    @property
    def size(self) -> int:
        return self.site.shape[self.name == "columns"]

    @property
    def map(self) -> Tensor | None:
        """Return the index map of all units, None if there is none."""
        structure = getattr(self.module, "structure", None)
        if not isinstance(structure, Scattered) or self.module.shared or not getattr(structure, f"map_{self.name}"):
            return None
        found = getattr(self.module, self.name)
        return found.long() if len(found) == self.size and not found.is_meta else None

    @property
    def is_matrix(self) -> bool:
        """Tell whether this is one matrix that no other site shares."""
        structure = getattr(self.module, "structure", None)
        return structure is None or (isinstance(structure, Dense) and not self.module.shared)

    @torch.no_grad()
    def permute(self, model: PreTrainedModel, order: Tensor) -> bool:
        """Make unit ``order[k]`` unit ``k``; return whether the map has disappeared."""
        bias = None if self.name == "columns" or self.module.bias is None else self.module.bias[order]
        if self.map is None:
            matrix = weight_of(self.module).clone()
            set_matrix(self.module, matrix[order] if self.name == "rows" else matrix[:, order], bias)
            return False
        factors, structure, place = self.module.factors(), self.module.structure, order.argsort()[self.map]
        gone = bool((place == torch.arange(len(place), device=place.device)).all())
        factors = {name: value for name, value in factors.items() if name != self.name}
        if not gone:
            factors[self.name] = place.int()
        else:
            structure = replace(structure, **{f"map_{self.name}": False})
            if structure.base.shape == structure.shape and not structure.index_shapes():
                structure = structure.base
        bias = self.module.bias if bias is None else bias
        entry = SitePlan(self.site, structure, bias is not None, frozen=tuple(self.module.frozen))
        install(model, entry, factors, bias)
        return gone


def absorb_index_maps(model: PreTrainedModel, inside: str = "") -> list[str]:
    """Permute the hidden units of every MLP so that one of its index maps disappears; the function stays the same.

    An MLP stays as it is if one of its matrices is factorised and has no map of all its units. Call
    ``tenfold.models.surgery.finish`` after it.

    Args:
        inside: only what is below this path.

    Returns:
        The paths of the matrices that have a map less.
    """
    gone = []
    for sites in mlp_sites(model).values():
        sides = [_Side(site, model.get_submodule(site.path)) for site in sites]
        sides = [side for side in sides if not inside or side.site.path.startswith(f"{inside}.")]
        mapped = [side for side in sides if side.map is not None]
        alike = len({side.size for side in sides}) == 1 and any(side.name == "columns" for side in sides)
        if not mapped or not alike or not all(side.is_matrix or side in mapped for side in sides):
            continue
        order = mapped[0].map
        gone += [side.site.path for side in sides if side.permute(model, order)]
    return gone
