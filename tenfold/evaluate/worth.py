"""What moving, copying and beginning cost on this machine: measured once, stored, and used by every plan that is carried out."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from tenfold.evaluate.machine import bytes_per_second, flops_per_second, seconds
from tenfold.nn.worth import keep_measured
from tenfold.structure.worth import Worth

TURNS = 15


def calibrate(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Measure a device and store what was found in the user's cache folder.

    Returns:
        ``worth`` (``moved``, ``copied``, ``call``: FLOPs in the same time), ``flops_per_second``, ``bytes_per_second``,
        ``device``, ``threads`` and ``file``. In float32 on a CPU, in bfloat16 elsewhere.
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
    }
    worth = Worth(
        moved=rate * rows.element_size() / copies,
        copied=rate * max(turned - ordered, 0.0) / rows.numel(),
        call=rate * _median(lambda: torch.einsum("ab,bc->ca", few, few), device),
    )
    return {"worth": vars(worth) | {}, "file": str(keep_measured(device.type, worth, about))} | about


def _median(run, device: torch.device) -> float:
    run()
    return statistics.median(seconds(run, device, 10) for _ in range(TURNS))
