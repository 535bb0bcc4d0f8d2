"""The kinds of layers that a recipe may name: structures, and layers without a matrix.

To add such a layer, write its description and the layer, see ``tenfold.nn.cola``, and add a line to ``LAYERS``.
"""

from __future__ import annotations

from typing import Any

from tenfold.nn.cola import Cola, ColaLinear
from tenfold.nn.layers import FactorizedLinear
from tenfold.structure import Structure

LAYERS: dict[str, tuple[Any, type[FactorizedLinear]]] = {"cola": (Cola, ColaLinear)}


def family(kind: str | None) -> Any:
    """Return the class that describes layers of this kind: a class of structures, or one of ``LAYERS``."""
    return LAYERS[kind][0] if kind in LAYERS else Structure.family(kind)


def layer_of(structure: Any) -> type[FactorizedLinear]:
    """Return the class of layers that compute what ``structure`` describes."""
    return LAYERS[structure.kind][1] if structure.kind in LAYERS else FactorizedLinear


def check_matrix(kind: str | None, where: str) -> None:
    """Raise ValueError for a kind of layer without a matrix."""
    if kind in LAYERS:
        raise ValueError(
            f"{where}: {kind} has a non-linearity between its factors, so that it can't take the place of a trained matrix; "
            "train it from noise (tenfold pretrain), or choose a structure, for instance low_rank"
        )
