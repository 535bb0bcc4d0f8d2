"""Cache the dense ``W`` of layers during inference, where multiplying by it is faster than by the factors.

A cached ``W`` costs memory and makes a layer as fast as a dense one. Changes of factors can't be detected reliably (fused
optimizers and ``.data`` leave no trace), so a cache lives in a ``with`` block in which factors do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tenfold.nn.layers import FactorizedLinear
from tenfold.structure import Structure
from tenfold.structure.cost_model import hardware_costs, matmul_counts
from tenfold.structure.matmul import BUCKETS

MIN_GAIN = 0.02  # cache if the product with W saves at least this fraction of its price
UNCERTAINTY = 0.2  # of the price for few rows: a matrix that is cached anyway is used for them, too


@contextmanager
def dense_cache(model: nn.Module, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Let layers of ``model`` compute their ``W`` once and use it without gradients inside the ``with`` block.

    Layers with the largest gain per byte come first, while factors and cached matrices together take at most ``limit``.
    Factors must not change inside the block.

    Args:
        limit: in bytes; by default those of the dense layers, 0 for no cache.

    Returns:
        ``layers`` (number of caching layers), ``bytes`` (of their matrices) and ``limit``.

    Raises:
        ValueError: a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"a limit of {limit:,} bytes is less than nothing; give 0 or more")
    linear = [layer for layer in model.modules() if isinstance(layer, FactorizedLinear)]
    layers = [layer for layer in linear if isinstance(layer.structure, Structure)]  # others have no matrix
    factors = {id(p): p.numel() * p.element_size() for layer in layers for p in layer.factors().values()}
    dense = {layer: layer.structure.shape[0] * layer.structure.shape[1] * layer.like.element_size() for layer in layers}
    gains = {layer: estimate_gain(layer) for layer in layers}
    limit = sum(dense.values()) if limit is None else limit
    left, chosen = limit - sum(factors.values()), []
    for layer in sorted(layers, key=lambda layer: -gains[layer][0] / dense[layer]):
        if gains[layer][1] and dense[layer] <= left:
            left -= dense[layer]
            chosen.append(layer)
    try:
        for layer in chosen:
            layer.cached_rows = gains[layer][1]
        yield {"layers": len(chosen), "bytes": sum(dense[layer] for layer in chosen), "limit": limit}
    finally:
        for layer in chosen:
            layer.cached_rows, layer.cached = frozenset(), None


def estimate_gain(layer: FactorizedLinear) -> tuple[float, frozenset[int]]:
    """Return what ``W`` saves, in prices of its product, and the buckets of rows for which it saves anything."""
    structure, costs = layer.structure, hardware_costs(layer.like.device.type)
    if structure.matrices is not None and len(structure.matrices) == 1:  # it is a matrix
        return 0.0, frozenset()
    dense = {rows: matmul_counts(rows, *structure.shape).price(costs) for rows in BUCKETS}
    gains = {rows: structure.price(rows, costs) / dense[rows] - 1 for rows in BUCKETS}
    buckets = {rows for rows, saved in gains.items() if saved > MIN_GAIN}
    if buckets and gains[min(BUCKETS)] > -UNCERTAINTY:
        buckets.add(min(BUCKETS))
    return sum(gains[rows] for rows in buckets), frozenset(buckets)
