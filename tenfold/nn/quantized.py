"""Factors that torchao has quantised."""

from __future__ import annotations

import torch
from torch import Tensor


def is_quantized(value: Tensor) -> bool:
    """Return whether torchao quantised ``value``: then ``torch.nn.functional.linear`` is the only product that reads it."""
    return type(value) not in (Tensor, torch.nn.Parameter) and type(value).__module__.startswith("torchao.")


def dequantize(value: Tensor) -> Tensor:
    """Return the elements that a quantised tensor represents, any other tensor as it is."""
    return value.dequantize() if is_quantized(value) else value
