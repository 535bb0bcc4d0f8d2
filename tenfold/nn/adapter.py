"""Adapters: a small trainable low-rank part beside a layer that stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from tenfold.nn.layers import FactorizedLinear
from tenfold.structure import Dense, LowRank, Structure, Sum


class Adapter(FactorizedLinear):
    """``y = x @ (W + left @ right).T + bias``: a :class:`Sum` of what ``layer`` holds and a low-rank part.

    The adapter's ``left`` starts at zero, so the function is at first that of ``layer``, whose factors and bias are
    frozen. ``layer`` itself is left alone.

    Args:
        layer: an ``nn.Linear`` or a :class:`FactorizedLinear`; factors that it shares stay shared, and are frozen for all.
        rank: the rank of the adapter.
        generator: draws ``right``.

    Raises:
        ValueError: ``layer`` is of another kind.

    Reference: arXiv 2106.09685 (LoRA); arXiv 2303.16753 (beside shared cores).
    """

    def __init__(self, layer: nn.Linear | FactorizedLinear, rank: int, generator: torch.Generator | None = None):
        structure, factors = _held(layer)
        low = LowRank(out_features=layer.out_features, in_features=layer.in_features, rank=rank)
        bias, like = layer.bias is not None, next(iter(factors.values()))
        frozen = [f"part_0_{name}" for name in structure.factor_shapes()] + ["bias"] * bias
        folded = layer if isinstance(layer, FactorizedLinear) else None
        shared = {f"part_0_{name}": key for name, key in (folded.shared if folded else {}).items()}
        super().__init__(Sum(parts=(structure, low)), bias, shared, frozen, device=like.device, dtype=like.dtype)
        if folded is not None and shared:
            self.attach(folded._container[0])
        right = low.init(layer.in_features**-0.5, generator)["right"]
        new = {"part_1_left": right.new_zeros(layer.out_features, rank), "part_1_right": right}
        self.set_factors(new | {f"part_0_{name}": value for name, value in factors.items()})
        if self.bias is not None and layer.bias is not None:
            self.bias.data.copy_(layer.bias)
        self.freeze()


def _held(layer: nn.Module):
    """The structure of a layer and its factors."""
    if isinstance(layer, FactorizedLinear):
        if not isinstance(layer.structure, Structure):
            raise ValueError(
                f"an adapter goes beside a matrix, and a layer of kind {layer.structure.kind} has none (there is a non-linearity "
                "between its factors); train all of it"
            )
        return layer.structure, layer.factors()
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"an adapter goes beside nn.Linear or FactorizedLinear, not {type(layer).__name__}; fold it")
    return Dense(out_features=layer.out_features, in_features=layer.in_features), {"matrix": layer.weight}
