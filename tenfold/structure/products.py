"""Products of matrices, one or a batch, by the call of torch that is fastest for their sizes and for how they lie.

Few rows times a large matrix take as long as the matrix takes to be read. The library's product of two matrices, and
``nn.Linear`` with it, does not come near on a processor; a batch of parts of the matrix, which the threads share out, does.
Nothing is copied. Figures: docs/log.md, 2026-11-28; ``bench --calibrate`` measures up to how many rows it is faster.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from tenfold.structure.traced import is_traced

# {kind of device: up to how many rows}; tenfold.evaluate.worth measures it
ROWS: dict[str, int] = {"cpu": 32}
PLAIN = (Tensor, torch.nn.Parameter)
PARTED = 2**16  # numbers that a matrix has at least
FEW = 16  # products of a batch that are made one by one, straight to where they belong
LARGE = 2**14  # numbers that each of them has at least
THIN = 16  # rows of a matrix that are few; columns, at least, of products by one matrix that are made as a batch
WIDE = {16: torch.complex128, 8: torch.float64}  # bytes that are copied as one number
RUN, LONG = 32, 2**14  # bytes that lie together, at most, and numbers of a tensor, at least, for which this pays
ALIGNED, MANY = 16, 256  # numbers that rows in memory are rounded up to, and from how many rows on


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x (..., in) @ weight.T + bias``, ``weight (out, in)``."""
    out, inner = weight.shape
    rows = x.numel() // inner
    if not parted(x, rows, weight):
        return torch.nn.functional.linear(x, weight, bias)
    parts = max(2, torch.get_num_threads())
    if rows > 1 or out % parts or not weight.is_contiguous():
        made = _in_parts(x.reshape(rows, inner), weight.mT, parts).contiguous()  # of this call alone
        return (made if bias is None else made.add_(bias)).view(*x.shape[:-1], out)
    # a row turned, with the strides of one: three times as fast as a column with strides of its own
    column, blocks = x.reshape(1, inner).mT.expand(parts, inner, 1), weight.view(parts, -1, inner)
    made = torch.bmm(blocks, column) if bias is None else torch.baddbmm(bias.view(parts, -1, 1), blocks, column)
    return made.view(*x.shape[:-1], out)


def product(one: Tensor, other: Tensor, bias: Tensor | None = None) -> Tensor:
    """``one (n, k) @ other (k, columns) + bias``."""
    if parted(one, one.shape[0], other):
        made = _in_parts(one, other, max(2, torch.get_num_threads())).contiguous()  # of this call alone
        return made if bias is None else made.add_(bias)
    return one @ other if bias is None else torch.addmm(bias, one, other)


