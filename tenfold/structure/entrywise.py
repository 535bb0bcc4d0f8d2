"""Sums of entrywise products: ``kept[r, b] = sum_s one[r, s, b] other[s, b]`` where ``b`` runs fastest in both operands.

As a batch of products of matrices, one for each ``b``, both operands would have to be copied. The rank of a CP decomposition is
such a ``b``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tenfold.structure.pair import Pair

LEAST = 64  # numbers that run along b, at least


def lie(value: Tensor, labels: str) -> str:
    """``labels`` in their order in memory; empty if none of them runs along neighbours."""
    found = sorted(labels, key=lambda x: -value.stride(labels.index(x)))
    return "".join(found) if found and value.stride(labels.index(found[-1])) == 1 else ""


def fastest(pair: Pair, lies: Sequence[str], size: dict[str, int]) -> str | None:
    """The labels of the batch in their order in memory, if they run fastest in both operands, of which one has no others kept."""
    count = len(pair.batch)
    if not count or (pair.rows and pair.columns) or prod(size[x] for x in pair.batch) < LEAST:
        return None
    ends = {each[-count:] for each in lies}
    return ends.pop() if len(ends) == 1 and all(set(each) == set(pair.batch) for each in ends) else None


def summed(pair: Pair, one: Tensor, other: Tensor, batch: str) -> Tensor:
    """The contraction, of operands in which ``batch`` runs fastest."""
    free = "".join(x for x in pair.kept if x not in batch)

    def in_front(value: Tensor, labels: str) -> Tensor:
        own = "".join(x for x in free if x in labels)
        return value.permute([labels.index(x) for x in pair.summed + own + batch])

    left, right, made = in_front(one, pair.one), in_front(other, pair.other), None
    for at in product(*(range(size) for size in left.shape[: len(pair.summed)])):
        made = left[at] * right[at] if made is None else made.addcmul_(left[at], right[at])
    assert made is not None
    return made.permute([(free + batch).index(x) for x in pair.kept])
