"""One contraction of two operands as a product of matrices, one or a batch of them, with as few copies as their layouts allow.

Every label is one of four: in both operands and the result (batch), in both and summed, or in one operand and the result
(rows, columns). An operand whose labels lie in memory so that each of these groups is one axis is used as it lies, transposed or
not; another one is copied, its first axis staying first, since a row of many vectors is the slowest axis almost always.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

FEW = 16  # products of a batch that are made one by one, straight to where they belong


@dataclass(frozen=True)
class Pair:
    """``one, other -> kept``, and which labels are of which kind."""

    one: str
    other: str
    kept: str
    batch: str
    summed: str
    rows: str
    columns: str


@cache
def pair_of(equation: str) -> Pair | None:
    """None where the contraction is no product of matrices: one operand, nothing summed, or a label summed in one alone."""
    (*terms, kept) = equation.replace("->", ",").split(",")
    if len(terms) != 2:
        return None
    one, other = terms
    both = [x for x in one if x in other]
    summed = "".join(x for x in both if x not in kept)
    if not summed or any(x not in kept and x not in summed for x in one + other):
        return None
    rows, columns = ("".join(x for x in term if x not in both) for term in terms)
    return Pair(one, other, kept, "".join(x for x in both if x in kept), summed, rows, columns)


def multiply(pair: Pair, one: Tensor, other: Tensor, copies: dict[tuple, Tensor] | None = None) -> Tensor:
    """The contraction; ``copies`` keeps what had to be copied for a later product with the same operand."""
    larger = pair.one if one.numel() >= other.numel() else pair.other
    batch, summed = ("".join(x for x in larger if x in group) for group in (pair.batch, pair.summed))
    a = _matrices(one, pair.one, (batch, pair.rows, summed), copies)
    b = _matrices(other, pair.other, (batch, summed, pair.columns), copies)
    size = dict(zip(pair.one, one.shape, strict=True)) | dict(zip(pair.other, other.shape, strict=True))
    first = pair.kept[:1]
    if not batch:
        order = (pair.columns, pair.rows) if first in pair.columns else (pair.rows, pair.columns)
        made = b[0].mT @ a[0].mT if first in pair.columns else a[0] @ b[0]
    elif first in batch or len(a) > FEW or torch.is_grad_enabled():
        order, made = (batch, pair.rows, pair.columns), torch.bmm(a, b)
    else:
        if first in pair.columns:
            a, b, order = b.mT, a.mT, (pair.columns, batch, pair.rows)
        else:
            order = (pair.rows, batch, pair.columns)
        made = a.new_empty(a.shape[1], len(a), b.shape[2])
        for k in range(len(a)):
            torch.mm(a[k], b[k], out=made[:, k])
    labels = "".join(order)
    return made.view([size[x] for x in labels]).permute([labels.index(x) for x in pair.kept])


def _matrices(value: Tensor, labels: str, groups: tuple[str, str, str], copies: dict[tuple, Tensor] | None) -> Tensor:
    """``value`` with one axis for each of ``groups``."""
    if not all(_together(value, labels, group) for group in groups):
        flat = "".join(sorted(groups, key=lambda group: min(map(labels.index, group), default=-1)))
        known = None if copies is None else copies.get((id(value), flat))
        if known is None:
            known = value.permute([labels.index(x) for x in flat]).contiguous()
            if copies is not None:
                copies[id(value), flat] = known
        value, labels = known, flat
    shape = [prod(value.shape[labels.index(x)] for x in group) for group in groups]
    return value.permute([labels.index(x) for group in groups for x in group]).view(shape)


def _together(value: Tensor, labels: str, group: str) -> bool:
    """Whether the axes ``group`` are one axis in memory, the last one fastest."""
    axes = [axis for axis in map(labels.index, group) if value.shape[axis] != 1]
    return all(value.stride(one) == value.stride(other) * value.shape[other] for one, other in pairwise(axes))
