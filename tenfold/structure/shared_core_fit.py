"""Joint fit of tensor trains that share their central core: with full bonds the cores beside it are two free matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.linalg import solve_symmetric, svd

STEPS = 10  # of conjugate gradients for the core in one sweep; the next sweep continues from there


def fit_shared_core(
    tensors: Sequence[Float[Tensor, "l m r"]], x: int, y: int, sweeps: int, tolerance: float
) -> tuple[Float[Tensor, "x m y"], list[Float[Tensor, "l x"]], list[Float[Tensor, "y r"]]]:
    """Minimise ``sum_s ||X_s - L_s C R_s||^2`` over ``C``, ``L_s`` and ``R_s``, alternating; the objective never grows.

    ``L_s`` and ``R_s`` solve small systems. That of ``C`` is large, ``sum_s A_s C B_s = sum_s L_s^T X_s R_s^T`` with
    ``A_s = L_s^T L_s`` and ``B_s = R_s R_s^T``: it is solved by conjugate gradients, after a change of bonds that makes the
    means of ``A_s`` and of ``B_s`` the identity.

    Args:
        tensors: ``X_s (l, m, r)``.
        x, y: the bonds of ``C (x, m, y)``, at most ``l`` and ``r``.
        sweeps, tolerance: as for ``tenfold.structure.als.fit``.
    """
    total = sum((tensor / (s + 1) for s, tensor in enumerate(tensors)), torch.zeros_like(tensors[0]))  # none cancel
    left = svd(total.flatten(1), x)[0]
    right = svd(total.flatten(0, 1), y)[2]
    core = torch.einsum("lx,lmr,yr->xmy", left, total, right)
    lefts, rights = [left for _ in tensors], [right for _ in tensors]
    scale, before = sum(float(tensor.square().sum()) for tensor in tensors), float("inf")
    for _ in range(sweeps):
        for k, (tensor, right) in enumerate(zip(tensors, rights, strict=True)):
            rest = torch.einsum("xmy,yr->xmr", core, right).flatten(1)
            lefts[k] = solve_symmetric(rest @ rest.T, tensor.flatten(1) @ rest.T)
            rest = torch.einsum("lx,xmy->lmy", lefts[k], core).flatten(0, 1)
            rights[k] = solve_symmetric(rest.T @ rest, tensor.flatten(0, 1).T @ rest).T
        core, lefts, rights = _normalise_bonds(core, lefts, rights)
        core = _improve_core(tensors, core, lefts, rights)
        now = sum(
            float((tensor - _contract(left, core, right)).square().sum())
            for tensor, left, right in zip(tensors, lefts, rights, strict=True)
        )
        if before - now <= tolerance * scale:
            break
        before = now
    return core, lefts, rights


def _contract(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Return ``sum_xy left[l, x] core[x, m, y] right[y, r]``, without the search of einsum for an order."""
    return (left @ core.flatten(1)).unflatten(1, core.shape[1:]) @ right


def _normalise_bonds(
    core: Tensor, lefts: list[Tensor], rights: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the same products with bonds in which the means of ``L^T L`` and ``R R^T`` are the identity, if regular."""
    a = torch.linalg.cholesky_ex(sum((left.T @ left for left in lefts[1:]), lefts[0].T @ lefts[0]) / len(lefts))
    b = torch.linalg.cholesky_ex(sum((r @ r.T for r in rights[1:]), rights[0] @ rights[0].T) / len(rights))
    if int(a.info) or int(b.info):
        return core, lefts, rights
    lefts = [torch.linalg.solve_triangular(a.L, left.T, upper=False).T for left in lefts]
    rights = [torch.linalg.solve_triangular(b.L, right, upper=False) for right in rights]
    return _contract(a.L.T, core, b.L), lefts, rights


def _improve_core(tensors: Sequence[Tensor], core: Tensor, lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    grams = [(left.T @ left, right @ right.T) for left, right in zip(lefts, rights, strict=True)]

    def multiply(value: Tensor) -> Tensor:
        return sum((_contract(a, value, b) for a, b in grams), torch.zeros_like(value))

    triples = zip(tensors, lefts, rights, strict=True)
    residual = sum((_contract(left.T, tensor, right.T) for tensor, left, right in triples), -multiply(core))
    direction, norm = residual, residual.square().sum()
    for _ in range(STEPS):
        product = multiply(direction)
        curvature = (direction * product).sum()
        if float(norm) == 0 or float(curvature) <= 0:
            break
        core, residual = core + norm / curvature * direction, residual - norm / curvature * product
        norm, old = residual.square().sum(), norm
        direction = residual + norm / old * direction
    return core
