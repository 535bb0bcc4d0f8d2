"""One contraction of two operands as a product of matrices, one or a batch of them, with as few copies as their layouts allow.

Every label is one of four: in both operands and the result (batch), in both and summed, or in one operand and the result
(rows, columns). An operand whose labels lie in memory so that each of these groups is one axis is used as it lies, transposed or
not; another one is copied, its first axis staying first, since a row of many vectors is the slowest axis almost always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress, pairwise
from math import prod

import torch
from torch import Tensor

FEW = 16  # products of a batch that are made one by one, straight to where they belong
LARGE = 2**14  # numbers that each of them has at least
THIN = 16  # rows of a matrix that are few
ALIGNED, MANY = 16, 256  # numbers that rows in memory are rounded up to, and from how many rows on
KERNELS: set[str] = set()  # kinds of devices on which tenfold.structure.kernel makes what would need a copy


# {(id of a tensor, order of axes): (itself, its copy)}
Copies = dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]]


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

    def orders(self, one: int, other: int) -> tuple[str, str]:
        """In which order the labels of the batch and the summed ones run, of operands with so many numbers."""
        larger = self.one if one >= other else self.other
        return "".join(x for x in larger if x in self.batch), "".join(x for x in larger if x in self.summed)

    @property
    def lies(self) -> tuple[int, int, int]:
        """The order of batch (0), rows (1) and columns (2) in the memory of a result: what ``kept`` begins with comes first."""
        first = self.kept[:1]
        return (0, 1, 2) if first in self.batch else (1, 0, 2) if first in self.rows else (2, 0, 1)

    def beside(self, side: int, labels: str) -> Pair:
        """The same contraction with kept ``labels`` of operand ``side`` in the other one, too, where it is the same for each."""
        one, other = (self.one, self.other + labels) if side == 0 else (self.one + labels, self.other)
        return pair_of(f"{one},{other}->{self.kept}")  # type: ignore[return-value]


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


def spread(pair: Pair, size: dict[str, int], together: Callable[[int, str], bool]) -> tuple[int, str] | None:
    """Which operand needs no copy if some of its labels become those of a batch, where a copy of the other one is smaller.

    Args:
        together: whether labels of operand 0 or 1 are one axis in its memory.
    """
    terms = (pair.one, pair.other)
    numbers = [prod(size[x] for x in term) for term in terms]
    batch, summed = pair.orders(*numbers)
    side = int(numbers[1] > numbers[0])
    free = (pair.rows, pair.columns)[side]
    if not together(side, summed) or (together(side, free) and together(side, batch)):
        return None
    for split in range(1, len(free)):
        some = free[:split]
        outer = "".join(x for x in terms[side] if x in batch + some)
        count = prod(size[x] for x in some)
        little = count <= FEW and count * numbers[1 - side] < numbers[side]
        if little and together(side, outer) and together(side, free[split:]):
            return side, some
    return None


def lies_of(equation: str, operands: list[str], size: dict[str, int]) -> tuple[str, int]:
    """How the result of :func:`multiply` lies in memory if its operands lie as given, and how many numbers it has to copy."""
    kept, pair = equation.split("->")[1], pair_of(equation)
    if pair is None:
        return kept, prod(size[x] for x in kept)
    lies = list(operands)
    if found := spread(pair, size, lambda side, labels: labels in operands[side]):
        pair, lies[1 - found[0]] = pair.beside(*found), ""  # copied
    numbers = [prod(size[x] for x in term) for term in (pair.one, pair.other)]
    batch, summed = pair.orders(*numbers)
    groups = (batch, pair.rows, pair.columns)
    needed = [(batch, pair.rows, summed), (batch, summed, pair.columns)]
    copied = [any(group not in lie for group in some) for lie, some in zip(lies, needed, strict=True)]
    count, rows, columns = (prod(size[x] for x in group) for group in groups)
    order = pair.lies if _one_by_one(count, rows * columns) else (0, 1, 2)
    return "".join(groups[k] for k in order), sum(compress(numbers, copied))


def _one_by_one(count: int, numbers: int) -> bool:
    """Whether products of a batch, of so many numbers each, are made one by one."""
    return count == 1 or (count <= FEW and numbers >= LARGE)


@dataclass
class Target:
    """Where a result goes: to the place of ``tensor``'s numbers, or (``add``) on top of them; with ``bias``, if there is one."""

    tensor: Tensor
    add: bool = False
    bias: Tensor | None = None

    def take(self, value: Tensor) -> Tensor:
        """``value``, made elsewhere."""
        made = self.tensor.add_(value) if self.add else self.tensor.copy_(value)
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
    size = dict(zip(pair.one, one.shape, strict=True)) | dict(zip(pair.other, other.shape, strict=True))
    given = ((one, pair.one), (other, pair.other))
    if has_kernels(one) and _copies(pair, size, given, into, between):
        made = _in_one_pass(pair, size, one, other, into)
        if made is not None:
            return made
    if found := spread(pair, size, lambda side, labels: _together(*given[side], labels)):
        side, labels = found
        kept, wide = given[side][0], given[1 - side][0][(..., *[None] * len(labels))]
        wide = wide.expand(*given[1 - side][0].shape, *(size[x] for x in labels))
        one, other, copies = (kept, wide, [copies[0], None]) if side == 0 else (wide, kept, [None, copies[1]])
        return multiply(pair.beside(side, labels), one, other, copies, into, between)
    batch, summed = pair.orders(one.numel(), other.numel())
    groups = (batch, pair.rows, pair.columns)
    a = _matrices(one, pair.one, (batch, pair.rows, summed), copies[0])
    b = _matrices(other, pair.other, (batch, summed, pair.columns), copies[1])
    if into is not None and (made := _place(into.tensor, pair.kept, groups)) is not None:
        _fill(made, a, b, into.add)
        return into.finish(into.tensor)
    if torch.is_grad_enabled():
        lies, made = (0, 1, 2), torch.bmm(a, b)
    else:
        shape = (len(a), a.shape[1], b.shape[2])
        lies = pair.lies if _one_by_one(len(a), shape[1] * shape[2]) else (0, 1, 2)
        made = _empty([shape[k] for k in lies], a, between and not batch and len(groups[lies[0]]) == 1)
        _fill(made.permute([lies.index(k) for k in range(3)]), a, b, False)
    labels = "".join(groups[k] for k in lies)
    result = made.view([size[x] for x in labels]).permute([labels.index(x) for x in pair.kept])
    return result if into is None else into.take(result)


