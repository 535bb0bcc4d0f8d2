"""A diagram at its place in a larger matrix: permuted, pruned and sliced matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.structure import matmul
from tenfold.structure.einsum_spec import EinsumSpec


@dataclass(frozen=True)
class ScatteredEinsum:
    """A diagram and where its matrix lies in a larger one.

    ``rows`` and ``columns`` name index maps among the factors, innermost first: entry ``(i, j)`` of the diagram's
    matrix lies at ``(rows[i], columns[j])``. No name means the identity, a number instead of a name a shift by so
    many places. An index map is not a parameter.

    Args:
        shape: ``(out, in)`` of the larger matrix; None where it is the diagram's own.
        maps: ``(name, length, into)`` of every index map: ``length`` numbers below ``into``.
    """

    diagram: EinsumSpec
    rows: tuple[str | int, ...] = ()
    columns: tuple[str | int, ...] = ()
    outer: tuple[int, int] | None = None
    maps: tuple[tuple[str, int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.outer or self.diagram.shape

    def renamed(self, rename) -> ScatteredEinsum:
        maps = tuple((rename(name), length, into) for name, length, into in self.maps)
        rows, columns = (
            tuple(rename(x) if isinstance(x, str) else x for x in side) for side in (self.rows, self.columns)
        )
        return ScatteredEinsum(self.diagram.renamed(rename), rows, columns, self.outer, maps)

    def transposed(self) -> ScatteredEinsum:
        outer = None if self.outer is None else (self.outer[1], self.outer[0])
        return ScatteredEinsum(self.diagram.transposed(), self.columns, self.rows, outer, self.maps)

    def index(self, factors: dict[str, Tensor], side: str) -> Tensor | None:
        """The composed index map of ``side``, "rows" or "columns"; None for the identity."""
        steps, axis = getattr(self, side), 0 if side == "rows" else 1
        if not steps:
            return None
        if isinstance(steps[0], str):
            index, steps = factors[steps[0]].long(), steps[1:]
        else:
            index = torch.arange(self.diagram.shape[axis], device=next(iter(factors.values())).device)
        for step in steps:
            index = index + step if isinstance(step, int) else factors[step].long()[index]
        return index

    def tensors(self, factors: dict[str, Tensor]) -> list[Tensor]:
        return [factors[name] for name in self.diagram.names]

    @property
    def rows_from(self) -> int | None:
        """The first of its rows, where they follow each other and no map is needed."""
        starts = [step for step in self.rows if isinstance(step, int)]
        return sum(starts) if len(starts) == len(self.rows) else None

    def block(self, factors: dict[str, Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x (n, in) @ W.T + bias`` of its own rows ``(n, k)``."""
        return matmul.apply(self.diagram, self.tensors(factors), self.picked(factors, x), bias)

    def apply(self, factors: dict[str, Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x (n, in) @ W.T + bias -> (n, out)``."""
        return self._scattered(factors, self.block(factors, x), bias)

    def product(self, factors: dict[str, Tensor], names: tuple[str, ...], x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x (..., in) @ W.T + bias``, where the matrices ``names`` multiply to the diagram's matrix."""
        x = self.picked(factors, x)
        for name in names[:0:-1]:
            x = torch.nn.functional.linear(x, factors[name])
        if not self.rows:
            return torch.nn.functional.linear(x, factors[names[0]], bias)
        return self._scattered(factors, torch.nn.functional.linear(x, factors[names[0]]), bias)

    def _scattered(self, factors: dict[str, Tensor], y: Tensor, bias: Tensor | None) -> Tensor:
        if self.rows_from is not None:  # no index needed
            y = torch.nn.functional.pad(y, (self.rows_from, self.shape[0] - self.rows_from - y.shape[-1]))
        elif (rows := self.index(factors, "rows")) is not None:
            y = spread(y, rows, self.shape[0])
        return y if bias is None else y + bias.to(y.dtype)

    @property
    def columns_from(self) -> int | None:
        """The first of its columns, where they are a block and no index is needed."""
        first = self.columns[0] if len(self.columns) == 1 else None
        return first if isinstance(first, int) else None

    def picked(self, factors: dict[str, Tensor], x: Tensor) -> Tensor:
        if self.columns_from is not None:
            return x.narrow(-1, self.columns_from, self.diagram.shape[1])
        columns = self.index(factors, "columns")
        return x if columns is None else x.index_select(-1, columns)

    def rows_at(self, factors: dict[str, Tensor], index: Tensor) -> Tensor:
        """``W[index] (n, in)``"""
        rows, columns = self.index(factors, "rows"), self.index(factors, "columns")
        inside = None
        if rows is not None:
            inverse = index.new_full((self.shape[0],), -1)
            inverse[rows] = torch.arange(len(rows), device=index.device, dtype=index.dtype)
            index = inverse[torch.where(index < 0, len(inverse), index)]  # a row that does not exist raises IndexError
            inside, index = index >= 0, index.clamp_min(0)
        w = matmul.rows_of(self.diagram, self.tensors(factors), index)
        w = w if inside is None else w * inside[:, None]
        return w if columns is None else spread(w, columns, self.shape[1])

    def dense(self, factors: dict[str, Tensor]) -> Tensor:
        """Return ``W (out, in)``."""
        w = matmul.dense(self.diagram, self.tensors(factors))
        rows, columns = self.index(factors, "rows"), self.index(factors, "columns")
        w = w if columns is None else spread(w, columns, self.shape[1])
        return w if rows is None else spread(w.T, rows, self.shape[0]).T


def spread(y: Tensor, index: Tensor, size: int) -> Tensor:
    """``y (..., k)`` at the columns ``index`` of zeros ``(..., size)``."""
    if len(index) == size and not torch.is_grad_enabled():  # a permutation
        return y.index_select(-1, index.argsort())
    # index_copy would keep y for backward
    return y.new_zeros(*y.shape[:-1], size).scatter(-1, index.expand(y.shape), y)
