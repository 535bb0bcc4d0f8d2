"""Time calls in turns, measure their memory, and the peak rates of the machine: of a large matrix product and a large copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MIN_SECONDS = 0.005  # a timed turn takes at least as long: single short calls are noise


def check_counts(**counts: int | None) -> None:
    """Raise ValueError for a count below 1; None means that it is not given."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} {count} leaves nothing to measure; give 1 or more")


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def time_call(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the mean seconds of ``calls`` calls."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - begun) / calls


def time_in_turns(ours: Callable, other: Callable, device: torch.device, repeats: int) -> list[tuple[float, float]]:
    """Return the seconds of both, measured alternately, so that noise of the machine affects both alike."""
    calls = []
    for run in (ours, other):
        run()  # warm-up
        calls.append(max(1, int(MIN_SECONDS / max(time_call(run, device), 1e-9))))
    return [(time_call(ours, device, calls[0]), time_call(other, device, calls[1])) for _ in range(repeats)]


def summarize_turns(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the median seconds of both, and the median over the turns of other over ours."""
    ours, other = zip(*pairs, strict=True)
    return statistics.median(ours), statistics.median(other), statistics.median(b / a for a, b in pairs)


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that ``run`` holds at once, without those that exist before."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda one: one.start_ns())), initial=0))


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters, buffers and cached dense matrices."""
    cached = [layer.cached for layer in module.modules() if getattr(layer, "cached", None) is not None]
    return sum(map(stored_bytes, (*module.parameters(), *module.buffers(), *cached)))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return a tensor's bytes; of a wrapper, such as torchao's quantised tensors, those of its inner tensors."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


@cache
def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of a large product of two square matrices, measured once a process."""
    size = 1536 if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one @ other
    return 2 * size**3 / statistics.median(time_call(lambda: one @ other, device) for _ in range(7))


@cache
def bytes_per_second(device: torch.device) -> float:
    """Return the rate at which a large tensor is copied, in bytes read and written, measured once a process."""
    source = torch.zeros(2**25 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(time_call(lambda: target.copy_(source), device) for _ in range(7))
