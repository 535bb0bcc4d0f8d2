"""The experts of a mixture as separate linear layers, so that each can be factorised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tenfold.structure.few_rows import is_traced


class Expert(nn.Module):
    """``down(act(gate x) * up x)`` of the tokens that are routed to one expert.

    Args:
        width: of the hidden states.
        units: hidden units of the expert.
        act: the activation function.
    """

    def __init__(self, width: int, units: int, act: Callable, device=None, dtype=None):
        super().__init__()
        options = {"bias": False, "device": device, "dtype": dtype}
        self.gate, self.up = nn.Linear(width, units, **options), nn.Linear(width, units, **options)
        self.down, self.act = nn.Linear(units, width, **options), act
        self.rows: Tensor | None = None  # the tokens of the last batch that were routed here, read by calibration

    def forward(self, states: Tensor) -> Tensor:
        return self.down(self.act(self.gate(states)) * self.up(states))


class Experts(nn.Module):
    """``sum_k weight_k expert_(index_k)(x)``: replaces transformers' fused experts behind a router.

    Args:
        experts: in the order of the router's indices.
    """

    def __init__(self, experts: list[Expert]):
        super().__init__()
        self.each = nn.ModuleList(experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return ``(tokens, width)`` from ``hidden_states`` alike and ``top_k_index``, ``top_k_weights (tokens, k)``.

        When exported or under ``torch.func`` nothing can depend on the routing: every expert computes all tokens.
        """
        out = torch.zeros_like(hidden_states)
        if torch.compiler.is_exporting() or (is_traced() and not torch.compiler.is_compiling()):
            for k, expert in enumerate(self.each):
                weight = (top_k_weights * (top_k_index == k)).sum(-1, keepdim=True)
                out = out + (expert(hidden_states) * weight).to(out.dtype)
            return out
        chosen, weights = top_k_index.flatten(), top_k_weights.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self.each))[: len(self.each)].tolist()
        for expert, places in zip(self.each, order[: sum(counts)].split(counts), strict=True):
            expert.rows = places // top_k_index.shape[-1]
            if len(places) or self.training:  # without tokens the gradient is zero, which every process needs
                states = expert(hidden_states[expert.rows]) * weights[places, None]
                out.index_add_(0, expert.rows, states.to(out.dtype))
        return out
