"""Truncated decompositions of dense tensors, shared by the closed-form fits."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def svd(
    matrix: Float[Tensor, "*s m n"], rank: int
) -> tuple[Float[Tensor, "*s m {rank}"], Float[Tensor, "*s {rank}"], Float[Tensor, "*s {rank} n"]]:
    """Return the first ``rank`` singular triples ``u (..., m, rank)``, ``s (..., rank)`` and ``v (..., rank, n)``.

    They come from the eigenvectors of the Gram matrix of the shorter side, in float64: for float32 weights as good as a full
    SVD and several times as fast. Triples beyond ``min(m, n)`` are zero, so any rank is allowed.
    """
    matrix = matrix.double()
    if matrix.shape[-2] > matrix.shape[-1]:
        v, s, u = svd(matrix.mT, rank)
        return u.mT, s, v.mT
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    count = min(rank, matrix.shape[-2])
    s = values.flip(-1)[..., :count].clamp_min(0).sqrt()
    u = vectors.flip(-1)[..., :count]
    nonzero = s > 1e-7 * s[..., :1].clamp_min(1e-300)
    v = torch.where(nonzero[..., None], (u.mT @ matrix) / s.clamp_min(1e-300)[..., None], 0.0)
    s = torch.where(nonzero, s, 0.0)
    missing, pad = rank - count, torch.nn.functional.pad
    return pad(u, (0, missing)), pad(s, (0, missing)), pad(v, (0, 0, 0, missing))


def truncate(
    matrix: Float[Tensor, "*s m n"], rank: int
) -> tuple[Float[Tensor, "*s m {rank}"], Float[Tensor, "*s {rank} n"]]:
    """Return the nearest ``left (..., m, rank) @ right (..., rank, n)`` (Eckart-Young), each with the roots of ``s``."""
    u, s, v = svd(matrix, rank)
    root = s.sqrt()
    return u * root[..., None, :], root[..., :, None] * v


def tt_svd(tensor: Float[Tensor, "..."], ranks: tuple[int, ...], batch: int = 0) -> list[Tensor]:
    """Return tensor-train cores ``(*batch, r_k, m_k, r_{k+1})`` of ``tensor (*batch, m_1, ..., m_d)`` by successive SVDs.

    The squared error is at most the sum of the squared singular values dropped at every bond, and at most ``d - 1`` times the
    least error possible at these ranks.

    Reference: Oseledets 2011, algorithm 1.
    """
    lead, modes = tensor.shape[:batch], tensor.shape[batch:]
    rest, cores, left = tensor.double().reshape(*lead, 1, -1), [], 1
    for mode, rank in zip(modes[:-1], ranks, strict=True):
        rest = rest.reshape(*lead, left * mode, -1)
        u = svd(rest, rank)[0]
        cores.append(u.reshape(*lead, left, mode, rank))
        rest, left = u.mT @ rest, rank
    return [*cores, rest.reshape(*lead, left, modes[-1], 1)]


def hooi(
    tensor: Tensor, ranks: tuple[int, ...], sweeps: int = 20, tolerance: float = 1e-9
) -> tuple[Tensor, list[Tensor]]:
    """Return a Tucker ``core (r_1, ..., r_d)`` and orthonormal ``factors (m_k, r_k)``: HOSVD, then orthogonal iteration.

    Reference: De Lathauwer, De Moor, Vandewalle 2000 (both parts).
    """
    tensor, modes = tensor.double(), range(tensor.ndim)

    def leading(projected: Tensor, mode: int) -> Tensor:
        return svd(projected.movedim(mode, 0).reshape(projected.shape[mode], -1), ranks[mode])[0]

    factors, core, before = [leading(tensor, mode) for mode in modes], tensor, -math.inf
    for _ in range(sweeps):
        for mode in modes:
            factors[mode] = leading(_project(tensor, factors, skip=mode), mode)
        core = _project(tensor, factors)
        if float(core.norm()) - before <= tolerance * float(core.norm()):
            break
        before = float(core.norm())
    return core, factors


def _project(tensor: Tensor, factors: list[Tensor], skip: int | None = None) -> Tensor:
    for k, factor in enumerate(factors):
        if k != skip:
            tensor = torch.tensordot(factor.T, tensor.movedim(k, 0), 1).movedim(0, k)
    return tensor


def roots(gram: Float[Tensor, "n n"], floor: float = 1e-10) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Return the symmetric ``S``, ``S S = gram``, and its inverse; eigenvalues are at least ``floor`` times the largest."""
    diagonal = gram.diagonal().double()
    if torch.equal(gram, torch.diag(gram.diagonal())):
        root = diagonal.clamp_min(floor * diagonal.max().clamp_min(1e-300)).sqrt()
        return torch.diag(root), torch.diag(1 / root)
    values, vectors = torch.linalg.eigh(gram.double())
    root = values.clamp_min(floor * values[-1].clamp_min(1e-300)).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def solve_symmetric(gram: Float[Tensor, "*s n n"], right: Float[Tensor, "*s m n"]) -> Float[Tensor, "*s m n"]:
    """Return the least-squares solution ``x (..., m, n)`` of ``x gram = right``, ``gram (..., n, n)`` positive semidefinite.

    It never fails: a Cholesky decomposition is used where it is safe (many times as fast for large systems), else eigenvectors.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    if not bool(failed.any()) and bool((pivots.amin(-1) > 1e-10 * pivots.amax(-1)).all()):
        del gram  # it is large, and may have no other user
        half = torch.linalg.solve_triangular(factor, right.mT, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT
    del factor
    values, vectors = torch.linalg.eigh(gram)
    cut = 1e-13 * values[..., -1:].abs().clamp_min(1e-300)
    inverse = torch.where(values > cut, 1 / values.clamp_min(1e-300), 0.0)
    return (right @ vectors * inverse[..., None, :]) @ vectors.mT
