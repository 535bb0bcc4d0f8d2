"""Muon for what is a matrix inside, AdamW for everything else, and learning rates for the factors of structured layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tenfold.models.precision import multiplies_bfloat16
from tenfold.nn import FactorizedLinear, SharedFactors

NOT_HIDDEN = ("embed", "wte", "wpe", "wtte", "head", "score", "classifier")
STEPS = ((3.4445, -4.7750, 2.0315),) * 5  # of the Newton-Schulz iteration


class Muon(torch.optim.AdamW):
    """AdamW; in groups with a ``view``, steps along the orthogonalised momentum: ``-lr 0.2 sqrt(max(out, in)) U V^T``.

    ``M = U S V^T`` is the momentum of a matrix. A factor with more axes is a batch of matrices: ``view`` says how a parameter of
    the group is turned into ``(batch, out, in)``. The step is scaled to AdamW's root mean square, so that one learning rate
    serves both. States and groups have the form of any optimizer's, which checkpoints of sharded models rely on.

    Reference: Jordan et al. 2024; Liu et al., arXiv 2502.16982 (the scale).
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"] if "view" in group else ():
                if parameter.grad is not None:
                    self._move(parameter, group["view"], group)
        self.param_groups = [group for group in groups if "view" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _move(self, parameter: Tensor, order: tuple[tuple[int, ...], ...], group: dict) -> None:
        state, grad = self.state[parameter], parameter.grad
        if "momentum" not in state:
            state["momentum"], state["step"] = torch.zeros_like(grad), torch.zeros(())
        state["step"] += 1  # AdamW asks for it when it loads a state
        state["momentum"].lerp_(grad, 1 - self.MOMENTUM)
        update = _matrices(_whole(grad.lerp(state["momentum"], self.MOMENTUM)), order)
        sides = update.shape[-2:]
        update = orthogonal(update) * (0.2 * math.sqrt(max(sides)))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = _factor(update, order, parameter.shape).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            update = distribute_tensor(update, parameter.device_mesh, parameter.placements)
        parameter.sub_(update, alpha=group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """``U V^T`` of every matrix ``U S V^T`` in ``(batch, m, n)``, nearly: singular values come to 0.7 to 1.2."""
    x = matrices.bfloat16() if multiplies_bfloat16(matrices.device.type) else matrices.float()
    x = x[0] if len(x) == 1 else x  # one product takes less than a batch of one on a CPU
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for a, b, c in STEPS:
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrices.shape)


def _whole(tensor: Tensor) -> Tensor:
    """Of all processes together: a matrix is orthogonalised as a whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _matrices(tensor: Tensor, order) -> Tensor:
    """``(batch, out, in)``: the axes in ``order = (batch, out, in)`` put together."""
    sides = [math.prod(tensor.shape[k] for k in axes) for axes in order]
    return tensor.permute([k for axes in order for k in axes]).reshape(sides)


def _factor(matrices: Tensor, order, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_matrices`."""
    axes = [k for some in order for k in some]
    back = sorted(range(len(axes)), key=lambda k: axes[k])
    return matrices.reshape([shape[k] for k in axes]).permute(back)


def optimizer_for(model: nn.Module, kind: str, rates: str, lr: float, weight_decay: float, betas=(0.9, 0.95)):
    """The optimizer of a recipe.

    Args:
        kind: ``adamw``, or ``muon`` for the matrices of the blocks, the factors of folded ones included, and AdamW for the rest.
        rates: ``one`` for everything, or by ``fans``: ``lr * in / (fan in of the factor) / (number of factors)`` for the
            factors of a layer with ``in`` inputs (arXiv 2406.06248), which is right for AdamW only.

    Raises:
        ValueError: rates by fans, with Muon.
    """
    if kind == "muon" and rates == "fans":
        raise ValueError("Muon's steps have the right size for every factor by themselves; write optimizer: adamw")
    views, speeds = _views(model), _speeds(model) if rates == "fans" else {}
    hidden: dict[tuple, list[Tensor]] = {}
    rest: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        order = views.get(id(parameter), ((), (0,), (1,)) if parameter.ndim == 2 else None)
        if kind == "muon" and order is not None and not any(word in name for word in NOT_HIDDEN):
            hidden.setdefault(order, []).append(parameter)
        else:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            rest.setdefault((speeds.get(id(parameter), 1.0), decay), []).append(parameter)
    groups = [{"params": some, "weight_decay": weight_decay, "view": order} for order, some in hidden.items()]
    groups += [{"params": some, "lr": lr * speed, "weight_decay": decay} for (speed, decay), some in rest.items()]
    return (Muon if hidden else torch.optim.AdamW)(groups, lr=lr, betas=betas)


def _layers(model: nn.Module):
    return [module for module in model.modules() if isinstance(module, FactorizedLinear)]


def _parameter(layer: FactorizedLinear, name: str) -> Tensor:
    owner, key = (layer._container[0], layer.shared[name]) if name in layer.shared else (layer, name)
    return getattr(owner, key)


def _views(model: nn.Module) -> dict[int, tuple[tuple[int, ...], ...] | None]:
    """``{id of a factor: its axes as (batch, out, in)}``; None for scalars and for what sums over nothing."""
    found: dict[int, tuple[tuple[int, ...], ...] | None] = {}
    for module in model.modules():
        if isinstance(module, SharedFactors):
            found |= {id(p): None for p in module.parameters()}
    for layer in _layers(model):
        axes = layer.structure.axes()
        for name in layer.structure.factor_shapes():
            found[id(_parameter(layer, name))] = axes.get(name)
    return found


def _speeds(model: nn.Module) -> dict[int, float]:
    found = {}
    for layer in _layers(model):
        fans = layer.structure.fans()
        for name, (inner, _) in fans.items():
            found[id(_parameter(layer, name))] = layer.in_features / inner / len(fans)
    return found
