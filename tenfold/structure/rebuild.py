"""``W`` made of its factors: as a whole, or some of its rows after the other.

On a processor memory that is new costs more time than what is written there: a page is cleared before it can be used. So a
large ``W`` that is multiplied once is never whole: its rows are made, multiplied and forgotten in parts, in the same memory, and
the gradients of the factors come from parts of ``dW = dy^T x`` likewise. Elsewhere, and in compiled code, this is done to the
largest only: the matrices of heads and embeddings can be larger than the rest of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from tenfold.structure.diagram import Diagram
from tenfold.structure.pair import Target
from tenfold.structure.plan import Gathered, Plan, Values, plan_of, run
from tenfold.structure.traced import is_traced

PART = 2**21  # numbers of a part at most; of a smaller W there are no parts
TABLE = 2**25  # on other devices and in compiled code, where only memory counts; a larger W has SOME parts at most
SOME = 16


@lru_cache(maxsize=4096)
def rebuild(diagram: Diagram, first: int = 0) -> Plan:
    """The plan of ``W``, factor ``first`` before the others."""
    labels = [labels for _, labels in diagram.factors]
    labels.insert(0, labels.pop(first))
    return plan_of(tuple(labels), (*diagram.outs, *diagram.ins), diagram.sizes)


def dense(diagram: Diagram, factors: list[Tensor], onto: Tensor | None = None) -> Tensor:
    """``W (out, in)``; added to ``onto``, if it is given."""
    if onto is not None:
        place = onto.view(diagram.shape_of((*diagram.outs, *diagram.ins)))
        Values(rebuild(diagram), factors).result(Target(place, add=True))
        return onto
    parts = in_parts(diagram, factors)
    if parts is None:
        return run(rebuild(diagram), factors).reshape(diagram.shape)
    w = factors[0].new_empty(diagram.shape)
    for rows, values in parts:
        parts.write(values, w[rows])
    return w


def back(diagram: Diagram, factors: list[Tensor], dw: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Gradients of the factors, those that are needed, from that of ``W (out, in)``."""
    values = Values(rebuild(diagram), factors)
    return values.back(dw.reshape(diagram.shape_of((*diagram.outs, *diagram.ins))), needs)


