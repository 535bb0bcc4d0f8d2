"""One contraction of two operands as a product of matrices, one or a batch of them, with as few copies as their layouts allow.

Every label is one of four: in both operands and the result (batch), in both and summed, or in one operand and the result
(rows, columns). An operand whose labels lie in memory so that each of these groups is one axis is used as it lies, transposed or
not; another one is copied, its first axis staying first, since a row of many vectors is the slowest axis almost always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import compress, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.structure import entrywise
from tenfold.structure.products import FEW, THIN, empty, fill, one_by_one, packed, put
from tenfold.structure.products import product as plain_product
from tenfold.structure.traced import is_traced

CHEAP = 2**19  # numbers of a factor that is read instead of copied, four for each of what is copied in its place
SKINNY = 8  # of rows, columns and what is summed over two are at most so long: several times slower than what is moved
KERNELS: set[str] = set()  # kinds of devices on which tenfold.structure.kernel makes what would need a copy

# {(id of a tensor, order of axes): (itself, its copy)}
Copies = dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pair:
    """``one, other -> kept``, and which labels are of which kind; operand ``same`` is the same matrix for a whole batch."""

    one: str
    other: str
    kept: str
    batch: str
    summed: str
    rows: str
    columns: str
    same: int | None = None

    def orders(self, one: int, other: int) -> tuple[str, str]:
        """In which order the labels of the batch and the summed ones run, of operands with so many numbers."""
        larger = self.one if (one >= other if self.same is None else self.same == 1) else self.other
        return "".join(x for x in larger if x in self.batch), "".join(x for x in larger if x in self.summed)

    def lies(self, count: int, rows: int, columns: int, between: bool = False) -> tuple[int, int, int]:
        """The order of batch (0), rows (1) and columns (2) in the memory of a result, of so many numbers each.

        What ``kept`` begins with comes first where products are made one by one; a batch comes first otherwise, and ``between``
        two products what the other operand keeps comes last where one is the same for all.
        """
        first = self.kept[:1]
        if one_by_one(count, rows * columns):
            return (0, 1, 2) if first in self.batch else (1, 0, 2) if first in self.rows else (2, 0, 1)
        if between and self.same is not None:
            return (0, 2, 1) if self.same == 1 else (0, 1, 2)
        inner = [x for x in self.kept if x not in self.batch]
        return (0, 1, 2) if inner[:1] == list(self.rows[:1]) or not self.rows else (0, 2, 1)

    def beside(self, side: int, labels: str) -> Pair:
        """The same contraction with kept ``labels`` of operand ``side`` in the other one, too, where it is the same for each."""
        one, other = (self.one, self.other + labels) if side == 0 else (self.one + labels, self.other)
        found = pair_of(f"{one},{other}->{self.kept}")
        assert found is not None
        return found if self.batch else replace(found, same=1 - side)


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


def spread(
    pair: Pair, size: dict[str, int], together: Callable[[int, str], bool], between: bool = True
) -> tuple[int, str] | None:
    """Which operand needs no copy, nor does the result, if some of its labels become those of a batch.

    Either these are few, and a copy of the other operand is smaller; or the other one is the same matrix for each, as for many
    rows of ``x``, and what is left of the labels makes a matrix wide enough.

    Args:
        together: whether labels of operand 0 or 1 are one axis in its memory.
        between: the result may lie in any way.
    """
    terms = (pair.one, pair.other)
    numbers = [prod(size[x] for x in term) for term in terms]
    batch, summed = pair.orders(*numbers)
    side = int(numbers[1] > numbers[0])
    free, beside = (pair.rows, pair.columns)[:: 1 - 2 * side]
    fine = together(side, free) and together(side, batch)
    if not together(side, summed) or (fine and (between or "".join(_labels(pair, size)) == pair.kept)):
        return None
    for split in range(1, len(free)):
        some, rest = free[:split], free[split:]
        outer = "".join(x for x in terms[side] if x in batch + some)
        if not together(side, outer) or not together(side, rest):
            continue
        count = prod(size[x] for x in some)
        copy = count * numbers[1 - side]
        if not fine and copy < numbers[side] and (count <= FEW or 4 * copy < min(numbers[side], CHEAP)):
            return side, some
        placed = between or pair.kept in (some + rest + beside, some + beside + rest)
        if not batch and (placed or not fine) and prod(size[x] for x in rest) >= THIN:
            return side, some
    return None


def pile(pair: Pair, size: dict[str, int], together: Callable[[int, str], bool]) -> str | None:
    """Which of the summed labels are summed after the product, one matrix for each, where copies would be larger than these."""
    terms = (pair.one, pair.other)
    numbers = [prod(size[x] for x in term) for term in terms]
    batch, summed = pair.orders(*numbers)
    free = (pair.rows, pair.columns)
    if batch or not all(together(k, free[k]) for k in range(2)):
        return None
    copied = sum(numbers[k] for k in range(2) if not together(k, summed))
    for split in range(1, len(summed)):
        outer, inner = summed[:split], summed[split:]
        some = prod(size[x] for x in outer + pair.kept)
        if some < copied and prod(size[x] for x in inner) >= THIN and _both(together, outer) and _both(together, inner):
            return outer
    return None


def _both(together: Callable[[int, str], bool], labels: str) -> bool:
    return together(0, labels) and together(1, labels)


def _labels(pair: Pair, size: dict[str, int], between: bool = False) -> tuple[str, str, str]:
    """Batch, rows and columns in the order in which a result lies."""
    batch, _ = pair.orders(*(prod(size[x] for x in term) for term in (pair.one, pair.other)))
    groups = (batch, pair.rows, pair.columns)
    count, rows, columns = (prod(size[x] for x in group) for group in groups)
    first, second, third = pair.lies(count, rows, columns, between)
    return groups[first], groups[second], groups[third]


def lies_of(equation: str, operands: list[str], size: dict[str, int], between: bool) -> tuple[str, int, int]:
    """How the result of :func:`multiply` lies in memory if its operands lie as given, how many numbers it has to copy, and how
    many are read and written by products of which two sides are short.
    """
    kept, pair = equation.split("->")[1], pair_of(equation)
    if pair is None:
        return kept, prod(size[x] for x in kept), 0
    lies = list(operands)
    if last := entrywise.fastest(pair, operands, size):
        return "".join(x for x in kept if x not in last) + last, entrywise.copies(pair, size), 0

    def together(side: int, labels: str) -> bool:
        return labels in operands[side]

    skinny = _skinny(pair, size)
    if (outer := pile(pair, size, together)) is not None:
        return kept, prod(size[x] for x in outer + kept), skinny
    if found := spread(pair, size, together, between):
        side, some = found
        pair = pair.beside(side, some)
        own = operands[1 - side]
        lies[1 - side] = "" if pair.same is None else some + own  # copied, or read again and again
    numbers = [
        prod(size[x] for x in term if k != pair.same or x not in pair.batch)
        for k, term in enumerate((pair.one, pair.other))
    ]
    batch, summed = pair.orders(*numbers)
    needed = [(batch, pair.rows, summed), (batch, summed, pair.columns)]
    count, *shape = (prod(size[x] for x in group) for group in (batch, pair.rows, pair.columns))
    many = not one_by_one(count, prod(shape))
    copied = [
        any(group not in lie for group in some) or (many and lie[-1:] in batch)
        for lie, some in zip(lies, needed, strict=True)
    ]
    return "".join(_labels(pair, size, between)), sum(compress(numbers, copied)), skinny


def _skinny(pair: Pair, size: dict[str, int]) -> int:
    """All numbers of a product of which two of rows, columns and what is summed over are short; 0 of another one."""
    sides = [prod(size[x] for x in group) for group in (pair.rows, pair.columns, pair.summed)]
    short = 1 < sorted(sides)[1] <= SKINNY
    return sum(prod(size[x] for x in term) for term in (pair.one, pair.other, pair.kept)) if short else 0


@dataclass
class Target:
    """Where a result goes: to the place of ``tensor``'s numbers, or (``add``) on top of them; with ``bias``, if there is one."""

    tensor: Tensor
    add: bool = False
    bias: Tensor | None = None

    def take(self, value: Tensor) -> Tensor:
        """``value``, made elsewhere."""
        made = self.tensor.add_(value) if self.add else put(self.tensor, value)
        return self.finish(made)

    def finish(self, made: Tensor) -> Tensor:
        """With the bias."""
        return made if self.bias is None else made.add_(self.bias)


