"""One contraction of two operands as a product of matrices, one or a batch of them, with as few copies as their layouts allow.

Every label is one of four: in both operands and the result (batch), in both and summed, or in one operand and the result
(rows, columns). An operand whose labels lie in memory so that each of these groups is one axis is used as it lies, transposed or
not; another one is copied, its first axis staying first, since a row of many vectors is the slowest axis almost always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import compress, pairwise
from math import prod

import torch
from torch import Tensor

FEW = 16  # products of a batch that are made one by one, straight to where they belong
LARGE = 2**14  # numbers that each of them has at least
THIN = 16  # rows of a matrix that are few; columns, at least, of products by one matrix that are made as a batch
SKINNY = 8  # of rows, columns and what is summed over two are at most so long: several times slower than what is moved
ALIGNED, MANY = 16, 256  # numbers that rows in memory are rounded up to, and from how many rows on
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
        if not fine and count <= FEW and count * numbers[1 - side] < numbers[side]:
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


def lies_of(equation: str, operands: list[str], size: dict[str, int], between: bool) -> tuple[str, int]:
    """How the result of :func:`multiply` lies in memory if its operands lie as given, and how many numbers it has to copy."""
    kept, pair = equation.split("->")[1], pair_of(equation)
    if pair is None:
        return kept, prod(size[x] for x in kept)
    lies = list(operands)

    def together(side: int, labels: str) -> bool:
        return labels in operands[side]

    if (outer := pile(pair, size, together)) is not None:
        return kept, prod(size[x] for x in outer + kept)
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
    return "".join(_labels(pair, size, between)), sum(compress(numbers, copied))


def skinny(equation: str, size: dict[str, int]) -> int:
    """How many numbers a product of matrices of which two sides are short reads and writes; 0 of another one."""
    pair = pair_of(equation)
    if pair is None:
        return 0
    short = is_skinny([prod(size[x] for x in group) for group in (pair.rows, pair.columns, pair.summed)])
    return sum(prod(size[x] for x in term) for term in (pair.one, pair.other, pair.kept)) if short else 0


def is_skinny(sides: list[int]) -> bool:
    """Whether two of rows, columns and what is summed over are short."""
    return 1 < sorted(sides)[1] <= SKINNY


def one_by_one(count: int, numbers: int) -> bool:
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

    def together(side: int, labels: str) -> bool:
        return _together(*given[side], labels)

    if (outer := pile(pair, size, together)) is not None:
        piled = pair_of(f"{pair.one},{pair.other}->{outer}{pair.kept}")
        assert piled is not None
        made = multiply(piled, one, other, between=True).sum(tuple(range(len(outer))))
        return made if into is None else into.take(made)
    if found := spread(pair, size, together, between):
        side, labels = found
        more, copies = pair.beside(side, labels), [copies[side] if k == side else None for k in range(2)]
        small, own = given[1 - side]
        if more.same is not None:  # copied, if it has to be, before it is the same for all
            small = _in_order(
                small, own, [(pair.rows, pair.columns)[1 - side], pair.orders(one.numel(), other.numel())[1]]
            )
        wide = small[(..., *[None] * len(labels))].expand(*small.shape, *(size[x] for x in labels))
        operands = (one, wide) if side == 0 else (wide, other)
        return multiply(more, *operands, copies=copies, into=into, between=between)
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
        lies = pair.lies(*shape, between)
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
    single = one_by_one(len(a), made[0].numel())
    thin = b.shape[2] < min(a.shape[1], THIN if single else THIN // 2)  # columns: up to 9 times slower than so few rows
    if thin or (made.stride(2) != 1 and not single):
        made, a, b = made.mT, b.mT, a.mT
    if a.shape[1] < THIN:  # up to 15 times faster on a CPU if what is summed over lies together in the few
        a = a[:1].contiguous().expand(a.shape) if a.stride(0) == 0 else a.contiguous()
    if a.device.type == "cpu" and not single:  # else torch makes them one by one, and copies each time
        a, b = (value if _is_matrix(value) else value.contiguous() for value in (a, b))
        if not made.is_contiguous():
            made.add_(torch.bmm(a, b)) if add else made.copy_(torch.bmm(a, b))
            return
    if a.device.type != "cpu" or not single:
        torch.baddbmm(made, a, b, beta=int(add), out=made)
        return
    for target, left, right in zip(made, a, b, strict=True):
        torch.addmm(target, left, right, beta=int(add), out=target)


def _is_matrix(value: Tensor) -> bool:
    """Whether rows or columns of every matrix of a batch lie one number after the other."""
    (_, rows, columns), (_, one, other) = value.shape, value.stride()
    return (other == 1 and one >= columns) or (one == 1 and other >= rows)


def _place(value: Tensor, labels: str, groups: tuple[str, str, str]) -> Tensor | None:
    """``value`` as one axis for each of ``groups``, if matrices can be written there as they are made."""
    if not all(_together(value, labels, group) for group in groups):
        return None
    seen = _seen(value, labels, groups)
    return seen if 1 in seen.stride()[1:] else None


def _matrices(value: Tensor, labels: str, groups: tuple[str, str, str], copies: Copies | None) -> Tensor:
    """``value`` with one axis for each of ``groups``."""
    if not all(_together(value, labels, group) for group in groups):
        first, second, last = sorted(groups, key=lambda group: min(map(labels.index, group), default=-1))
        # a matrix needs its rows or columns last
        flat = first + last + second if last == groups[0] else first + second + last
        order = tuple(labels.index(x) for x in flat)
        known = (copies or {}).get((id(value), order))
        if known is None:
            known = value, value.permute(order).contiguous()
            if copies is not None:
                copies[id(value), order] = known
        value, labels = known[1], flat
    return _seen(value, labels, groups)


def _in_order(value: Tensor, labels: str, groups: list[str]) -> Tensor:
    """``value``, or a copy in which each of ``groups`` is one axis."""
    if all(_together(value, labels, group) for group in groups):
        return value
    flat = "".join(groups)
    return value.permute([labels.index(x) for x in flat]).contiguous().permute([flat.index(x) for x in labels])


def _seen(value: Tensor, labels: str, groups: tuple[str, ...]) -> Tensor:
    shape = [prod(value.shape[labels.index(x)] for x in group) for group in groups]
    return value.permute([labels.index(x) for group in groups for x in group]).view(shape)


def _together(value: Tensor, labels: str, group: str) -> bool:
    """Whether the axes ``group`` are one axis in memory, the last one fastest."""
    axes = [axis for axis in map(labels.index, group) if value.shape[axis] != 1]
    return all(value.stride(one) == value.stride(other) * value.shape[other] for one, other in pairwise(axes))
