"""Hidden units and heads that a plain model does not need, because the matrix that reads them is zero there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.export.weights import Weights
from tenfold.models.attention_layout import heads_of
from tenfold.models.densify import pad_to
from tenfold.models.sites import Site, find_sites


@dataclass(frozen=True)
class Part:
    """An MLP or an attention with separate query, key and value matrices, and what it needs.

    Args:
        family: ``mlp`` or ``attn``.
        sites: its matrices, the one that reads its units last.
        units: the number of hidden units, or of groups of heads that share a key and a value.
        used: the units that are read, in order; one at least.
    """

    family: str
    sites: tuple[Site, ...]
    units: int
    used: Tensor


def find_parts(weights: Weights) -> list[Part]:
    """Return every MLP and attention of ``weights``, in the model's order, and the units that it needs."""
    grouped: dict[tuple[str, str], dict[str, Site]] = {}
    for site in find_sites(weights.model):
        if site.layer is not None:
            family, _, role = site.role.partition(".")
            block: Any = re.match(r".*\.\d+(?=\.)", site.path)
            grouped.setdefault((block[0], family), {})[role] = site
    parts = []
    for (_, family), sites in grouped.items():
        if "out" not in sites or "qkv" in sites:
            continue
        out = sites.pop("out")
        units = out.shape[1] if family == "mlp" else _groups(weights, out)
        used = read_matrix(weights, out).reshape(out.shape[0], units, -1).abs().amax((0, 2)).nonzero().flatten()
        parts.append(Part(family, (*sites.values(), out), units, used if len(used) else torch.tensor([0])))
    return parts


def read_matrix(weights: Weights, site: Site) -> Tensor:
    """Return the matrix ``(out, in)`` of a site."""
    key = f"{site.path}.weight"
    return weights.read(key).T if weights.is_transposed(key) else weights.read(key)


def trim(weights: Weights, parts: list[Part], size: Callable[[Part], int]) -> tuple[dict[str, Tensor], Callable]:
    """Return ``tensors`` and ``read`` of ``weights`` with ``size(part)`` units in every part: those used, and zeros."""
    cuts: dict[str, tuple[int, Tensor, int]] = {}  # tensor -> axis, indices, length
    for part in parts:
        for site in part.sites:
            axis = int(site is part.sites[-1])
            width = site.shape[axis] // part.units  # rows or columns of a unit
            index = (part.used[:, None] * width + torch.arange(width)).flatten()
            cut = index, size(part) * width
            key = f"{site.path}.weight"
            cuts[key] = (axis ^ weights.is_transposed(key), *cut)
            if not axis:
                cuts[f"{site.path}.bias"] = (0, *cut)
    tensors = dict(weights.tensors)
    for key in cuts.keys() & tensors.keys():
        axis, _, length = cuts[key]
        shape = list(tensors[key].shape)
        shape[axis] = length
        tensors[key] = tensors[key].new_empty(shape)

    def read(key: str) -> Tensor:
        value = weights.read(key)
        if key not in cuts:
            return value
        axis, index, _ = cuts[key]
        return pad_to(value.index_select(axis, index), tensors[key].shape)

    return tensors, read


def _groups(weights: Weights, out: Site) -> int:
    heads: Any = heads_of(weights.model, weights.model.get_submodule(out.path.rpartition(".")[0]))
    return heads.groups