def multiply(
    pair: Pair,
    one: Tensor,
    other: Tensor,
    copies: Sequence[Copies | None] = (None, None),
    into: Target | None = None,
    between: bool = False,
) -> Tensor:
    """The contraction.

    Args:
        copies: for each operand, what keeps a copy of it for a later product.
        into: where the result goes.
        between: it may lie in memory in any way.
    """
    known = _known(pair, one.shape, one.stride(), other.shape, other.stride(), between)
    size, given = known.size, ((one, pair.one), (other, pair.other))
    if has_kernels(one) and _copies(pair, size, given, into, between):
        made = _in_one_pass(pair, size, one, other, into)
        if made is not None:
            return made
    if known.last is not None and one.device.type == "cpu" and not torch.is_grad_enabled():
        made = entrywise.summed(pair, one, other, known.last)
        return made if into is None else into.take(made)
    if (outer := known.outer) is not None:
        piled = pair_of(f"{pair.one},{pair.other}->{outer}{pair.kept}")
        assert piled is not None
        made = multiply(piled, one, other, between=True).sum(tuple(range(len(outer))))
        return made if into is None else into.take(made)
    if known.spread:
        side, labels = known.spread
        more, copies = pair.beside(side, labels), [copies[side] if k == side else None for k in range(2)]
        small, own = given[1 - side]
        if more.same is not None:  # copied, if it has to be, before it is the same for all
            small = _in_order(small, own, [(pair.rows, pair.columns)[1 - side], known.summed])
        wide = small[(..., *[None] * len(labels))].expand(*small.shape, *(size[x] for x in labels))
        operands = (one, wide) if side == 0 else (wide, other)
        return multiply(more, *operands, copies=copies, into=into, between=between)
    batch, summed = known.batch, known.summed
    groups = (batch, pair.rows, pair.columns)
    a = _matrices(one, pair.one, (batch, pair.rows, summed), copies[0], known.views[0])
    b = _matrices(other, pair.other, (batch, summed, pair.columns), copies[1], known.views[1])
    if into is not None and (made := _place(into.tensor, pair.kept, groups)) is not None:
        fill(made, a, b, into.add)
        return into.finish(into.tensor)
    if torch.is_grad_enabled():
        lies, made = (0, 1, 2), torch.bmm(a, b)
    else:
        shape = (len(a), a.shape[1], b.shape[2])
        lies = pair.lies(*shape, between)
        made = empty([shape[k] for k in lies], a, between and not batch and len(groups[lies[0]]) == 1)
        fill(made.permute([lies.index(k) for k in range(3)]), a, b, False)
    labels = "".join(groups[k] for k in lies)
    result = made.view([size[x] for x in labels]).permute([labels.index(x) for x in pair.kept])
    return result if into is None else into.take(result)