def in_parts(diagram: Diagram, factors: list[Tensor], little: bool = False) -> Parts | Slices | None:
    """None where ``W`` is made as a whole: it is small, or somebody else looks for the gradients.

    ``little``: beside the gradient of a part there are its copy and, of a tensor train, what is between two cores; parts are so
    small that all of this is no more than ``W``, which takes longer.
    """
    if is_traced() or torch.is_grad_enabled():
        return None
    part = min(PART // 2, prod(diagram.shape) // 3) if little else PART
    if (cut := _cut(diagram, part) if factors[0].device.type == "cpu" else cut_of_table(diagram)) is None:
        return None
    first, axis, step = cut
    return Slices(diagram, factors, step) if first is None else Parts(diagram, factors, first, axis, step)


@lru_cache(maxsize=4096)
def _cut(diagram: Diagram, part: int) -> tuple[int | None, int, int] | None:
    """The factor whose slices make parts of the rows, its axis, and how many numbers of the axis a part has at most.

    No factor where those of all do: every row has its own.
    """
    if not diagram.outs or len(diagram.factors) == 1:
        return None
    having = [k for k, (_, labels) in enumerate(diagram.factors) if diagram.outs[0] in labels]
    size, numbers = diagram.size(diagram.outs[:1]), prod(diagram.shape)
    fitting = max(1, size * part // numbers)
    if fitting >= size:
        return None
    step = -(-size // -(-size // fitting))
    if len(diagram.outs) == 1 and len(having) == len(diagram.factors):
        return None, 0, step
    if len(having) != 1:
        return None
    (first,) = having
    return first, diagram.factors[first][1].index(diagram.outs[0]), step


@torch.compiler.assume_constant_result
def cut_of_table(diagram: Diagram) -> tuple[int | None, int, int] | None:
    """As :func:`_cut`, so that a table is never whole: the matrix of a head or an embedding."""
    return _cut(diagram, max(TABLE, prod(diagram.shape) // SOME))


def traced(diagram: Diagram, plan: Plan, factors: list[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """``x (n, in) @ W.T + bias`` for code that is compiled, ``W`` made by ``plan``, a table in parts of its rows."""
    cut = cut_of_table(diagram)
    if cut is None:
        return torch.nn.functional.linear(x, run(plan, factors).reshape(diagram.shape), bias)
    which, _, step = cut
    axes = [labels.index(diagram.outs[0]) if diagram.outs[0] in labels else None for _, labels in diagram.factors]
    if which is not None:
        axes = [axis if k == which else None for k, axis in enumerate(axes)]
    size, made = diagram.size(diagram.outs[:1]), []
    for begin in range(0, size, step):
        length = min(step, size - begin)
        some = [f if axis is None else f.narrow(axis, begin, length) for f, axis in zip(factors, axes, strict=True)]
        made.append(x @ run(plan, some).reshape(-1, diagram.shape[1]).T)
    y = torch.cat(made, 1)
    return y if bias is None else y + bias


class Parts:
    """``W`` by parts of its rows: iterate for the rows of every part, and the values of the plan that makes it."""

    def __init__(self, diagram: Diagram, factors: list[Tensor], first: int, axis: int, step: int):
        self.diagram, self.place, self.axis, self.step = diagram, first, axis, step
        self.first, self.others = factors[first], [*factors[:first], *factors[first + 1 :]]
        self.plan = rebuild(diagram, first)
        self.whole = Values(self.plan, [self.first, *self.others])

    def __iter__(self) -> Iterator[tuple[slice, Values]]:
        each, begin = self.diagram.shape[0] // self.first.shape[self.axis], 0
        for some in self.first.split(self.step, self.axis):
            rows = slice(begin, begin + each * some.shape[self.axis])
            yield rows, Values(self.plan, [some, *self.others], self.whole)
            begin = rows.stop

    def write(self, values: Values, to: Tensor) -> None:
        """These rows of ``W`` to where they belong."""
        values.result(Target(self.folded(to)))

    def folded(self, some: Tensor) -> Tensor:
        """Rows of ``W`` with an axis for every label."""
        return some.view(-1, *self.diagram.shape_of((*self.diagram.outs[1:], *self.diagram.ins)))

    def memory(self) -> Tensor:
        """For the largest part of ``W``."""
        rows = self.diagram.shape[0] * self.step // self.first.shape[self.axis]
        return self.first.new_empty(rows, self.diagram.shape[1])

    def multiply(self, x: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """``x (n, in) @ W.T + bias``; without a bias it may be added to ``onto``."""
        y, memory = x.new_empty(x.shape[0], self.diagram.shape[0]) if onto is None else onto, self.memory()
        for rows, values in self:
            w = memory[: rows.stop - rows.start]
            self.write(values, w)
            _multiply(x, w.T, y[:, rows], None if bias is None else bias[rows], onto is not None)
        return y

    def back(
        self, x: Tensor, dy: Tensor, of_x: bool, needs: list[bool], onto: Tensor | None = None
    ) -> list[Tensor | None]:
        """``dy @ W``, if it is wanted (added to ``onto``, if it is given), and the gradients of the factors that are needed."""
        first, others = needs[self.place], [*needs[: self.place], *needs[self.place + 1 :]]
        gathered, memory = Gathered(self.whole, [first, *others]), self.memory()
        dx = dy.new_empty(dy.shape[0], self.diagram.shape[1] if of_x else 0) if onto is None else onto
        made = torch.empty_like(self.first) if first else None
        places = (self.first if made is None else made).split(self.step, self.axis)
        for (rows, values), place in zip(self, places, strict=True):
            some = memory[: rows.stop - rows.start]
            if of_x:
                self.write(values, some)
                torch.addmm(dx, dy[:, rows], some, beta=int(rows.start > 0 or onto is not None), out=dx)
            if any(needs):  # dW takes the place of W
                gathered.add(values, self.folded(torch.mm(dy[:, rows].T, x, out=some)), place)
        found = gathered.rest() if any(needs) else [None for _ in others]
        return [dx if of_x else None, *found[: self.place], made, *found[self.place :]]


class Slices:
    """``W`` by parts of its rows, where every row has factors of its own (a tensor train per row): parts share nothing."""

    def __init__(self, diagram: Diagram, factors: list[Tensor], step: int):
        self.diagram, self.factors, self.step = diagram, factors, step
        self.axes = [labels.index(diagram.outs[0]) for _, labels in diagram.factors]

    def __iter__(self) -> Iterator[tuple[slice, Values]]:
        each = zip(
            *(factor.split(self.step, axis) for factor, axis in zip(self.factors, self.axes, strict=True)), strict=True
        )
        begin, (label,) = 0, self.diagram.outs
        for some in each:
            size = some[0].shape[self.axes[0]]
            sizes = tuple((name, size if name == label else number) for name, number in self.diagram.sizes)
            yield slice(begin, begin + size), Values(rebuild(replace(self.diagram, sizes=sizes)), list(some))
            begin += size

    def write(self, values: Values, to: Tensor) -> None:
        """These rows of ``W`` to where they belong."""
        to.copy_(self._made(values))

    def _made(self, values: Values) -> Tensor:
        return values.result().reshape(-1, self.diagram.shape[1])

    def multiply(self, x: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """``x (n, in) @ W.T + bias``; without a bias it may be added to ``onto``."""
        y = x.new_empty(x.shape[0], self.diagram.shape[0]) if onto is None else onto
        for rows, values in self:
            _multiply(x, self._made(values).T, y[:, rows], None if bias is None else bias[rows], onto is not None)
        return y

    def back(
        self, x: Tensor, dy: Tensor, of_x: bool, needs: list[bool], onto: Tensor | None = None
    ) -> list[Tensor | None]:
        """``dy @ W``, if it is wanted (added to ``onto``, if it is given), and the gradients of the factors that are needed."""
        dx = onto if onto is not None or not of_x else dy.new_zeros(dy.shape[0], self.diagram.shape[1])
        found = [torch.empty_like(factor) if need else None for factor, need in zip(self.factors, needs, strict=True)]
        for rows, values in self:
            if dx is not None and of_x:
                dx.addmm_(dy[:, rows], self._made(values))
            if any(needs):
                dw = (dy[:, rows].T @ x).view(-1, *self.diagram.shape_of(self.diagram.ins))
                for whole, axis, some in zip(found, self.axes, values.back(dw, needs), strict=True):
                    if whole is not None and some is not None:
                        whole.narrow(axis, rows.start, rows.stop - rows.start).copy_(some)
        return [dx, *found]


def _multiply(x: Tensor, w: Tensor, into: Tensor, bias: Tensor | None, add: bool) -> None:
    """``x @ w + bias`` to where ``into`` lies, or, without a bias, on top of what is there."""
    start = into if add else bias
    if start is None:
        torch.mm(x, w, out=into)
    else:
        torch.addmm(start, x, w, out=into)
