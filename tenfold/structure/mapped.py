"""A diagram between two index maps, on a processor: the cheaper side is put into another order, in memory that is in use.

``W[rows[i], columns[j]]`` is the diagram's entry ``(i, j)``. Permuted copies of a large ``x`` and ``y`` cost up to half of what a
dense layer takes, and autograd would keep the copy of ``x``. Where ``W`` is made for the product, ``W`` is permuted instead; a
chain of products takes some rows of ``x`` at a time, so that what is copied stays in the cache. Only ``x`` and the factors are
kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tenfold.structure import contract, joint, rebuild
from tenfold.structure.diagram import Diagram
from tenfold.structure.hold import Hold
from tenfold.structure.traced import is_traced

PART = 512  # rows
FEWEST = 1024  # rows below which nothing is gained


@dataclass(frozen=True)
class Maps:
    """Index maps of a matrix ``(out, in)``; None for the identity."""

    rows: Tensor | None
    columns: Tensor | None
    out: int
    inner: int

    @property
    def whole(self) -> bool:
        """Whether they only change the order."""
        return all(
            index is None or len(index) == size for index, size in ((self.rows, self.out), (self.columns, self.inner))
        )

    def spread_out(self, w: Tensor) -> Tensor:
        """The matrix in which the entries of ``w`` lie at their places, as torch can differentiate it."""
        if self.columns is not None:
            w = w.new_zeros(len(w), self.inner).index_copy(1, self.columns, w)
        return w if self.rows is None else w.new_zeros(self.out, self.inner).index_copy(0, self.rows, w)

    def placed(self, w: Tensor) -> Tensor:
        """The matrix in which the entries of ``w`` lie at their places; beside both a few rows at most are in memory."""
        if self.columns is None and self.rows is None:
            return w
        made = w.new_zeros(self.out, self.inner)
        if self.rows is None:
            return _spread(w, self.columns, made)
        few = w.new_empty(min(len(w), PART), self.inner)
        for some, at in zip(w.split(PART), self.rows.split(PART), strict=True):
            made.index_copy_(0, at, _spread(some, self.columns, few[: len(some)]))
        return made

    def picked(self, w: Tensor) -> Tensor:
        """The entries of :meth:`placed`, back where they came from."""
        w = w if self.rows is None else w.index_select(0, self.rows)
        return w if self.columns is None else w.gather(1, self.columns.expand(len(w), -1))


def many(x: Tensor) -> bool:
    """Whether ``x`` is large enough, and on a device, for :func:`multiply` to be worth a look."""
    if x.device.type != "cpu" or is_traced() or torch.is_autocast_enabled("cpu"):
        return False
    return x.shape[0] >= FEWEST


def serves(diagram: Diagram, x: Tensor, maps: Maps) -> bool:
    """Whether :func:`multiply` is faster than copies of :func:`many` rows ``x`` and ``y``."""
    return maps.whole or contract.is_chain(diagram, x)


def multiply(diagram: Diagram, factors: list[Tensor], x: Tensor, bias: Tensor | None, maps: Maps, hold: Hold) -> Tensor:
    """``x (n, in) @ W.T + bias -> (n, out)``; ``hold.matrices`` as everywhere."""
    diagram, factors = contract.slim(diagram, factors)
    if not torch.is_grad_enabled():
        return _forward(diagram, factors, x, bias, maps)[0]
    return _Mapped.apply(diagram, maps.out, hold.matrices, x, bias, maps.rows, maps.columns, *factors)


def _forward(
    diagram: Diagram, factors: list[Tensor], x: Tensor, bias: Tensor | None, maps: Maps, w: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``y``, and ``W`` if it was made or given."""
    if not contract.is_chain(diagram, x):
        w = maps.placed(rebuild.dense(diagram, factors)) if w is None else w
        return torch.nn.functional.linear(x, w, bias), w
    y, pick = x.new_empty(x.shape[0], maps.out), _Picker(maps.columns)
    for some, made in zip(x.split(PART), y.split(PART), strict=True):
        _spread(joint.multiply([(diagram, factors)], pick(some)), maps.rows, made)
        if bias is not None:
            made += bias
    return y, None


