"""How fast the layers of a model are: every structure in it against ``nn.Linear``, in turns, beside the floor of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import cycle
from typing import Any

import torch
from torch import nn

from tenfold.evaluate.timing import bytes_per_second, check_counts, flops_per_second, footprint, peak, turns
from tenfold.nn import FactorizedLinear

ROWS = (1, 8, 64, 512, 4096)
FEW = 64  # rows: with fewer, factors come from memory, not from caches
CACHES = 2**27  # bytes that fit into no cache
COPIES = 64  # of a layer at most: very small ones stay in the caches in a model, too
WARM = 3  # calls before the first one that is timed


def bench_layers(
    model: nn.Module,
    rows: Sequence[int] = ROWS,
    repeats: int = 9,
    progress: Callable[[Iterable], Iterable] = iter,
    backward: bool = True,
) -> list[dict[str, Any]]:
    """Forward, and (``backward``) forward with backward, of every structure in ``model``, each once, at every number of ``rows``.

    Returns:
        Per structure, number of rows and pass: ``seconds`` and ``dense_seconds`` (medians), ``ratio``, the median of dense over
        ours turn by turn, and ``floor``: no fewer seconds are possible for the FLOPs of the cheapest plan at the rate of a
        large matrix product, or for the bytes of input, output and factors at the rate of a large copy, whichever is more. A
        backward pass counts as twice the forward pass. ``bytes`` and ``dense_bytes``: the most that a pass holds at once, with
        parameters, without its input. With few rows as many copies of a layer are called by turns as no cache holds: in a
        model, too, a layer is read from memory each time.

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
    cells = [(some, count, way) for some in layers.values() for count in rows for way in passes]
    return [_cell(*cell, repeats) for cell in progress(cells)]


def _cell(layers: list[FactorizedLinear], rows: int, backward: bool, repeats: int) -> dict[str, Any]:
    layer = layers[0]
    device, dtype, (out, inner) = layer.like.device, layer.dtype, layer.structure.shape
    twin = nn.Linear(inner, out, layer.bias is not None, device, dtype)
    x = torch.randn(rows, inner, device=device).to(dtype).requires_grad_(backward)
    upstream = torch.randn(rows, out, device=device).to(dtype)
    runs = [by_turns(copies(module, rows), x, upstream, backward) for module in (layer, twin)]
    pairs = turns(*runs, device, repeats)
    most = [held(module, x, upstream, backward) for module in (layer, twin)]
    layer.zero_grad(set_to_none=True)
    return {
        "structure": layer.structure.to_json(),
        "shape": [out, inner],
        "layers": len(layers),
        "rows": rows,
        "pass": "forward + backward" if backward else "forward",
        "seconds": statistics.median(ours for ours, _ in pairs),
        "dense_seconds": statistics.median(dense for _, dense in pairs),
        "ratio": statistics.median(dense / ours for ours, dense in pairs),
        "floor": floor(layer, rows) * (3 if backward else 1),
        "bytes": most[0],
        "dense_bytes": most[1],
    }


def copies(module: nn.Module, rows: int) -> list[nn.Module]:
    """``module``, and as many copies of it that no cache holds all of them, if ``rows`` are few."""
    size = sum(value.nbytes for value in module.parameters())
    return [module, *(deepcopy(module) for _ in range(min(COPIES, CACHES // size) if rows < FEW else 0))]


def by_turns(modules: list[nn.Module], x: torch.Tensor, upstream: torch.Tensor, backward: bool) -> Callable[[], None]:
    """One of ``modules`` after the other, each of which was called before."""
    passes = [one_pass(module, x, upstream, backward) for module in modules]
    for run in passes:
        for _ in range(WARM if len(passes) > 1 else 0):
            run()
    following = cycle(passes)
    return lambda: next(following)()


def one_pass(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor, backward: bool) -> Callable[[], None]:
    """What is timed: forward without gradients, or forward and backward to ``x`` and all parameters."""

    def run() -> None:
        if not backward:
            with torch.no_grad():
                module(x)
            return
        for value in (x, *module.parameters()):
            value.grad = None
        module(x).backward(upstream)

    return run


def held(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor, backward: bool) -> int:
    """Bytes that a pass holds at most, with parameters, without ``x`` and ``upstream``."""
    run = one_pass(module, x, upstream, backward)
    run()  # whatever is made once
    for value in (x, *module.parameters()):
        value.grad = None  # else it would be freed within the pass
    return peak(run, x.device) + footprint(module)


def floor(layer: FactorizedLinear, rows: int) -> float:
    """Seconds that a forward pass takes at least."""
    device, size = layer.like.device, layer.like.element_size()
    numbers = rows * sum(layer.structure.shape) + sum(p.numel() for p in layer.parameters())
    return max(
        layer.structure.flops(rows) / flops_per_second(device, layer.dtype), numbers * size / bytes_per_second(device)
    )
