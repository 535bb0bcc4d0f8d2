"""Collective operations of compression on several processes, which each run a part of the text and of the fits.

``torchrun`` or ``accelerate launch`` starts the processes, and all do the same in the same order. In a single process nothing
here does anything.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce, send_to_device
from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # the others wait while one of them reads and tokenises a large text


def process_state() -> PartialState:
    """Return the state of this process; several on a machine without an accelerator communicate over gloo."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)


def num_processes() -> int:
    """Return the number of processes."""
    return process_state().num_processes


def is_main_process() -> bool:
    """Tell whether this is the process that writes files."""
    return process_state().is_main_process


def barrier() -> None:
    """Wait for all processes, before one reads what another writes."""
    process_state().wait_for_everyone()


def shard_items(items: list[T]) -> list[T]:
    """Return those of ``items`` that this process works on."""
    return items[process_state().process_index :: num_processes()]


def all_reduce(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over all processes, the same bits everywhere."""
    if num_processes() == 1:
        return value
    total: Any = reduce(value.to(process_state().device), "sum")
    return total.to(value)


def all_reduce_number(value: float) -> float:
    """Return the sum of a number over all processes."""
    return value if num_processes() == 1 else float(all_reduce(torch.tensor(value, dtype=torch.float64)))


def gather_results(results: dict[int, T]) -> dict[int, T]:
    """Return ``{number: result}`` of all processes in rising order; tensors arrive on the CPU."""
    if num_processes() == 1:
        return results
    everything = gather_object([send_to_device(results, "cpu")])
    return dict(sorted((number, value) for one in everything for number, value in one.items()))