class Known(NamedTuple):
    """What follows from how two operands lie: see :func:`multiply`.

    ``views`` are shape and strides of each operand as a batch of matrices, None where that takes a copy; ``last`` labels a batch
    that runs fastest in both, see :mod:`tenfold.structure.entrywise`.
    """

    size: dict[str, int]
    outer: str | None
    spread: tuple[int, str] | None
    batch: str
    summed: str
    views: list[tuple[tuple[int, ...], tuple[int, ...]] | None]
    last: str | None


@lru_cache(maxsize=8192)
def _known(pair: Pair, shape: tuple, stride: tuple, other_shape: tuple, other_stride: tuple, between: bool) -> Known:
    given = [(pair.one, shape, stride), (pair.other, other_shape, other_stride)]
    like = [(torch.empty_strided(shape, stride, device="meta"), labels) for labels, shape, stride in given]
    size = dict(zip(pair.one, shape, strict=True)) | dict(zip(pair.other, other_shape, strict=True))

    def together(side: int, labels: str) -> bool:
        return _together(*like[side], labels)

    outer = pile(pair, size, together)
    found = spread(pair, size, together, between) if outer is None else None
    batch, summed = pair.orders(*(value.numel() for value, _ in like))
    views = []
    for (value, labels), groups in zip(like, ((batch, pair.rows, summed), (batch, summed, pair.columns)), strict=True):
        seen = _seen(value, labels, groups) if all(_together(value, labels, group) for group in groups) else None
        views.append(None if seen is None else (tuple(seen.shape), seen.stride()))
    lies = [entrywise.lie(*each) for each in like]
    return Known(size, outer, found, batch, summed, views, entrywise.fastest(pair, lies, size))


