"""An einsum whose matrix occupies selected rows and columns of a larger one: permuted, pruned and sliced matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from tenfold.structure import matmul
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.few_rows import is_traced, linear


@dataclass(frozen=True)
class ScatteredEinsum:
    """An einsum and the position of its matrix in a larger one, which is zero elsewhere.

    ``rows`` and ``columns`` name index maps among the factors, innermost first: element ``(i, j)`` of the einsum's matrix
    lies at ``(rows[i], columns[j])``. Without a name it is the identity; an integer instead of a name is an offset. Index
    maps are not parameters.
    """

    spec: EinsumSpec
    rows: tuple[str | int, ...] = ()
    columns: tuple[str | int, ...] = ()
    outer: tuple[int, int] | None = None  # shape of the larger matrix; None if it is that of the einsum
    maps: tuple[tuple[str, int, int], ...] = ()  # ``(name, length, limit)``: ``length`` integers below ``limit``

    @property
    def shape(self) -> tuple[int, int]:
        return self.outer or self.spec.shape

    def rename_factors(self, rename: Callable[[str], str]) -> ScatteredEinsum:
        rows, columns = (
            tuple(rename(x) if isinstance(x, str) else x for x in side) for side in (self.rows, self.columns)
        )
        maps = tuple((rename(name), length, limit) for name, length, limit in self.maps)
        return ScatteredEinsum(self.spec.rename_factors(rename), rows, columns, self.outer, maps)

    def index(self, factors: dict[str, Tensor], side: str) -> Tensor | None:
        """Return the composed index map of ``side`` ("rows" or "columns"); None for the identity."""
        maps = getattr(self, side)
        if not maps:
            return None
        first, *others = maps
        if isinstance(first, str):
            index = factors[first].long()
        else:
            index = torch.arange(self.spec.shape[side == "columns"], device=next(iter(factors.values())).device) + first
        for one in others:
            index = index + one if isinstance(one, int) else factors[one].long()[index]
        return index

    @property
    def first_row(self) -> int | None:
        """The offset of the rows if they are contiguous; None if index maps select them."""
        return _offset(self.rows)

    def apply(self, factors: dict[str, Tensor], x: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        """Return ``x (n, in) @ W.T + bias -> (n, size)``, ``size`` all rows of ``W`` or a block that the einsum fills."""
        alone = self.first_row is not None and self.spec.shape[0] == size
        selected = self._select_columns(factors, x)
        y = matmul.apply(self.spec, self._tensors(factors), selected, bias if alone else None)
        return y if alone else self._scatter_rows(factors, y, bias)

    def apply_matrices(self, factors: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        first, *others = self.spec.names
        x = self._select_columns(factors, x)
        for name in reversed(others):
            x = linear(x, factors[name])
        if not self.rows:
            return linear(x, factors[first], bias)
        return self._scatter_rows(factors, linear(x, factors[first]), bias)

    def look_up(self, factors: dict[str, Tensor], index: Tensor) -> Tensor:
        rows, columns = self.index(factors, "rows"), self.index(factors, "columns")
        inside = None
        if rows is not None:
            inverse = index.new_full((self.shape[0],), -1)
            inverse[rows] = torch.arange(len(rows), device=index.device, dtype=index.dtype)
            index = inverse[torch.where(index < 0, len(inverse), index)]  # a row out of range raises IndexError
            inside, index = index >= 0, index.clamp_min(0)
        w = matmul.look_up_rows(self.spec, self._tensors(factors), index)
        w = w if inside is None else w * inside[:, None]
        return w if columns is None else scatter_columns(w, columns, self.shape[1])

    def look_up_block(self, factors: dict[str, Tensor], index: Tensor) -> Tensor:
        """Return the rows ``index`` of its own block of rows, zero for those that are outside of it."""
        size = self.spec.shape[0]
        inside = (index >= 0) & (index < size)
        return replace(self, rows=()).look_up(factors, index.clamp(0, size - 1)) * inside[:, None]

    def dense_block(self, factors: dict[str, Tensor]) -> Tensor:
        """Return its own block of rows."""
        return replace(self, rows=(), outer=(self.spec.shape[0], self.shape[1])).dense(factors)

    def dense(self, factors: dict[str, Tensor]) -> Tensor:
        w = matmul.dense(self.spec, self._tensors(factors))
        rows, columns = self.index(factors, "rows"), self.index(factors, "columns")
        w = w if columns is None else scatter_columns(w, columns, self.shape[1])
        return w if rows is None else scatter_columns(w.T, rows, self.shape[0]).T

    def _tensors(self, factors: dict[str, Tensor]) -> list[Tensor]:
        return [factors[name] for name in self.spec.names]

    def _select_columns(self, factors: dict[str, Tensor], x: Tensor) -> Tensor:
        if self.columns and (offset := _offset(self.columns)) is not None:  # a slice, no index needed
            return x.narrow(-1, offset, self.spec.shape[1])
        index = self.index(factors, "columns")
        return x if index is None else x.index_select(-1, index)

    def _scatter_rows(self, factors: dict[str, Tensor], y: Tensor, bias: Tensor | None) -> Tensor:
        if (offset := self.first_row) is not None:  # no index needed
            y = torch.nn.functional.pad(y, (offset, self.shape[0] - offset - y.shape[-1]))
        elif (index := self.index(factors, "rows")) is not None:
            y = scatter_columns(y, index, self.shape[0])
        return y if bias is None else y + bias.to(y.dtype)


def einsum(
    outs: str, ins: str, factors: dict[str, str], sizes: dict[str, int], ones: tuple[str, ...] = ()
) -> tuple[ScatteredEinsum, ...]:
    """Return the normal form of one einsum, labels separated by spaces: ``einsum("o", "i", {"matrix": "o i"}, sizes)``."""
    split = tuple((name, tuple(labels.split())) for name, labels in factors.items())
    return (ScatteredEinsum(EinsumSpec(tuple(outs.split()), tuple(ins.split()), split, tuple(sizes.items()), ones)),)


def label_sizes(prefix: str, sizes: tuple[int, ...]) -> dict[str, int]:
    """Return ``{prefix0: sizes[0], prefix1: sizes[1], ...}``."""
    return {f"{prefix}{k}": size for k, size in enumerate(sizes)}


def shared_row_map(einsums: Sequence[ScatteredEinsum]) -> str | None:
    """Return the name of the index map that comes last for the rows of several einsums and permutes them; None without one."""
    (name, *more) = {one.rows[-1] if one.rows else None for one in einsums}
    lengths = {map: length for one in einsums for map, length, _ in one.maps}
    if not isinstance(name, str) or more or len(einsums) < 2:
        return None
    return name if lengths[name] == einsums[0].shape[0] else None


def row_blocks(
    einsums: Sequence[ScatteredEinsum], row_map: str | None = None
) -> list[tuple[int, int, list[ScatteredEinsum]]]:
    """Return ``(first row, number of rows, einsums)`` of blocks of contiguous rows; one block if index maps scatter the rows.

    The rows are those in front of ``row_map``, which the einsums then lack.
    """
    inner = [one if row_map is None else replace(one, rows=one.rows[:-1]) for one in einsums]
    blocks: dict[tuple[int, int], list[ScatteredEinsum]] = {}
    for one in inner:
        blocks.setdefault((one.first_row or 0, one.spec.shape[0]), []).append(one)
    ordered, out = sorted(blocks), einsums[0].shape[0]
    starts = accumulate((size for _, size in ordered), initial=0)
    if any(one.first_row is None for one in inner) or [*(start for start, _ in ordered), out] != list(starts):
        return [(0, out, inner)]
    return [(*block, blocks[block]) for block in ordered]


def look_up_blocks(
    blocks: Sequence[tuple[int, int, list[ScatteredEinsum]]], factors: dict[str, Tensor], index: Tensor
) -> Tensor:
    """Return the rows ``index`` of what ``row_blocks`` returned, each from its own block only.

    Every block computes all rows where the call is traced, or on an accelerator, which would wait for the numbers of rows.
    """
    if is_traced() or index.device.type != "cpu" or not len(index):
        parts = [one.look_up_block(factors, index - first) for first, _, some in blocks for one in some]
        return sum(parts[1:], parts[0])
    places = [((index >= first) & (index < first + size)).nonzero().flatten() for first, size, _ in blocks]
    found = []
    for (first, _, some), at in zip(blocks, places, strict=True):
        if len(at):
            parts = [one.look_up_block(factors, index[at] - first) for one in some]
            found.append(sum(parts[1:], parts[0]))
    return torch.cat(found)[invert(torch.cat(places))]


def _offset(maps: tuple[str | int, ...]) -> int | None:
    """Return the sum of ``maps`` if all are offsets."""
    offsets = [one for one in maps if isinstance(one, int)]
    return sum(offsets) if len(offsets) == len(maps) else None


def scatter_columns(y: Tensor, index: Tensor, size: int) -> Tensor:
    """Return zeros ``(..., size)`` with ``y (..., k)`` at the columns ``index``."""
    if len(index) == size and not torch.is_grad_enabled():  # a permutation
        return y.index_select(-1, invert(index))
    # index_copy would keep y for backward
    return y.new_zeros(*y.shape[:-1], size).scatter(-1, index.expand(y.shape), y)


def invert(index: Tensor) -> Tensor:
    """Return the inverse of a permutation."""
    return torch.empty_like(index).scatter(0, index, torch.arange(len(index), device=index.device))
