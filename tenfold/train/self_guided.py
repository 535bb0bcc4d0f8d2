"""Self-guided training: a dense matrix beside every structured one, whose weight is annealed to zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tenfold.nn import FactorizedLinear
from tenfold.structure import Structure


class Guide(nn.Module):
    """``y = a (x G^T + b) + (1 - a) y_structured``; ``G`` starts as the layer's own ``W``, which changes nothing at first.

    Reference: arXiv 2406.16450.
    """

    def __init__(self, layer: FactorizedLinear):
        super().__init__()
        self.ratio: Tensor
        self.weight = nn.Parameter(layer.dense().detach().clone())
        self.register_buffer("ratio", torch.ones((), dtype=self.weight.dtype), persistent=False)
        self.active = True

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        return torch.lerp(y, nn.functional.linear(x, self.weight, bias).to(y.dtype), self.ratio.to(y.dtype))


class SelfGuidance(TrainerCallback):
    """Add guides to the structured layers of ``model``; ``a`` follows a cosine from 1 to 0 over ``fraction`` of the steps.

    Guides act in training only: the model is evaluated as it is saved.
    """

    def __init__(self, model: nn.Module, fraction: float):
        self.fraction = fraction
        self.layers: list[Any] = [m for m in model.modules() if isinstance(m, FactorizedLinear)]
        if not self.layers:
            raise ValueError("there is nothing to guide: no layer is structured; leave self_guided_fraction out")
        for layer in self.layers:
            if not isinstance(layer.structure, Structure):
                raise ValueError(
                    f"self_guided_fraction needs a matrix beside every structured layer, and none stands for "
                    f"{layer.structure.kind}; leave it out, or choose a structure"
                )
            layer.guide = Guide(layer)
            layer.register_forward_hook(_mix_guide)

    def on_step_begin(self, args, state, control, **kwargs):
        done = min(1.0, state.global_step / max(1.0, self.fraction * state.max_steps))
        for layer in self.layers:
            layer.guide.ratio.fill_(0.5 * (1 + math.cos(math.pi * done)))
            layer.guide.active = done < 1  # skips the dense product


def without_guides(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a guided model without those of the guides."""
    return {key: value for key, value in weights.items() if not key.endswith(".guide.weight")}


def _mix_guide(layer: Any, inputs: tuple, y: Tensor) -> Tensor:
    return layer.guide(inputs[0], y, layer.bias) if layer.guide.active and layer.training else y
