"""Several processes at one compression: each runs its share of the text and makes its share of the fits, all know the sum.

They are started by ``torchrun`` or ``accelerate launch``, and do the same in the same order. In a single process nothing here
does anything.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # that the others wait while one of them reads and tokenises a large text


def state() -> PartialState:
    """Which process this is; several on a machine without an accelerator speak over gloo."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def processes() -> int:
    """How many there are."""
    return state().num_processes


def is_first() -> bool:
    """Whether this is the process that writes."""
    return state().is_main_process


def wait() -> None:
    """Until all are here: before one reads what another writes."""
    state().wait_for_everyone()


def mine(items: list[T]) -> list[T]:
    """Those of ``items`` that this process deals with; the others have the others."""
    return items[state().process_index :: processes()]


def total(value: Tensor) -> Tensor:
    """The sum of what all processes give, the same bits everywhere; ``value`` itself where there is one."""
    return value if processes() == 1 else reduce(value.to(state().device), "sum").to(value)


def total_number(value: float) -> float:
    """Likewise of a number."""
    return value if processes() == 1 else float(total(torch.tensor(value, dtype=torch.float64)))


def together(found: dict[int, T]) -> dict[int, T]:
    """``{number: what was found}`` of all processes, by rising number; tensors come over on the CPU."""
    if processes() == 1:
        return found
    everything = gather_object([{number: _on_cpu(value) for number, value in found.items()}])
    return dict(sorted((number, value) for one in everything for number, value in one.items()))


def _on_cpu(value):
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    return type(value)(_on_cpu(part) for part in value) if type(value) in (list, tuple) else value
