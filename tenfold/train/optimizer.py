"""Muon for what is a matrix inside, AdamW for everything else, and learning rates for the factors of structured layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tenfold.nn import FactorizedLinear, SharedFactors

NOT_HIDDEN = ("embed", "wte", "wpe", "wtte", "head", "score", "classifier")
STEPS = ((3.4445, -4.7750, 2.0315),) * 5  # of the Newton-Schulz iteration


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of every matrix: ``-lr 0.2 sqrt(max(out, in)) U V^T`` for ``M = U S V^T``.

    A factor with more axes is a batch of matrices: a group gives its ``views``, how each of its parameters is turned into
    ``(batch, out, in)``. The step is scaled to AdamW's root mean square, so that one learning rate serves both.

    Reference: Jordan et al. 2024; Liu et al., arXiv 2502.16982 (the scale).
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter, order in zip(group["params"], group["views"], strict=True):
                if parameter.grad is not None:
                    self._move(parameter, order, group)

    def _move(self, parameter: Tensor, order: tuple[tuple[int, ...], ...], group: dict) -> None:
        state, grad = self.state[parameter], parameter.grad
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grad)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = _matrices(_whole(grad.lerp(state["momentum"], group["momentum"])), order)
        sides = update.shape[-2:]
        update = orthogonal(update) * (0.2 * math.sqrt(max(sides)))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = _factor(update, order, parameter.shape).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            update = distribute_tensor(update, parameter.device_mesh, parameter.placements)
        parameter.sub_(update, alpha=group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """``U V^T`` of every matrix ``U S V^T`` in ``(batch, m, n)``, nearly: singular values come to 0.7 to 1.2; bfloat16."""
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for a, b, c in STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


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


class MuonAdamW(torch.optim.Optimizer):
    """:class:`Muon` and AdamW behind one face: their groups, states and steps put together."""

    def __init__(
        self, hidden: list[dict], rest: list[dict], lr: float, weight_decay: float, betas: tuple[float, float]
    ):
        self.parts = [Muon(hidden, lr, weight_decay)] if hidden else []
        self.parts += [torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas)] if rest else []
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Schedulers write learning rates into ``param_groups``: the parts must hold the same dictionaries."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()


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
    return MuonAdamW(
        [{"params": some, "views": [order] * len(some)} for order, some in hidden.items()],
        [{"params": some, "lr": lr * speed, "weight_decay": decay} for (speed, decay), some in rest.items()],
        lr,
        weight_decay,
        betas,
    )


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
