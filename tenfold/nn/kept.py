"""Which layers keep the matrix that their factors make, and what lies between products, instead of making it again.

In evaluation a kept ``W`` costs memory and makes a layer as fast as a dense one, no faster. It is made at the first call that
wants it, and dropped when a factor has changed or moved, and when the layer is trained. In training it is kept from the way
forward to the way back, no longer: an optimizer may write into factors without a trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tenfold.nn.layers import FactorizedLinear
from tenfold.nn.worth import read_measured
from tenfold.structure import Structure
from tenfold.structure.contract import BUCKETS
from tenfold.structure.hold import Hold
from tenfold.structure.plan import cost_of_product
from tenfold.structure.worth import worth_of

MODES = ("auto", "speed", "memory")
LEAST = 0.02  # a matrix is kept where it takes off at least this share of the price
# small products of few rows can take this much more than their price: a matrix that is kept anyhow is used for them, too
UNSURE = 0.2


@dataclass
class Offer:
    """What a layer gains by its matrix, in prices of its dense product, at the numbers of rows where it gains anything."""

    layer: FactorizedLinear
    gain: float
    rows: frozenset[int]

    @property
    def bytes(self) -> int:
        """Of the matrix."""
        out, inner = self.layer.structure.shape
        return out * inner * self.layer.like.element_size()


def keep_matrices(model: nn.Module, mode: str = "auto", limit: int | None = None) -> dict[str, Any]:
    """Say which layers of ``model`` keep their matrix in evaluation, and at which numbers of rows it is used.

    Args:
        mode: ``memory``: none, and what is made on the way is kept small. ``speed``: all that gain by it; in training, layers
            keep also what lies between two products, where it is no larger than their input. ``auto``: those that gain the most
            for their bytes, while factors and kept matrices together take no more than ``limit``.
        limit: bytes; what the dense layers took unless given.

    Returns:
        ``mode``, ``layers`` (how many keep one), ``bytes`` (of these matrices) and ``limit``.

    Raises:
        ValueError: there is no such mode, or no such limit in it.
    """
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r}; take one of {', '.join(MODES)}")
    if limit is not None and mode != "auto":
        raise ValueError(f"mode {mode} has no limit; leave that of {limit:,} bytes out, or take mode auto")
    if limit is not None and limit < 0:
        raise ValueError(f"a limit of {limit:,} bytes is less than nothing; give 0 or more")
    read_measured()
    linear = [layer for layer in model.modules() if isinstance(layer, FactorizedLinear)]
    layers = [layer for layer in linear if isinstance(layer.structure, Structure)]  # else there is no matrix to keep
    factors = {id(p): p.numel() * p.element_size() for layer in layers for p in layer.factors().values()}
    dense = [layer.structure.shape[0] * layer.structure.shape[1] * layer.like.element_size() for layer in layers]
    limit, taken, count = sum(dense) if limit is None else limit, 0, 0
    offers = {id(layer): offer(layer) for layer in layers}
    for layer in layers:
        layer.keeps, layer.hold = frozenset(), Hold(between=mode == "speed", little=mode == "memory")
    for one in sorted(offers.values(), key=lambda one: -one.gain / one.bytes):
        fits = mode == "speed" or sum(factors.values()) + taken + one.bytes <= limit
        if mode != "memory" and one.rows and fits:
            one.layer.keeps, taken, count = one.rows, taken + one.bytes, count + 1
    return {"mode": mode, "layers": count, "bytes": taken, "limit": limit}


def offer(layer: FactorizedLinear) -> Offer:
    """What ``layer`` would gain."""
    structure, worth = layer.structure, worth_of(layer.like.device.type)
    if structure.matrices is not None and len(structure.matrices) == 1:  # it is a matrix
        return Offer(layer, 0.0, frozenset())
    dense = {rows: cost_of_product(rows, *structure.shape).price(worth) for rows in BUCKETS}
    gains = {rows: structure.price(rows, worth) / dense[rows] - 1 for rows in BUCKETS}
    some = {rows for rows, gain in gains.items() if gain > LEAST}
    gain, few = sum(gains[rows] for rows in some), min(BUCKETS)
    if some and gains[few] > -UNSURE:
        some.add(few)
    return Offer(layer, gain, frozenset(some))
