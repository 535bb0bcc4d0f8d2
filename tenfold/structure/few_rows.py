"""Multiply a few rows by a large matrix, which takes as long as the matrix takes to be read.

On a CPU the library's product of two matrices reads slowly there; a batch of parts of the matrix, which the threads share, does
not. Nothing is copied but the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # type: ignore[attr-defined]
from torch.autograd import forward_ad

FEW = 4  # rows
LARGE = 2**16  # elements that the matrix has at least
PLAIN = (Tensor, torch.nn.Parameter)  # others know by themselves how they are multiplied


def is_traced() -> bool:
    """Return whether torch.compile, a ``torch.func`` transform or forward-mode differentiation follows the call.

    Such code needs plain differentiable operations and no autograd function.
    """
    if torch.compiler.is_compiling():
        return True
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (..., in) @ weight.T + bias``, ``weight (out, in)``."""
    if is_traced() or torch.is_grad_enabled() or type(weight) not in PLAIN or x.device.type != "cpu":
        return torch.nn.functional.linear(x, weight, bias)
    (out, inner), parts = weight.shape, max(2, torch.get_num_threads())
    few, large = 0 < x.numel() <= FEW * inner, weight.numel() >= LARGE and weight.is_contiguous() and out % parts == 0
    plain = weight.dtype == x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (few and large and plain):
        return torch.nn.functional.linear(x, weight, bias)
    columns = x.reshape(-1, inner).contiguous().mT  # columns that lie in memory one by one: several times faster
    made = torch.bmm(weight.view(parts, -1, inner), columns.expand(parts, *columns.shape)).view(out, -1)
    made = made.mT.reshape(*x.shape[:-1], out)
    return made if bias is None else made.add_(bias)