class _Picker:
    """``some[:, columns]`` in the same memory every time."""

    def __init__(self, columns: Tensor | None):
        self.columns, self.memory = columns, None

    def __call__(self, some: Tensor) -> Tensor:
        if self.columns is None:
            return some
        if self.memory is None:
            self.memory = some.new_empty(len(some), len(self.columns))
        return torch.gather(some, 1, self.columns.expand(len(some), -1), out=self.memory[: len(some)])


def _spread(y: Tensor, index: Tensor | None, made: Tensor) -> Tensor:
    """``made[:, index] = y``, zero elsewhere."""
    if index is None:
        return made.copy_(y)
    if len(index) < made.shape[1]:
        made.zero_()
    return made.scatter_(1, index.expand(len(y), -1), y)


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, diagram, out, matrix, x, bias, rows, columns, *factors):
        ctx.diagram, ctx.out = diagram, out
        key = (
            diagram,
            out,
            rows is None,
            columns is None,
            *(value.data_ptr() for value in factors),
        )  # maps are made anew
        known = None if matrix is None else matrix.get(key)
        y, w = _forward(diagram, list(factors), x, bias, Maps(rows, columns, out, x.shape[1]), known)
        if matrix is not None and w is not None:
            matrix[key] = w
        ctx.save_for_backward(x, rows, columns, None if matrix is None else w, *factors)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, rows, columns, w, *factors = ctx.saved_tensors
        (*_, of_x, of_bias, _, _), of_factors = ctx.needs_input_grad[:7], list(ctx.needs_input_grad[7:])
        maps = Maps(rows, columns, ctx.out, x.shape[1])
        with torch.autocast("cpu", enabled=False):
            given = (ctx.diagram, x, factors, dy, [of_x, *of_factors], maps)
            if torch.is_grad_enabled():
                make = partial(_whole, ctx.diagram, maps)
                dx, *others = contract.differentiable(make, x, factors, dy, [of_x, *of_factors])
            elif contract.is_chain(ctx.diagram, x):
                dx, *others = _back_parts(*given)
            else:
                dx, *others = _back_whole(*given, w)
        return None, None, None, dx, dy.sum(0) if of_bias else None, None, None, *others


def _back_whole(
    diagram: Diagram, x: Tensor, factors: list[Tensor], dy: Tensor, needs: list[bool], maps: Maps, w: Tensor | None
) -> list[Tensor | None]:
    """Through ``W`` and its gradient."""
    dx = None
    if needs[0]:
        dx = dy @ (maps.placed(rebuild.dense(diagram, factors)) if w is None else w)
    if not any(needs[1:]):
        return [dx, *(None for _ in factors)]
    return [dx, *rebuild.back(diagram, factors, maps.picked(dy.T @ x), needs[1:])]


def _back_parts(
    diagram: Diagram, x: Tensor, factors: list[Tensor], dy: Tensor, needs: list[bool], maps: Maps
) -> list[Tensor | None]:
    """Through the chain, some rows of ``x`` after the others."""
    dx = torch.empty_like(x) if needs[0] else None
    totals: list[Tensor | None] = [None for _ in factors]
    pick, back = _Picker(maps.columns), _Picker(maps.rows)
    for some, of, place in zip(x.split(PART), dy.split(PART), (x if dx is None else dx).split(PART), strict=True):
        found, *others = contract.gradients(diagram, pick(some), factors, back(of), needs)
        if found is not None:
            _spread(found.reshape(len(some), -1), maps.columns, place)
        totals = [_sum(total, one) for total, one in zip(totals, others, strict=True)]
    return [dx, *totals]


def _sum(total: Tensor | None, one: Tensor | None) -> Tensor | None:
    if total is None or one is None:
        return one if one is None or 0 not in one.stride() else one.contiguous()  # not what is expanded: it is added to
    return total.add_(one)


def _whole(diagram: Diagram, maps: Maps, factors: list[Tensor]) -> Tensor:
    return maps.spread_out(rebuild.dense(diagram, factors))
