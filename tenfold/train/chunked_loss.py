"""A loss over many rows, computed in chunks, with the gradients computed in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def sum_chunks(
    loss: Callable[[Tensor, slice], Tensor],
    states: Tensor,
    parameters: Sequence[Tensor],
    size: int,
    recompute: bool = False,
) -> Tensor:
    """Return ``sum_i loss(states[rows_i], rows_i)`` over slices of ``size`` rows of ``states (n, ...)``.

    The gradients of a chunk are computed right after its loss: only one chunk's graph exists at a time, and nothing is computed
    twice. Until backward, the gradients of ``states`` and ``parameters`` are held. The result can be differentiated once.

    Args:
        loss: returns the scalar loss of some rows; it may use ``parameters``, and nothing else that needs a gradient.
        recompute: compute each chunk again in backward instead, as parameters sharded by FSDP2 require: the hooks that gather
            them expect one backward pass.
    """
    if recompute or not torch.is_grad_enabled():
        parts = [checkpoint(loss, states[rows], rows, use_reentrant=False) for rows in _slices(len(states), size)]
        return torch.stack(parts).sum()
    return _SumChunks.apply(loss, size, states, *(p for p in parameters if p.requires_grad))


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(begin, begin + size) for begin in range(0, max(1, rows), size)]


class _SumChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, size, states, *parameters):
        losses, states_grad = [], torch.zeros_like(states)
        parameter_grads: list[Tensor | None] = [None] * len(parameters)
        for rows in _slices(len(states), size):
            with torch.enable_grad():
                chunk = states[rows].detach().requires_grad_()
                value = loss(chunk, rows)
            chunk_grad, *grads = torch.autograd.grad(value, (chunk, *parameters), allow_unused=True)
            losses.append(value.detach())
            if chunk_grad is not None:
                states_grad[rows] = chunk_grad
            for k, grad in enumerate(grads):
                if grad is not None:
                    total = parameter_grads[k]  # cloned first: autograd may return one tensor as two gradients
                    parameter_grads[k] = grad.clone() if total is None else total.add_(grad)
        ctx.grads = (states_grad, *parameter_grads)
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (upstream,), grads, ctx.grads = grad_outputs, ctx.grads, ()  # too large to be held any longer
        return None, None, *(None if grad is None else grad.mul_(upstream) for grad in grads)