def parted(one: Tensor, rows: int, other: Tensor) -> bool:
    """Whether ``rows`` rows are multiplied by the matrix ``other`` in parts."""
    device = one.device.type
    if type(other) not in PLAIN:  # quantised, or shared out over devices: it knows by itself how it is multiplied
        return False
    # first what asks for no number of rows: code that is traced would have a branch for it
    if is_traced() or torch.is_grad_enabled() or torch.is_autocast_enabled(device):
        return False
    few = 0 < rows <= min(ROWS.get(device, 0), one.shape[-1] // 4)  # else the result is no smaller than the matrix
    return few and other.numel() >= PARTED and one.dtype == torch.float32


def is_quantised(value: Tensor) -> bool:
    """Whether torchao holds it in another type, and multiplies by it in ``torch.nn.functional.linear`` and nowhere else."""
    return type(value) not in PLAIN and type(value).__module__.startswith("torchao.")


def plain(value: Tensor) -> Tensor:
    """The numbers that a quantised tensor stands for; any other one as it is."""
    return value.dequantize() if is_quantised(value) else value


def _in_parts(one: Tensor, other: Tensor, parts: int) -> Tensor:
    (rows, _), (_, columns) = one.shape, other.shape
    even = columns - columns % parts
    blocks = other[:, :even].unflatten(1, (parts, -1)).movedim(1, 0)
    if other.stride(0) == 1:  # the parts come first, so that none of them is turned
        made = torch.bmm(blocks.mT, one.mT.expand(parts, *one.shape[::-1])).view(even, rows).mT
    else:
        made = torch.bmm(one.expand(parts, *one.shape), blocks).movedim(0, 1).reshape(rows, even)
    if even < columns:
        made = torch.cat((made, one @ other[:, even:]), 1)
    return made


def one_by_one(count: int, numbers: int) -> bool:
    """Whether products of a batch, of so many numbers each, are made one by one."""
    return count == 1 or (count <= FEW and numbers >= LARGE)


def empty(shape: list[int], like: Tensor, widened: bool) -> Tensor:
    """Memory for a result; rows of many vectors begin where a CPU's vectors do, which is a tenth faster in what follows."""
    width = -(-shape[-1] // ALIGNED) * ALIGNED
    if not widened or like.device.type != "cpu" or width == shape[-1] or shape[-1] < ALIGNED or prod(shape[:-1]) < MANY:
        return like.new_empty(shape)
    return like.new_empty(*shape[:-1], width)[..., : shape[-1]]


def fill(made: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """``made (batch, rows, columns)`` becomes ``a @ b``, or more by that."""
    single = one_by_one(len(a), made[0].numel())
    thin = b.shape[2] < min(a.shape[1], THIN if single else THIN // 2)  # columns: up to 9 times slower than so few rows
    if thin or (made.stride(2) != 1 and not single):
        made, a, b = made.mT, b.mT, a.mT
    if a.shape[1] < THIN:  # up to 15 times faster on a CPU if what is summed over lies together in the few
        a = a[:1].contiguous().expand(a.shape) if a.stride(0) == 0 else a.contiguous()
    if not add and parted(a[0], a.shape[1], b[0]):
        if single:
            for target, left, right in zip(made, a, b, strict=True):
                target.copy_(_in_parts(left, right, max(2, torch.get_num_threads())))
            return
        if b.stride(1) == 1:  # the matrices come first, so that none of them is turned
            made.copy_(torch.bmm(b.mT, a.mT).mT)
            return
    if a.device.type == "cpu" and not single:  # else torch makes them one by one, and copies each time
        a, b = (value if _is_matrix(value) else packed(value) for value in (a, b))
        if not made.is_contiguous():
            made.add_(torch.bmm(a, b)) if add else put(made, torch.bmm(a, b))
            return
    if a.device.type != "cpu" or not single:
        torch.baddbmm(made, a, b, beta=int(add), out=made)
        return
    for target, left, right in zip(made, a, b, strict=True):
        torch.addmm(target, left, right, beta=int(add), out=target)


def packed(value: Tensor) -> Tensor:
    """``value.contiguous()``"""
    if value.is_contiguous() or not _in_runs(value):
        return value.contiguous()
    return put(torch.empty_like(value, memory_format=torch.contiguous_format), value)


def put(target: Tensor, value: Tensor) -> Tensor:
    """``target.copy_(value)``; where only a few numbers lie together in both, 8 or 16 bytes of them count as one, and a loop over
    many of these takes the place of one over a few numbers: up to 5 times faster on a CPU.
    """
    axis = next(
        (k for k in range(value.dim()) if value.shape[k] > 1 and target.stride(k) == value.stride(k) == 1), None
    )
    if axis is None or not _in_runs(value) or target.dtype != value.dtype or target.shape != value.shape:
        return target.copy_(value)
    run = value.shape[axis] * value.element_size()
    wide = 16 if run % 16 == 0 else 8
    both, count = [each.movedim(axis, -1) for each in (target, value)], wide // value.element_size()
    places = [number for each in both for number in (each.storage_offset(), *each.stride()[:-1])]
    longer = any(all(each.stride(k) == value.shape[axis] for each in both) for k in range(value.dim() - 1))
    if run > RUN or run % 8 or longer or any(number % count for number in places):
        return target.copy_(value)
    to, of = (each.view(WIDE[wide]) for each in both)
    for part in range(run // wide):
        to[..., part].copy_(of[..., part])
    return target


def _in_runs(value: Tensor) -> bool:
    """Whether a copy in runs may pay, as far as this can be told from one tensor."""
    long = value.device.type == "cpu" and value.numel() >= LONG and value.dim() > 1 and 1 in value.stride()
    return long and not torch.is_grad_enabled() and not is_traced() and type(value) is Tensor


def _is_matrix(value: Tensor) -> bool:
    """Whether rows or columns of every matrix of a batch lie one number after the other."""
    (_, rows, columns), (_, one, other) = value.shape, value.stride()
    return (other == 1 and one >= columns) or (one == 1 and other >= rows)
