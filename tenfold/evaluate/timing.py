"""What the machine can do at best: products of matrices and copies, measured once a process; and turns that are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LEAST = 0.005  # seconds that one timed turn takes at least: fewer calls are noise


def check_counts(**counts: int | None) -> None:
    """Refuse those of which nothing could be measured; None is one that is not given."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} {count} leaves nothing to measure; give 1 or more")


def wait(device: torch.device) -> None:
    """Until everything that was started on ``device`` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Of one call of ``run``, the mean of ``calls``."""
    wait(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return (time.perf_counter() - begun) / calls


def turns(ours: Callable, other: Callable, device: torch.device, repeats: int) -> list[tuple[float, float]]:
    """Seconds of both, turn by turn: noise of the machine then touches both alike."""
    calls = []
    for run in (ours, other):
        run()  # whatever is made once
        calls.append(max(1, int(LEAST / max(seconds(run, device), 1e-9))))
    return [(seconds(ours, device, calls[0]), seconds(other, device, calls[1])) for _ in range(repeats)]


def peak(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that ``run`` holds at once, beside those that were there before."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        wait(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda one: one.start_ns())), initial=0))


@cache
def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large product of two square matrices."""
    size = 1536 if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one @ other
    return 2 * size**3 / statistics.median(seconds(lambda: one @ other, device) for _ in range(7))


def footprint(module: nn.Module) -> int:
    """Bytes of its parameters, of what else is saved, and of cached matrices."""
    cached = [layer.cached for layer in module.modules() if getattr(layer, "cached", None) is not None]
    return sum(map(stored, (*module.parameters(), *module.buffers(), *cached)))


def stored(tensor: torch.Tensor) -> int:
    """Its bytes; of one that is made of others, as torchao's quantised ones are, the bytes of these."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored(getattr(tensor, name)) for name in names)


@cache
def bytes_per_second(device: torch.device) -> float:
    """The rate at which a large tensor is copied, bytes read and written."""
    source = torch.zeros(2**25 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(7))
