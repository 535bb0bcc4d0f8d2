"""Adapters: a small trainable low-rank part beside a frozen layer."""

from __future__ import annotations

import torch
from torch import nn

from tenfold.nn.layers import FactorizedLinear
from tenfold.structure import Dense, Factors, LowRank, Structure, Sum


class Adapter(FactorizedLinear):
    """``y = x @ (W + left @ right).T + bias``: a ``Sum`` of the matrix of ``layer`` and a low-rank part.

    The adapter's ``left`` starts at zero, so the function is initially that of ``layer``, whose factors and bias are copied and
    frozen. ``layer`` itself does not change.

    Args:
        layer: an ``nn.Linear`` or a ``FactorizedLinear``; its shared factors stay shared, and are frozen for all users.
        rank: the rank of the adapter.
        generator: draws ``right``.

    Raises:
        ValueError: ``layer`` is of another kind.

    Reference: arXiv 2106.09685 (LoRA); arXiv 2303.16753 (beside shared cores).
    """

    def __init__(self, layer: nn.Linear | FactorizedLinear, rank: int, generator: torch.Generator | None = None):
        structure, factors = _structure_and_factors(layer)
        low = LowRank(out_features=layer.out_features, in_features=layer.in_features, rank=rank)
        has_bias, like = layer.bias is not None, next(iter(factors.values()))
        frozen = [f"part_0_{name}" for name in structure.factor_shapes()] + ["bias"] * has_bias
        shared = {f"part_0_{name}": key for name, key in getattr(layer, "shared", {}).items()}
        super().__init__(Sum(parts=(structure, low)), has_bias, shared, frozen, device=like.device, dtype=like.dtype)
        if isinstance(layer, FactorizedLinear) and shared:
            self.attach(layer._container[0])
        right = low.init(layer.in_features**-0.5, generator)["right"]
        new = {"part_1_left": right.new_zeros(layer.out_features, rank), "part_1_right": right}
        self.set_factors(new | {f"part_0_{name}": value for name, value in factors.items()})
        if self.bias is not None and layer.bias is not None:
            self.bias.data.copy_(layer.bias)
        self.freeze()


def _structure_and_factors(layer: nn.Module) -> tuple[Structure, Factors]:
    if isinstance(layer, FactorizedLinear):
        if not isinstance(layer.structure, Structure):
            raise ValueError(
                f"an adapter goes beside a matrix, and a layer of kind {layer.structure.kind} has none (there is a non-linearity "
                "between its factors); train all of it"
            )
        return layer.structure, layer.factors()
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"an adapter goes beside nn.Linear or FactorizedLinear, not {type(layer).__name__}; factorise it first"
        )
    return Dense(out_features=layer.out_features, in_features=layer.in_features), {"matrix": layer.weight}