def has_kernels(value: Tensor) -> bool:
    """Whether contractions of it that would copy go through a kernel."""
    return value.device.type in KERNELS and not torch.is_grad_enabled() and not is_traced()


def _copies(pair: Pair, size: dict[str, int], given, into: Target | None, between: bool) -> bool:
    """Whether an operand or the result would be put into another order as a whole."""
    batch, summed = pair.orders(given[0][0].numel(), given[1][0].numel())
    groups = (batch, pair.rows, pair.columns)
    for (value, labels), needed in zip(given, ((batch, pair.rows, summed), (batch, summed, pair.columns)), strict=True):
        if not all(_together(value, labels, group) for group in needed):
            return True
    if into is not None:
        return _place(into.tensor, pair.kept, groups) is None
    return not between and "".join(_labels(pair, size)) != pair.kept


def _in_one_pass(pair: Pair, size: dict[str, int], one: Tensor, other: Tensor, into: Target | None) -> Tensor | None:
    """None where the kernel does not know the type."""
    from tenfold.structure import kernel

    into = into or Target(one.new_empty([size[x] for x in pair.kept]))
    if not kernel.serves(one, other, into.tensor):
        return None
    if into.add:
        return into.finish(kernel.contract(pair, one, other, into.tensor, into.tensor))
    return kernel.contract(
        pair, one, other, into.tensor, None if into.bias is None else into.bias.expand_as(into.tensor)
    )


def product(one: Tensor, other: Tensor, into: Target | None = None, between: bool = False) -> Tensor:
    """``one @ other`` of two matrices."""
    if is_traced() or torch.is_grad_enabled():
        return one @ other
    rows, columns = one.shape[0], other.shape[1]
    if into is None and min(rows, columns) >= THIN:
        made = empty([rows, columns], one, between)
        return torch.mm(one, other, out=made)
    if into is None:
        return plain_product(one, other)
    fill(into.tensor[None], one[None], other[None], into.add)
    return into.finish(into.tensor)


def _place(value: Tensor, labels: str, groups: tuple[str, str, str]) -> Tensor | None:
    """``value`` as one axis for each of ``groups``, if matrices can be written there as they are made."""
    if not all(_together(value, labels, group) for group in groups):
        return None
    seen = _seen(value, labels, groups)
    return seen if 1 in seen.stride()[1:] else None


def _matrices(value: Tensor, labels: str, groups: tuple[str, str, str], copies: Copies | None, view) -> Tensor:
    """``value`` with one axis for each of ``groups``; that is ``view``, if it is no copy."""
    if view is not None and not torch.is_grad_enabled():
        return value.as_strided(*view)
    if view is None:
        first, second, last = sorted(groups, key=lambda group: min(map(labels.index, group), default=-1))
        # a matrix needs its rows or columns last
        flat = first + last + second if last == groups[0] else first + second + last
        order = tuple(labels.index(x) for x in flat)
        known = (copies or {}).get((id(value), order))
        if known is None:
            known = value, packed(value.permute(order))
            if copies is not None:
                copies[id(value), order] = known
        value, labels = known[1], flat
    return _seen(value, labels, groups)


def _in_order(value: Tensor, labels: str, groups: list[str]) -> Tensor:
    """``value``, or a copy in which each of ``groups`` is one axis."""
    if all(_together(value, labels, group) for group in groups):
        return value
    flat = "".join(groups)
    return packed(value.permute([labels.index(x) for x in flat])).permute([flat.index(x) for x in labels])


def _seen(value: Tensor, labels: str, groups: tuple[str, ...]) -> Tensor:
    shape = [prod(value.shape[labels.index(x)] for x in group) for group in groups]
    return value.permute([labels.index(x) for group in groups for x in group]).view(shape)


def _together(value: Tensor, labels: str, group: str) -> bool:
    """Whether the axes ``group`` are one axis in memory, the last one fastest."""
    axes = [axis for axis in map(labels.index, group) if value.shape[axis] != 1]
    return all(value.stride(one) == value.stride(other) * value.shape[other] for one, other in pairwise(axes))
