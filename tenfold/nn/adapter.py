"""Adapters: a small trainable low-rank part beside a layer that stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from tenfold.nn.layers import FactorizedLinear
from tenfold.structure import Dense, LowRank, Sum


class Adapter(FactorizedLinear):
    """``y = x @ (W + left @ right).T + bias``: a :class:`Sum` of what ``layer`` holds and a low-rank part.

    The adapter's ``left`` starts at zero, so the function is at first that of ``layer``, whose factors are frozen.

    Args:
        layer: an ``nn.Linear`` or a :class:`FactorizedLinear` without shared factors.
        rank: the rank of the adapter.

    Reference: arXiv 2106.09685 (LoRA); arXiv 2303.16753 (beside shared cores).
    """

    def __init__(self, layer: nn.Linear | FactorizedLinear, rank: int, generator: torch.Generator | None = None):
        held = isinstance(layer, FactorizedLinear)
        if held and layer.shared:
            raise ValueError(f"the layer shares {sorted(layer.shared)}; add the adapter in the recipe (adapter: rank)")
        base = layer.structure if held else Dense(out_features=layer.out_features, in_features=layer.in_features)
        low = LowRank(out_features=layer.out_features, in_features=layer.in_features, rank=rank)
        like = next(layer.parameters())
        super().__init__(Sum(parts=(base, low)), layer.bias is not None, device=like.device, dtype=like.dtype)
        factors = layer.factors() if held else {"matrix": layer.weight}
        noise = low.init(layer.in_features**-0.5, generator)
        self.set_factors(
            {f"part_0_{name}": value for name, value in factors.items()}
            | {"part_1_left": torch.zeros_like(noise["left"]), "part_1_right": noise["right"]}
        )
        if layer.bias is not None:
            with torch.no_grad():
                self.bias.copy_(layer.bias)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("part_1_"))
