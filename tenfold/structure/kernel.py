"""One contraction of two operands in one pass over a GPU's memory: nothing is put into another order first.

A product of matrices wants each of its axes (batch, rows, columns, what is summed) to be one axis in memory. Here an axis is
several labels, each with strides of its own in both operands, in the result and in what is added to it; the kernel takes an index
apart into those of its labels. Imported by :mod:`tenfold.structure.pair` when kernels are on, since it needs Triton.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.structure.pair import Pair

TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**31  # how far apart numbers of a tensor may lie: offsets are 32 bits wide
TILES, SHORT = 128, 2048  # with fewer tiles a sum over more than SHORT is made in parts
INTERPRETED = triton.knobs.runtime.interpret
SHAPES = [
    (16, 64, 64, 4, 3),
    (32, 64, 64, 4, 3),
    (64, 64, 32, 4, 4),
    (128, 64, 32, 4, 4),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 3),
]
CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (SHAPES[2:3] if INTERPRETED else SHAPES)
]


@no_type_check  # Triton compiles the source: a function around it would be in the way
@triton.jit
def _offsets(index, sizes: tl.constexpr, strides):
    """Where number ``index`` of labels of these sizes lies, the first one fastest; the slowest one's size is not needed."""
    offsets, rest = index * 0, index
    for k in tl.static_range(len(sizes)):
        offsets += (rest % sizes[k]) * strides[k]
        rest = rest // sizes[k]
    return offsets + rest * strides[len(sizes)]


@no_type_check
@triton.autotune(CONFIGS, key=["about", "columns", "summed", "count"], restore_value=["c"])
@triton.jit
def _contract(
    a, b, c, added, about, count, rows, columns, summed, part, part_stride,
    a_batch, a_rows, a_summed, b_batch, b_summed, b_columns,
    c_batch, c_rows, c_columns, d_batch, d_rows, d_columns,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wide = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(0) // wide) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % wide) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, first = tl.program_id(1), tl.program_id(2) * part
    inside_m, inside_n = m < rows, n < columns
    left = a + _offsets(batch, BATCH, a_batch) + _offsets(m, ROWS, a_rows)[:, None]
    right = b + _offsets(batch, BATCH, b_batch) + _offsets(n, COLUMNS, b_columns)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    last = tl.minimum(first + part, summed)
    for begin in range(first, last, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        inside_k = k < last
        one = tl.load(left + _offsets(k, SUMMED, a_summed)[None, :], inside_m[:, None] & inside_k[None, :], 0.0)
        other = tl.load(right + _offsets(k, SUMMED, b_summed)[:, None], inside_k[:, None] & inside_n[None, :], 0.0)
        total = tl.dot(one, other, total, input_precision=PRECISION)
    inside = inside_m[:, None] & inside_n[None, :]
    if ADD:
        at = _offsets(batch, BATCH, d_batch)
        at += _offsets(m, ROWS, d_rows)[:, None] + _offsets(n, COLUMNS, d_columns)[None, :]
        total += tl.load(added + at, inside, 0.0).to(tl.float32)
    place = _offsets(batch, BATCH, c_batch) + tl.program_id(2) * part_stride
    place += _offsets(m, ROWS, c_rows)[:, None] + _offsets(n, COLUMNS, c_columns)[None, :]
    tl.store(c + place, total.to(c.dtype.element_ty), inside)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernel can take them."""
    first = tensors[0]
    return all(t.dtype in TYPES and t.dtype == first.dtype and _span(t) < LARGEST for t in tensors)


def _span(value: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))


def contract(pair: Pair, one: Tensor, other: Tensor, result: Tensor, added: Tensor | None = None) -> Tensor:
    """``result``, filled with the contraction plus ``added``, both with the labels ``pair.kept`` and any strides."""
    size = dict(zip(pair.one, one.shape, strict=True)) | dict(zip(pair.other, other.shape, strict=True))
    groups = (*pair.orders(one.numel(), other.numel()), pair.rows, pair.columns)
    count, summed, rows, columns = (prod(size[x] for x in group) for group in groups)
    parts = _parts(count * -(-rows // 64) * -(-columns // 64), summed)
    made = result if parts == 1 else result.new_empty(parts, *result.shape, dtype=torch.float32)
    extra = result if added is None or parts > 1 else added
    strides = [
        dict(zip(labels, tensor.stride()[-len(labels) :], strict=True))
        for labels, tensor in ((pair.one, one), (pair.other, other), (pair.kept, made), (pair.kept, extra))
    ]
    whose = ((0, 1, 2, 3), (0, 1), (0, 2, 3), (1, 2, 3))  # the tensors that have labels of a group
    axes = [
        _axis(tuple(size[x] for x in group), *(tuple(strides[k][x] for x in group) for k in some))
        for group, some in zip(groups, whose, strict=True)
    ]
    (batch, (a0, b0, c0, d0)), (sums, (a1, b1)), (row, (a2, c2, d2)), (column, (b3, c3, d3)) = axes
    part = -(-summed // parts // 64) * 64 if parts > 1 else summed

    def grid(chosen):
        return triton.cdiv(rows, chosen["BLOCK_M"]) * triton.cdiv(columns, chosen["BLOCK_N"]), count, parts

    _contract[grid](
        one, other, made, extra, 2 ** max(0, rows - 1).bit_length(), count, rows, columns, summed, part,
        made.stride(0) if parts > 1 else 0, a0, a2, a1, b0, b1, b3, c0, c2, c3, d0, d2, d3,
        BATCH=batch, ROWS=row, COLUMNS=column, SUMMED=sums, ADD=added is not None and parts == 1,
        PRECISION="tf32" if _tf32() else "ieee",
    )  # fmt: skip
    if parts > 1:
        total = made.sum(0)
        result.copy_(total if added is None else total.add_(added))
    return result


def _tf32() -> bool:
    """What torch's own products do with float32; asking in its older way raises where the newer one was used to say so."""
    said = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if said is None else said == "tf32"


def _parts(tiles: int, summed: int) -> int:
    """Into how many parts a long sum is cut, so that there are tiles enough to keep a GPU busy."""
    parts = 1
    while parts * tiles < TILES and summed // parts > SHORT:
        parts *= 2
    return parts


@lru_cache(maxsize=4096)
def _axis(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Sizes of an axis's labels, fastest first and without the slowest one, and strides in every tensor.

    Neighbours that are one axis in every tensor become one label.
    """
    if not sizes:
        return (), tuple((0,) for _ in strides)
    merged = [(sizes[-1], [stride[-1] for stride in strides])]
    for k in range(len(sizes) - 2, -1, -1):
        size, last = merged[-1]
        if all(stride[k] == size * fast for stride, fast in zip(strides, last, strict=True)):
            merged[-1] = (size * sizes[k], last)
        else:
            merged.append((sizes[k], [stride[k] for stride in strides]))
    return tuple(size for size, _ in merged[:-1]), tuple(
        tuple(row) for row in zip(*(last for _, last in merged), strict=True)
    )
