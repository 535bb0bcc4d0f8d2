"""A diagram at its place in a larger matrix: permuted, pruned and sliced matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.structure import contract
from tenfold.structure.diagram import Diagram


@dataclass(frozen=True)
class Placement:
    """A diagram and where its matrix lies in a larger one.

    ``rows`` and ``columns`` name index maps among the factors, innermost first: entry ``(i, j)`` of the diagram's
    matrix lies at ``(rows[i], columns[j])``. No name means the identity. An index map is not a parameter.

    Args:
        shape: ``(out, in)`` of the larger matrix; None where it is the diagram's own.
        maps: ``(name, length, into)`` of every index map: ``length`` numbers below ``into``.
    """

    diagram: Diagram
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    outer: tuple[int, int] | None = None
    maps: tuple[tuple[str, int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.outer or self.diagram.shape

    def renamed(self, rename) -> Placement:
        maps = tuple((rename(name), length, into) for name, length, into in self.maps)
        return Placement(
            self.diagram.renamed(rename), tuple(map(rename, self.rows)), tuple(map(rename, self.columns)), self.outer, maps
        )

    def transposed(self) -> Placement:
        outer = None if self.outer is None else self.outer[::-1]
        return Placement(self.diagram.transposed(), self.columns, self.rows, outer, self.maps)

    def index(self, factors: dict[str, Tensor], side: str) -> Tensor | None:
        """The composed index map of ``side``, "rows" or "columns"; None for the identity."""
        index = None
        for name in getattr(self, side):
            index = factors[name].long() if index is None else factors[name].long()[index]
        return index

    def tensors(self, factors: dict[str, Tensor]) -> list[Tensor]:
        return [factors[name] for name in self.diagram.names]

    def apply(self, factors: dict[str, Tensor], x: Tensor) -> Tensor:
        """``x (n, in) @ W.T -> (n, out)``"""
        rows, columns = self.index(factors, "rows"), self.index(factors, "columns")
        y = contract.apply(self.diagram, self.tensors(factors), x if columns is None else x.index_select(-1, columns))
        return y if rows is None else _spread(y, rows, self.shape[0])

    def rows_at(self, factors: dict[str, Tensor], index: Tensor) -> Tensor:
        """``W[index] (n, in)``"""
        rows, columns = self.index(factors, "rows"), self.index(factors, "columns")
        inside = None
        if rows is not None:
            inverse = index.new_full((self.shape[0],), -1)
            inverse[rows] = torch.arange(len(rows), device=index.device, dtype=index.dtype)
            index = inverse[index]
            inside, index = index >= 0, index.clamp_min(0)
        w = contract.rows_of(self.diagram, self.tensors(factors), index)
        w = w if inside is None else w * inside[:, None]
        return w if columns is None else _spread(w, columns, self.shape[1])

    def dense(self, factors: dict[str, Tensor]) -> Tensor:
        """``W (out, in)``"""
        rows, columns = self.index(factors, "rows"), self.index(factors, "columns")
        w = contract.dense(self.diagram, self.tensors(factors))
        w = w if columns is None else _spread(w, columns, self.shape[1])
        return w if rows is None else _spread(w.T, rows, self.shape[0]).T


def _spread(y: Tensor, index: Tensor, size: int) -> Tensor:
    """``y (n, k)`` at the columns ``index`` of zeros ``(n, size)``."""
    return y.new_zeros(len(y), size).index_copy(-1, index, y)
