"""A loss of many rows, a few at a time, with its gradients made on the way forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def summed(
    run: Callable[[Tensor, slice], Tensor], states: Tensor, parameters: Sequence[Tensor], size: int, again: bool = False
) -> Tensor:
    """``sum_i run(states[slice_i], slice_i)`` over slices of ``size`` rows of ``states (n, ...)``.

    The gradients of a slice are computed as soon as its part of the loss is, so that no graph of more than one slice is ever
    held and nothing is computed twice; until the way back the gradients of ``states`` and of what ``run`` uses are held.
    It can be differentiated once.

    Args:
        run: the loss of a slice of rows, a number; it may use ``parameters``, and nothing else that needs a gradient.
        again: compute a slice once more on the way back instead: what lies in parts on several processes (FSDP2) is put
            together by hooks that know of one way back only.
    """
    free, slices = [p for p in parameters if p.requires_grad], _slices(len(states), size)
    if not torch.is_grad_enabled():
        return torch.stack([run(states[one], one) for one in slices]).sum()
    if again:
        return torch.stack([checkpoint(run, states[one], one, use_reentrant=False) for one in slices]).sum()
    return _Summed.apply(run, size, states, *free)


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(begin, begin + size) for begin in range(0, max(1, rows), size)]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, size, states, *parameters):
        losses, of_states = [], torch.zeros_like(states)
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        for one in _slices(len(states), size):
            with torch.enable_grad():
                part = states[one].detach().requires_grad_()
                loss = run(part, one)
            first, *others = torch.autograd.grad(loss, (part, *parameters), allow_unused=True)
            losses.append(loss.detach())
            if first is not None:
                of_states[one] = first
            for number, found in enumerate(others):
                if found is not None:
                    known = of_parameters[number]  # a copy: autograd may hand out one tensor as two gradients
                    of_parameters[number] = found.clone() if known is None else known.add_(found)
        ctx.made = (of_states, *of_parameters)
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        made, ctx.made = ctx.made, ()  # so large that it is not held for a second time
        return None, None, *(None if value is None else value.mul_(upstream) for value in made)
