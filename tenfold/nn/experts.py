"""The experts of a mixture, each with matrices of its own, so that every one of them can be folded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tenfold.structure.matmul import is_traced


class Expert(nn.Module):
    """``down(act(gate x) * up x)`` of the tokens that are sent to one expert.

    Args:
        width: of the hidden states.
        units: hidden units of the expert.
        act: the activation function.
    """

    def __init__(self, width: int, units: int, act: Callable, device=None, dtype=None):
        super().__init__()
        given = {"bias": False, "device": device, "dtype": dtype}
        self.gate, self.up = nn.Linear(width, units, **given), nn.Linear(width, units, **given)
        self.down, self.act = nn.Linear(units, width, **given), act
        self.rows: Tensor | None = None  # which tokens of the last batch were sent here: calibration asks for it

    def forward(self, states: Tensor) -> Tensor:
        return self.down(self.act(self.gate(states)) * self.up(states))


class Experts(nn.Module):
    """``sum_k weight_k expert_(index_k)(x)``: what a router calls, in the place of transformers' fused experts.

    Args:
        experts: in the order of the router's indices.
    """

    def __init__(self, experts: list[Expert]):
        super().__init__()
        self.each = nn.ModuleList(experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states (tokens, width)``, ``top_k_index`` and ``top_k_weights (tokens, k)`` to ``(tokens, width)``.

        An exported program, and one that ``torch.func`` follows, has no numbers to branch on: every expert computes all tokens.
        """
        if torch.compiler.is_exporting() or (is_traced() and not torch.compiler.is_compiling()):
            return self._all(hidden_states, top_k_index, top_k_weights)
        chosen, weights = top_k_index.flatten(), top_k_weights.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self.each))[: len(self.each)].tolist()
        out = torch.zeros_like(hidden_states)
        for expert, places in zip(self.each, order[: sum(counts)].split(counts), strict=True):
            expert.rows = places // top_k_index.shape[-1]
            if len(places) or self.training:  # none to train on is a gradient of zero, which all processes have to have
                made = expert(hidden_states[expert.rows]) * weights[places, None]
                out.index_add_(0, expert.rows, made.to(out.dtype))
        return out

    def _all(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(states)
        for k, expert in enumerate(self.each):
            share = (weights * (index == k)).sum(-1, keepdim=True)
            out = out + (expert(states) * share).to(out.dtype)
        return out