def has_kernels(value: Tensor) -> bool:
    """Whether contractions of it that would copy go through a kernel."""
    return value.device.type in KERNELS and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _copies(pair: Pair, size: dict[str, int], given, into: Target | None, between: bool) -> bool:
    """Whether an operand or the result would be put into another order as a whole."""
    batch, summed = pair.orders(given[0][0].numel(), given[1][0].numel())
    groups = (batch, pair.rows, pair.columns)
    for (value, labels), needed in zip(given, ((batch, pair.rows, summed), (batch, summed, pair.columns)), strict=True):
        if not all(_together(value, labels, group) for group in needed):
            return True
    if into is not None:
        return _place(into.tensor, pair.kept, groups) is None
    count, numbers = prod(size[x] for x in batch), prod(size[x] for x in pair.rows + pair.columns)
    lies = pair.lies if _one_by_one(count, numbers) else (0, 1, 2)
    return not between and "".join(groups[k] for k in lies) != pair.kept


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
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return one @ other
    rows, columns = one.shape[0], other.shape[1]
    if into is None and min(rows, columns) >= THIN:
        made = _empty([rows, columns], one, between)
        return torch.mm(one, other, out=made)
    if into is None:
        return one @ other
    _fill(into.tensor[None], one[None], other[None], into.add)
    return into.finish(into.tensor)


def _empty(shape: list[int], like: Tensor, widened: bool) -> Tensor:
    """Memory for a result; rows of many vectors begin where a CPU's vectors do, which is a tenth faster in what follows."""
    width = -(-shape[-1] // ALIGNED) * ALIGNED
    if not widened or like.device.type != "cpu" or width == shape[-1] or shape[-1] < ALIGNED or prod(shape[:-1]) < MANY:
        return like.new_empty(shape)
    return like.new_empty(*shape[:-1], width)[..., : shape[-1]]


def _fill(made: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """``made (batch, rows, columns)`` becomes ``a @ b``, or more by that."""
    if b.shape[2] < min(a.shape[1], THIN):
        made, a, b = made.mT, b.mT, a.mT
    if a.shape[1] < THIN:  # up to 15 times faster on a CPU if what is summed over lies together in the few
        a = a.contiguous()
    if a.device.type != "cpu" or not _one_by_one(len(a), made[0].numel()):
        torch.baddbmm(made, a, b, beta=int(add), out=made)
        return
    for target, left, right in zip(made, a, b, strict=True):
        torch.addmm(target, left, right, beta=int(add), out=target)


def _place(value: Tensor, labels: str, groups: tuple[str, str, str]) -> Tensor | None:
    """``value`` as one axis for each of ``groups``, if matrices can be written there as they are made."""
    if not all(_together(value, labels, group) for group in groups):
        return None
    seen = _seen(value, labels, groups)
    return seen if 1 in seen.stride()[1:] else None


def _matrices(value: Tensor, labels: str, groups: tuple[str, str, str], copies: Copies | None) -> Tensor:
    """``value`` with one axis for each of ``groups``."""
    if not all(_together(value, labels, group) for group in groups):
        flat = "".join(sorted(groups, key=lambda group: min(map(labels.index, group), default=-1)))
        order = tuple(labels.index(x) for x in flat)
        known = (copies or {}).get((id(value), order))
        if known is None:
            known = value, value.permute(order).contiguous()
            if copies is not None:
                copies[id(value), order] = known
        value, labels = known[1], flat
    return _seen(value, labels, groups)


def _seen(value: Tensor, labels: str, groups: tuple[str, ...]) -> Tensor:
    shape = [prod(value.shape[labels.index(x)] for x in group) for group in groups]
    return value.permute([labels.index(x) for group in groups for x in group]).view(shape)


def _together(value: Tensor, labels: str, group: str) -> bool:
    """Whether the axes ``group`` are one axis in memory, the last one fastest."""
    axes = [axis for axis in map(labels.index, group) if value.shape[axis] != 1]
    return all(value.stride(one) == value.stride(other) * value.shape[other] for one, other in pairwise(axes))
