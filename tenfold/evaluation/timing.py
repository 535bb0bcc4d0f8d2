"""Time two calls in turns, and measure the memory that they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MIN_SECONDS = 0.005  # a timed turn takes at least as long: single short calls are noise


def check_counts(**counts: int | None) -> None:
    """Raise ValueError for a count below 1; None means that it is not given."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} {count} leaves nothing to measure; give 1 or more")


def time_call(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the mean seconds of ``calls`` calls."""
    _synchronize(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return (time.perf_counter() - begun) / calls


def compare(ours: Callable, other: Callable, device: torch.device, repeats: int) -> dict[str, float]:
    """Measure two calls in ``repeats`` turns, so that noise of the machine affects both alike.

    Returns:
        ``seconds`` and ``dense_seconds`` (medians), ``ratio`` (the median over the turns of other over ours), and ``bytes`` and
        ``dense_bytes``, the most that a call allocates.
    """
    calls = []
    for run in (ours, other):
        run()  # warm-up
        calls.append(max(1, int(MIN_SECONDS / max(time_call(run, device), 1e-9))))
    turns = [(time_call(ours, device, calls[0]), time_call(other, device, calls[1])) for _ in range(repeats)]
    return {
        "seconds": median(a for a, _ in turns),
        "dense_seconds": median(b for _, b in turns),
        "ratio": median(b / a for a, b in turns),
        "bytes": peak_memory(ours, device),
        "dense_bytes": peak_memory(other, device),
    }


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that ``run`` holds at once, without those that exist before."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        _synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    recorded: Any = profiled.profiler  # its events in order of time have no public name
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda one: one.start_ns())), initial=0))


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters, buffers and cached dense matrices."""
    caches = (getattr(layer, "cached", None) for layer in module.modules())
    tensors: list[Tensor] = [*module.parameters(), *module.buffers(), *(one for one in caches if one is not None)]
    return sum(map(stored_bytes, tensors))


def stored_bytes(tensor: Tensor) -> int:
    """Return a tensor's bytes; of a wrapper, such as torchao's quantised tensors, those of its inner tensors."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
