"""What moving, copying and beginning cost on this machine: measured once, stored, and used by every plan that is carried out."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from tenfold.evaluate.machine import bytes_per_second, flops_per_second, seconds, turns
from tenfold.nn import FactorizedLinear
from tenfold.nn.worth import keep_measured
from tenfold.structure import BlockTrain, Kronecker, products
from tenfold.structure.pair import KERNELS
from tenfold.structure.worth import SHIPPED, Worth

TURNS = 15
ROWS = 8192
TRIED, LARGE, PLACES = (1, 2, 4, 8, 16, 32, 64), (3072, 768), 8
TWO_FACTORS = (  # of 3072 x 768, at half the FLOPs
    BlockTrain(outs=(768, 4), ins=(4, 192), rank=76),
    Kronecker(outs=(1536, 2), ins=(384, 2), terms=1),
)


def calibrate(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Measure a device and store what was found in the user's cache folder.

    Returns:
        ``worth`` (``moved``, ``copied``, ``call``: FLOPs in the same time; ``narrow`` is the shipped one),
        ``flops_per_second``, ``bytes_per_second``, ``device``, ``threads``, ``kernels`` (how many times as fast layers of two
        factors are with :mod:`tenfold.structure.kernel`, which is used from now on if that is more than one; None where there
        is none), ``rows`` (up to how many of them are multiplied by a matrix in parts, :mod:`tenfold.structure.products`; 0
        where that is not faster) and ``file``. In float32 on a CPU, in bfloat16 elsewhere.
    """
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rate, copies = flops_per_second(device, dtype), bytes_per_second(device)
    rows = torch.zeros(512, 4, 768, device=device, dtype=dtype)  # of four blocks, to be put in turns
    few = torch.zeros(4, 4, device=device, dtype=dtype)
    ordered = _median(lambda: rows.clone(), device)
    turned = _median(lambda: rows.mT.contiguous(), device)
    about = {
        "flops_per_second": rate,
        "bytes_per_second": copies,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "kernels": _kernels(device, dtype) if device.type == "cuda" and find_spec("triton") else None,
        "rows": _rows(device) if device.type == "cpu" else 0,
    }
    worth = Worth(
        moved=rate * rows.element_size() / copies,
        copied=rate * max(turned - ordered, 0.0) / rows.numel(),
        call=rate * _median(lambda: torch.einsum("ab,bc->ca", few, few), device),
        narrow=SHIPPED[device.type].narrow if device.type in SHIPPED else 0.0,
    )
    if (about["kernels"] or 0.0) > 1.0:
        worth = replace(worth, copied=0.0)
    return {"worth": vars(worth) | {}, "file": str(keep_measured(device.type, worth, about))} | about


@torch.no_grad()
def _rows(device: torch.device) -> int:
    """Up to how many rows a large matrix is multiplied faster in parts: the last of :data:`TRIED` before one that is slower."""
    before, found = products.ROWS.get(device.type, 0), 0
    # one after the other, so that none is in the cache
    weights = [torch.randn(*LARGE, device=device) for _ in range(PLACES)]

    def every(multiply, x) -> None:
        for weight in weights:
            multiply(x, weight)

    for rows in TRIED:
        x = torch.randn(rows, LARGE[1], device=device)
        products.ROWS[device.type] = rows
        plain, ours = partial(every, torch.nn.functional.linear, x), partial(every, products.linear, x)
        if statistics.median(other / one for one, other in turns(ours, plain, device, TURNS)) < 1:
            break
        found = rows
    products.ROWS[device.type] = before
    return found


def _kernels(device: torch.device, dtype: torch.dtype) -> float:
    """The lowest ratio of :data:`TWO_FACTORS`, forward and backward: seconds of plain products over those of the kernel.

    0 where the kernel gives other numbers, as a compiler for a device that nobody has tried may make it do.
    """
    before, ratios = device.type in KERNELS, []
    for structure in TWO_FACTORS:
        layer = FactorizedLinear(structure, bias=True, device=device)
        layer.set_factors({name: value.to(device) for name, value in structure.init(0.02).items()})
        torch.nn.init.zeros_(layer.bias)
        layer.to(dtype)
        x = torch.randn(ROWS, structure.shape[1], device=device).to(dtype).requires_grad_(True)
        upstream = torch.randn(ROWS, structure.shape[0], device=device).to(dtype)

        def step(on: bool, layer=layer, x=x, upstream=upstream) -> list[torch.Tensor]:
            (KERNELS.add if on else KERNELS.discard)(device.type)
            y = layer(x)
            return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]

        agreeing = all(_near(ours, plain) for ours, plain in zip(step(True), step(False), strict=True))
        ratios += [] if agreeing else [0.0]
        pairs = turns(lambda: step(True), lambda: step(False), device, TURNS)
        ratios.append(statistics.median(plain / ours for ours, plain in pairs))
    (KERNELS.add if before else KERNELS.discard)(device.type)
    return min(ratios)


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Up to a few roundings of bfloat16."""
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm()) <= 0.02 * float(other.norm())


def _median(run, device: torch.device) -> float:
    run()
    return statistics.median(seconds(run, device, 10) for _ in range(TURNS))
