"""Speed and memory of the layers of a model: every structure in it against ``nn.Linear``, in turns, and a lower bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import cycle
from typing import Any

import torch
from torch import nn

from tenfold.evaluation.timing import (
    bytes_per_second,
    check_counts,
    flops_per_second,
    module_bytes,
    peak_memory,
    summarize_turns,
    time_in_turns,
)
from tenfold.nn import FactorizedLinear

ROWS = (1, 8, 64, 512, 4096)
FEW_ROWS = 64  # below it factors are read from memory, not from caches
CACHES = 2**27  # bytes that exceed any cache
MAX_COPIES = 64  # of a layer: very small ones stay in caches in a model, too
WARM_UP = 3  # calls of a copy


def bench_layers(
    model: nn.Module,
    rows: Sequence[int] = ROWS,
    repeats: int = 9,
    progress: Callable[[Iterable], Iterable] = iter,
    backward: bool = True,
) -> list[dict[str, Any]]:
    """Measure forward, and (``backward``) forward with backward, of every structure in ``model`` at every number of ``rows``.

    Returns:
        Per structure, number of rows and pass: ``seconds`` and ``dense_seconds`` (medians), ``ratio``, the median over the turns
        of dense over ours, and ``floor``, the least seconds possible: for the FLOPs of the cheapest plan at the rate of a large
        matrix product, or for the bytes of input, output and factors at the rate of a large copy, whichever is more. A backward
        pass counts as two forward passes. ``bytes`` and ``dense_bytes``: the peak of a pass with parameters, without its input.
        With few rows, so many copies of a layer are called in turn that they exceed the caches, as the layers of a model do.

    Raises:
        ValueError: ``repeats``, or a number of rows, is below 1.
    """
    for count in rows:
        check_counts(rows=count, repeats=repeats)
    layers: dict[tuple, list[FactorizedLinear]] = {}
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):
            layers.setdefault((layer.structure, layer.bias is None, layer.dtype), []).append(layer)
    passes = (False, True) if backward else (False,)
    cells = [(alike, count, one) for alike in layers.values() for count in rows for one in passes]
    return [_measure(*cell, repeats) for cell in progress(cells)]


def _measure(layers: list[FactorizedLinear], rows: int, backward: bool, repeats: int) -> dict[str, Any]:
    layer = layers[0]
    device, dtype, (out, inner) = layer.like.device, layer.dtype, layer.structure.shape
    twin = nn.Linear(inner, out, layer.bias is not None, device, dtype)
    x = torch.randn(rows, inner, device=device).to(dtype).requires_grad_(backward)
    upstream = torch.randn(rows, out, device=device).to(dtype)
    runs = [call_in_turn(make_copies(module, rows), x, upstream, backward) for module in (layer, twin)]
    seconds, dense_seconds, ratio = summarize_turns(time_in_turns(*runs, device, repeats))
    peaks = [pass_memory(module, x, upstream, backward) for module in (layer, twin)]
    layer.zero_grad(set_to_none=True)
    return {
        "structure": layer.structure.to_json(),
        "shape": [out, inner],
        "layers": len(layers),
        "rows": rows,
        "pass": "forward + backward" if backward else "forward",
        "seconds": seconds,
        "dense_seconds": dense_seconds,
        "ratio": ratio,
        "floor": floor(layer, rows) * (3 if backward else 1),
        "bytes": peaks[0],
        "dense_bytes": peaks[1],
    }


def make_copies(module: nn.Module, rows: int) -> list[nn.Module]:
    """Return ``module``, and with few ``rows`` enough copies of it to exceed the caches."""
    size = sum(value.nbytes for value in module.parameters())
    return [module, *(deepcopy(module) for _ in range(min(MAX_COPIES, CACHES // size) if rows < FEW_ROWS else 0))]


def call_in_turn(
    modules: list[nn.Module], x: torch.Tensor, upstream: torch.Tensor, backward: bool
) -> Callable[[], None]:
    """Warm up all ``modules``, and return a function that calls one after the other."""
    passes = [make_pass(module, x, upstream, backward) for module in modules]
    for run in passes:
        for _ in range(WARM_UP if len(passes) > 1 else 0):
            run()
    following = cycle(passes)
    return lambda: next(following)()


def make_pass(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor, backward: bool) -> Callable[[], None]:
    """Return what is timed: forward without gradients, or forward and backward to ``x`` and all parameters."""

    def run() -> None:
        if not backward:
            with torch.no_grad():
                module(x)
            return
        for value in (x, *module.parameters()):
            value.grad = None
        module(x).backward(upstream)

    return run


def pass_memory(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor, backward: bool) -> int:
    """Return the peak bytes of a pass, with parameters, without ``x`` and ``upstream``."""
    run = make_pass(module, x, upstream, backward)
    run()  # warm-up
    for value in (x, *module.parameters()):
        value.grad = None  # otherwise it would be freed within the pass
    return peak_memory(run, x.device) + module_bytes(module)


def floor(layer: FactorizedLinear, rows: int) -> float:
    """Return the least seconds of a forward pass."""
    device, size = layer.like.device, layer.like.element_size()
    elements = rows * sum(layer.structure.shape) + sum(p.numel() for p in layer.parameters())
    flops_time = layer.structure.flops(rows) / flops_per_second(device, layer.dtype)
    return max(flops_time, elements * size / bytes_per_second(device))
