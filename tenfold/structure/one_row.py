"""Multiply one row by a large matrix, which takes as long as the matrix takes to be read.

On a CPU the library's product of two matrices reads slowly there; a batch of parts of the matrix, which the threads share, does
not. Nothing is copied but the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.structure.matmul import is_traced

LARGE = 2**16  # elements that the matrix has at least
PLAIN = (Tensor, torch.nn.Parameter)  # others know by themselves how they are multiplied


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (..., in) @ weight.T + bias``, ``weight (out, in)``."""
    if is_traced():
        return torch.nn.functional.linear(x, weight, bias)
    (out, inner), parts = weight.shape, max(2, torch.get_num_threads())
    few = x.device.type == "cpu" and x.numel() == inner and not torch.is_grad_enabled()
    plain = type(weight) in PLAIN and weight.dtype == x.dtype == torch.float32 and weight.is_contiguous()
    if not (few and plain) or weight.numel() < LARGE or out % parts or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(x, weight, bias)
    made = torch.bmm(weight.view(parts, -1, inner), x.reshape(1, inner).mT.expand(parts, inner, 1)).view(out)
    return (made if bias is None else made.add_(bias)).view(*x.shape[:-1], out)
