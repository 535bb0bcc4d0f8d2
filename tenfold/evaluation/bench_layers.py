"""Speed and memory of the layers of a model: every structure in it against ``nn.Linear``, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.evaluation.timing import check_counts, compare, module_bytes
from tenfold.nn import FactorizedLinear

ROWS = (1, 8, 64, 512, 4096)
FEW_ROWS = 64  # below it factors are read from memory, not from caches


def bench_layers(
    model: nn.Module,
    rows: Sequence[int] = ROWS,
    repeats: int = 9,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict[str, Any]]:
    """Measure forward, and forward with backward, of every structure in ``model`` at every number of ``rows``.

    With few rows all layers of a structure are called one after the other, as a model does, whose factors exceed the caches.

    Returns:
        Per structure, number of rows and pass, for one layer: ``seconds`` and ``dense_seconds`` (medians), ``ratio``, the median
        over the turns of dense over ours, and ``bytes`` and ``dense_bytes``, the peak of a pass with parameters.

    Raises:
        ValueError: ``repeats``, or a number of rows, is below 1.
    """
    for count in rows:
        check_counts(rows=count, repeats=repeats)
    groups: dict[tuple, list[FactorizedLinear]] = {}
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):
            groups.setdefault((layer.structure, layer.bias is None, layer.dtype), []).append(layer)
    cells = [(layers, count, backward) for layers in groups.values() for count in rows for backward in (False, True)]
    return [_measure(layers, count, backward, repeats) for layers, count, backward in progress(cells)]


def _measure(layers: list[FactorizedLinear], rows: int, backward: bool, repeats: int) -> dict[str, Any]:
    layer = layers[0]
    device, dtype, (out, inner) = layer.like.device, layer.dtype, layer.structure.shape
    timed = layers if rows < FEW_ROWS else [layer]
    twins = [nn.Linear(inner, out, layer.bias is not None, device, dtype) for _ in timed]
    x = torch.randn(rows, inner, device=device).to(dtype).requires_grad_(backward)
    upstream = torch.randn(rows, out, device=device).to(dtype) if backward else None
    found = compare(make_pass(timed, x, upstream), make_pass(twins, x, upstream), device, repeats)
    return {
        "structure": layer.structure.to_json(),
        "shape": [out, inner],
        "layers": len(layers),
        "rows": rows,
        "pass": "forward + backward" if backward else "forward",
        "seconds": found["seconds"] / len(timed),
        "dense_seconds": found["dense_seconds"] / len(timed),
        "ratio": found["ratio"],
        "bytes": found["bytes"] + module_bytes(layer),
        "dense_bytes": found["dense_bytes"] + module_bytes(twins[0]),
    }


def make_pass(modules: Sequence[nn.Module], x: Tensor, upstream: Tensor | None) -> Callable[[], None]:
    """Return what is timed: forward without gradients, or with ``upstream`` also backward to ``x`` and all parameters."""

    def run() -> None:
        for module in modules:
            with torch.set_grad_enabled(upstream is not None):
                y = module(x)
            if upstream is not None:
                y.backward(upstream)
                for value in (x, *module.parameters()):
                    value.grad = None

    return run
