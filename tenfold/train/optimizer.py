"""Muon for matrices inside the blocks, AdamW for everything else, and learning rates for the factors of structured layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tenfold.models.precision import multiplies_bfloat16
from tenfold.nn import FactorizedLinear, SharedFactors
from tenfold.train.fsdp import unshard

OUTSIDE_BLOCKS = ("embed", "wte", "wpe", "wtte", "head", "score", "classifier")
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # the coefficients of the iterations
Axes = tuple[tuple[int, ...], ...]  # the axes of a factor as (batch, out, in)


class Muon(torch.optim.AdamW):
    """AdamW; in groups with a ``view``, steps along the orthogonalised momentum: ``-lr 0.2 sqrt(max(out, in)) U V^T``.

    ``M = U S V^T`` is the momentum of a matrix. A factor with more axes is a batch of matrices: ``view`` says which axes of a
    parameter make up ``(batch, out, in)``. The step is scaled to AdamW's root mean square, so that one learning rate fits both.
    States and groups have the form of any optimizer's, as checkpoints of sharded models require.

    Reference: Jordan et al. 2024; Liu et al., arXiv 2502.16982 (the scale).
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"] if "view" in group else ():
                if parameter.grad is not None:
                    self._update(parameter, group["view"], group)
        self.param_groups = [group for group in groups if "view" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, parameter: Any, view: Axes, group: dict) -> None:
        state, grad = self.state[parameter], parameter.grad
        if "momentum" not in state:
            state["momentum"], state["step"] = torch.zeros_like(grad), torch.zeros(())
        state["step"] += 1  # AdamW reads it when it loads a state
        state["momentum"].lerp_(grad, 1 - self.MOMENTUM)
        matrices = _to_matrices(unshard(grad.lerp(state["momentum"], self.MOMENTUM)), view)
        update = orthogonalize(matrices) * (0.2 * math.sqrt(max(matrices.shape[-2:])))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = _from_matrices(update, view, parameter.shape).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            update = distribute_tensor(update, parameter.device_mesh, parameter.placements)
        parameter.sub_(update, alpha=group["lr"])


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate ``U V^T`` of every matrix ``U S V^T`` in ``(batch, m, n)``: singular values end between 0.7 and 1.2."""
    x = matrices.bfloat16() if multiplies_bfloat16(matrices.device.type) else matrices.float()
    x = x[0] if len(x) == 1 else x  # on a CPU a matrix product is faster than a batch of one
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrices.shape)


def _to_matrices(tensor: Tensor, view: Axes) -> Tensor:
    """Permute and merge axes into ``(batch, out, in)``."""
    sides = [math.prod(tensor.shape[k] for k in axes) for axes in view]
    return tensor.permute([k for axes in view for k in axes]).reshape(sides)


def _from_matrices(matrices: Tensor, view: Axes, shape: torch.Size) -> Tensor:
    """Invert ``_to_matrices``."""
    axes = [k for some in view for k in some]
    inverse = sorted(range(len(axes)), key=lambda k: axes[k])
    return matrices.reshape([shape[k] for k in axes]).permute(inverse)


def optimizer_for(model: nn.Module, kind: str, rates: str, lr: float, weight_decay: float, betas=(0.9, 0.95)):
    """Return the optimizer that a recipe asks for.

    Args:
        kind: ``adamw``, or ``muon`` for the matrices of the blocks, including factors, and AdamW for the rest.
        rates: ``one`` for all parameters, or ``fans``: ``lr * in / (fan in of the factor) / (number of factors)`` for the
            factors of a layer with ``in`` inputs (arXiv 2406.06248), for AdamW only.
    """
    if kind == "muon" and rates == "fans":
        raise ValueError("Muon's steps have the right size for every factor by themselves; write optimizer: adamw")
    factors = [
        (module, *factor)
        for module in model.modules()
        if isinstance(module, FactorizedLinear)
        for factor in factor_parameters(module).items()
    ]
    # None for scalars and factors without a contraction
    views = {
        id(p): None for module in model.modules() if isinstance(module, SharedFactors) for p in module.parameters()
    }
    views |= {id(p): layer.structure.axes().get(name) for layer, name, p in factors}
    scales = {id(p): _rate_scale(layer, name) for layer, name, p in factors} if rates == "fans" else {}
    hidden: dict[Axes, list[Tensor]] = {}
    rest: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        view = views.get(id(parameter), ((), (0,), (1,)) if parameter.ndim == 2 else None)
        if kind == "muon" and view is not None and not any(word in name for word in OUTSIDE_BLOCKS):
            hidden.setdefault(view, []).append(parameter)
        else:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            rest.setdefault((scales.get(id(parameter), 1.0), decay), []).append(parameter)
    groups = [{"params": some, "weight_decay": weight_decay, "view": view} for view, some in hidden.items()]
    groups += [{"params": some, "lr": lr * scale, "weight_decay": decay} for (scale, decay), some in rest.items()]
    return (Muon if hidden else torch.optim.AdamW)(groups, lr=lr, betas=betas)


def factor_parameters(layer: Any) -> dict[str, nn.Parameter]:
    """Return the trainable factors of a structured layer by name, including those that it shares with other layers."""
    own = {name: p for name, p in layer.named_parameters(recurse=False) if name in layer.structure.factor_shapes()}
    return own | {name: layer._container[0].get_parameter(key) for name, key in layer.shared.items()}


def _rate_scale(layer: FactorizedLinear, name: str) -> float:
    fans = layer.structure.fans()
    return layer.in_features / fans[name][0] / len(fans) if name in fans else 1.0
