"""Sums of entrywise products: ``kept[r, c, b] = sum_s one[r, s, b] other[c, s, b]`` where ``b`` runs fastest in both operands.

As a batch of products of matrices, one for each ``b``, both operands would have to be copied. The rank of a CP decomposition is
such a ``b``, and that of BLAST, whose blocks are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tenfold.structure.pair import Pair

LEAST = 64  # numbers that run along b, at least
SHORT = 8  # r, c and s: two of them are at most so long together with ...
PASSES = 32  # ... their product, which is how often the rest is gone through
PASSING = 6  # numbers of a product that are added up in the time of copying one


def lie(value: Tensor, labels: str) -> str:
    """``labels`` in their order in memory; empty if none of them runs along neighbours."""
    found = sorted(labels, key=lambda x: -value.stride(labels.index(x)))
    return "".join(found) if found and value.stride(labels.index(found[-1])) == 1 else ""


def fastest(pair: Pair, lies: Sequence[str], size: dict[str, int]) -> str | None:
    """The labels of the batch in their order in memory, if they run fastest in both operands, which have few others in common."""
    count = len(pair.batch)
    if not count or prod(size[x] for x in pair.batch) < LEAST:
        return None
    sides = sorted(prod(size[x] for x in group) for group in (pair.rows, pair.columns, pair.summed))
    if pair.rows and pair.columns and (sides[1] > SHORT or sides[0] * sides[1] > PASSES):
        return None
    ends = {each[-count:] for each in lies}
    return ends.pop() if len(ends) == 1 and all(set(each) == set(pair.batch) for each in ends) else None


def copies(pair: Pair, size: dict[str, int]) -> int:
    """As how many copied numbers the passes count; few where one operand has nothing of its own."""
    if not (pair.rows and pair.columns):
        return 0
    return prod(size[x] for x in pair.kept + pair.summed) // PASSING


def summed(pair: Pair, one: Tensor, other: Tensor, batch: str) -> Tensor:
    """The contraction, of operands in which ``batch`` runs fastest."""
    free = "".join(x for x in pair.kept if x not in batch)

    def in_front(value: Tensor, labels: str) -> Tensor:
        order, missing = pair.summed + free + batch, [x for x in free if x not in labels]
        value = value[(..., *[None] * len(missing))]
        return value.permute([(labels + "".join(missing)).index(x) for x in order])

    left, right, depth = in_front(one, pair.one), in_front(other, pair.other), len(pair.summed)
    over, outside = left.shape[:depth], torch.broadcast_shapes(left.shape[depth:], right.shape[depth:])[: len(free)]
    if pair.rows and pair.columns and prod(outside) < prod(over):
        made = left.new_empty(*outside, *left.shape[depth + len(free) :])
        last = tuple(range(-depth, 0))
        left, right = (each.expand(*over, *made.shape).movedim(tuple(range(depth)), last) for each in (left, right))
        for at in product(*map(range, outside)):
            torch.sum(left[at] * right[at], last, out=made[at])
    else:
        first, *others = product(*map(range, over))
        made = left[first] * right[first]
        for at in others:
            made.addcmul_(left[at], right[at])
    return made.permute([(free + batch).index(x) for x in pair.kept])
