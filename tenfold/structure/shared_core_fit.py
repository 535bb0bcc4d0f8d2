"""Tensor trains that share their central core, fitted together: with full bonds the cores beside it are two free matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.linalg import solve_symmetric, svd

STEPS = 10  # of conjugate gradients for the centre in one round; the next round starts from there


def fit_centre(
    tensors: Sequence[Float[Tensor, "l m r"]], x: int, y: int, sweeps: int, tolerance: float
) -> tuple[Float[Tensor, "x m y"], list[Float[Tensor, "l x"]], list[Float[Tensor, "y r"]]]:
    """``C``, ``L_s`` and ``R_s`` that minimise ``sum_s ||X_s - L_s C R_s||^2``, alternating; the objective never grows.

    ``L_s`` and ``R_s`` solve small systems. That of ``C`` is large, ``sum_s A_s C B_s = sum_s L_s^T X_s R_s^T`` with
    ``A_s = L_s^T L_s`` and ``B_s = R_s R_s^T``: conjugate gradients, after a change of bonds that makes the means of ``A_s`` and
    of ``B_s`` one.

    Args:
        tensors: ``X_s (l, m, r)``.
        x, y: the bonds of ``C (x, m, y)``, at most ``l`` and ``r``.
        sweeps, tolerance: as for :func:`tenfold.structure.als.fit`.
    """
    together = sum((tensor / (s + 1) for s, tensor in enumerate(tensors)), torch.zeros_like(tensors[0]))  # none cancel
    left = svd(together.flatten(1), x)[0]
    right = svd(together.flatten(0, 1), y)[2]
    centre = torch.einsum("lx,lmr,yr->xmy", left, together, right)
    lefts, rights = [left for _ in tensors], [right for _ in tensors]
    scale, before = sum(float(tensor.square().sum()) for tensor in tensors), float("inf")
    for _ in range(sweeps):
        lefts = [_left(tensor, centre, right) for tensor, right in zip(tensors, rights, strict=True)]
        rights = [_right(tensor, left, centre) for tensor, left in zip(tensors, lefts, strict=True)]
        centre, lefts, rights = _centre(tensors, *_gauged(centre, lefts, rights))
        now = sum(
            float((tensor - _between(left, centre, right)).square().sum())
            for tensor, left, right in zip(tensors, lefts, rights, strict=True)
        )
        if before - now <= tolerance * scale:
            break
        before = now
    return centre, lefts, rights


def _between(left: Tensor, centre: Tensor, right: Tensor) -> Tensor:
    """``sum_xy left[l, x] centre[x, m, y] right[y, r]``; einsum would look for an order every time."""
    return (left @ centre.flatten(1)).unflatten(1, centre.shape[1:]) @ right


def _left(tensor: Tensor, centre: Tensor, right: Tensor) -> Tensor:
    rest = torch.einsum("xmy,yr->xmr", centre, right).flatten(1)
    return solve_symmetric(rest @ rest.T, tensor.flatten(1) @ rest.T)


def _right(tensor: Tensor, left: Tensor, centre: Tensor) -> Tensor:
    rest = torch.einsum("lx,xmy->lmy", left, centre).flatten(0, 1)
    return solve_symmetric(rest.T @ rest, tensor.flatten(0, 1).T @ rest).T


def _gauged(centre: Tensor, lefts: list[Tensor], rights: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same products from bonds in which the means of ``L^T L`` and of ``R R^T`` are one, where they are regular."""
    a = torch.linalg.cholesky_ex(sum((left.T @ left for left in lefts[1:]), lefts[0].T @ lefts[0]) / len(lefts))
    b = torch.linalg.cholesky_ex(sum((r @ r.T for r in rights[1:]), rights[0] @ rights[0].T) / len(rights))
    if int(a.info) or int(b.info):
        return centre, lefts, rights
    centre = _between(a.L.T, centre, b.L)
    lefts = [torch.linalg.solve_triangular(a.L, left.T, upper=False).T for left in lefts]
    return centre, lefts, [torch.linalg.solve_triangular(b.L, right, upper=False) for right in rights]


def _centre(tensors, centre: Tensor, lefts: list[Tensor], rights: list[Tensor]):
    """``STEPS`` of conjugate gradients from ``centre``."""
    grams = [(left.T @ left, right @ right.T) for left, right in zip(lefts, rights, strict=True)]

    def normal(value: Tensor) -> Tensor:
        return sum((_between(a, value, b) for a, b in grams), torch.zeros_like(value))

    triples = zip(tensors, lefts, rights, strict=True)
    rest = sum((_between(L.T, X, R.T) for X, L, R in triples), -normal(centre))
    way, size = rest, rest.square().sum()
    for _ in range(STEPS):
        turned = normal(way)
        curve = (way * turned).sum()
        if float(size) == 0 or float(curve) <= 0:
            break
        centre, rest = centre + size / curve * way, rest - size / curve * turned
        size, old = rest.square().sum(), size
        way = rest + size / old * way
    return centre, lefts, rights
