"""Self-guided training: a dense matrix beside every structured one leads it at first and is annealed away."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tenfold.nn import FactorizedLinear
from tenfold.nn.registry import LAYERS


class Guide(nn.Module):
    """``y = a (x G^T + b) + (1 - a) y_structured``; ``G`` starts as the layer's own ``W``, so that nothing changes at first.

    Reference: arXiv 2406.16450.
    """

    def __init__(self, layer: FactorizedLinear):
        super().__init__()
        self.weight = nn.Parameter(layer.dense().detach().clone())
        self.register_buffer("share", torch.ones((), dtype=self.weight.dtype), persistent=False)
        self.on = True

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        return torch.lerp(y, nn.functional.linear(x, self.weight, bias).to(y.dtype), self.share.to(y.dtype))


class Guided(TrainerCallback):
    """Gives the structured layers of ``model`` guides, whose share goes from 1 to 0 as a cosine over ``part`` of the steps.

    They lead in training only: what is evaluated is the model that is saved.

    Raises:
        ValueError: no layer is structured, or no matrix stands for one.
    """

    def __init__(self, model: nn.Module, part: float):
        self.part, self.layers = part, [m for m in model.modules() if isinstance(m, FactorizedLinear)]
        if not self.layers:
            raise ValueError("there is nothing to guide: no layer of the model is structured; leave guide out")
        for layer in self.layers:
            if layer.structure.kind in LAYERS:
                raise ValueError(
                    f"guide needs a matrix beside every structured layer, and none stands for {layer.structure.kind}; leave "
                    "guide out, or choose a structure"
                )
            layer.guide = Guide(layer)
        self.hooks = [layer.register_forward_hook(_led) for layer in self.layers]

    def on_step_begin(self, args, state, control, **kwargs):
        done = min(1.0, state.global_step / max(1.0, self.part * state.max_steps))
        for layer in self.layers:
            layer.guide.share.fill_(0.5 * (1 + math.cos(math.pi * done)))
            layer.guide.on = done < 1  # then it costs nothing any more

    def remove(self) -> None:
        """Leave the structured layers as they are without."""
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            hook.remove()
            del layer.guide


def _led(layer: FactorizedLinear, given: tuple, y: Tensor) -> Tensor:
    return layer.guide(given[0], y, layer.bias) if layer.guide.on and layer.training else y
