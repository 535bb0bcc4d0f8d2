"""Truncated decompositions of dense tensors, shared by the closed-form fits."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def svd(
    matrix: Float[Tensor, "*s m n"], rank: int
) -> tuple[Float[Tensor, "*s m {rank}"], Float[Tensor, "*s {rank}"], Float[Tensor, "*s {rank} n"]]:
    """The first ``rank`` singular triples of ``matrix (..., m, n)``.

    They are ``u (..., m, rank)``, ``s (..., rank)`` and ``v (..., rank, n)``.

    From the eigenvectors of the Gram matrix of the shorter side, in float64: on float32 weights as good as a full
    SVD and several times as fast. Beyond the matrix bound the triples are zero, so that any rank may be asked for.
    """
    matrix = matrix.double()
    if matrix.shape[-2] > matrix.shape[-1]:
        v, s, u = svd(matrix.mT, rank)
        return u.mT, s, v.mT
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    kept = min(rank, matrix.shape[-2])
    s = values.flip(-1)[..., :kept].clamp_min(0).sqrt()
    u = vectors.flip(-1)[..., :kept]
    weighted = u.mT @ matrix
    real = s > 1e-7 * s[..., :1].clamp_min(1e-300)
    v = torch.where(real[..., None], weighted / s.clamp_min(1e-300)[..., None], 0.0)
    s = torch.where(real, s, 0.0)
    missing = rank - kept
    pad = torch.nn.functional.pad
    return pad(u, (0, missing)), pad(s, (0, missing)), pad(v, (0, 0, 0, missing))


def halves(
    matrix: Float[Tensor, "*s m n"], rank: int
) -> tuple[Float[Tensor, "*s m {rank}"], Float[Tensor, "*s {rank} n"]]:
    """The nearest ``left (..., m, rank) @ right (..., rank, n)``, the singular values shared evenly (Eckart-Young)."""
    u, s, v = svd(matrix, rank)
    root = s.sqrt()
    return u * root[..., None, :], root[..., :, None] * v


def leading(matrix: Float[Tensor, "*s m n"], rank: int) -> Float[Tensor, "*s m {rank}"]:
    """The first ``rank`` left singular vectors ``(..., m, rank)`` of ``matrix (..., m, n)``, zero beyond the bound."""
    matrix = matrix.double()
    if matrix.shape[-2] > matrix.shape[-1]:
        return svd(matrix, rank)[0]
    vectors = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(-1)[..., :rank]
    return torch.nn.functional.pad(vectors, (0, rank - vectors.shape[-1]))


def tt_svd(tensor: Float[Tensor, "..."], ranks: tuple[int, ...], batch: int = 0) -> list[Tensor]:
    """Tensor-train cores ``(*batch, r_k, m_k, r_{k+1})`` of ``tensor (*batch, m_1, ..., m_d)`` by successive SVDs.

    The squared error is at most the sum of the squared singular values dropped at every cut, and at most ``d - 1``
    times the least error possible at these ranks.

    Reference: Oseledets 2011, algorithm 1.
    """
    lead, modes = tensor.shape[:batch], tensor.shape[batch:]
    carry, cores, left = tensor.double().reshape(*lead, 1, -1), [], 1
    for mode, rank in zip(modes[:-1], ranks, strict=True):
        carry = carry.reshape(*lead, left * mode, -1)
        u = leading(carry, rank)
        cores.append(u.reshape(*lead, left, mode, rank))
        carry, left = u.mT @ carry, rank
    return [*cores, carry.reshape(*lead, left, modes[-1], 1)]


def tt_ranks(tensor: Float[Tensor, "..."], tolerance: float) -> tuple[int, ...]:
    """The least ranks for which TT-SVD stays within ``tolerance * ||tensor||_F``, the error shared evenly by the cuts."""
    modes = tensor.shape
    allowed = (tolerance * tensor.double().norm()) ** 2 / max(1, len(modes) - 1)
    carry, ranks, left = tensor.double().reshape(1, -1), [], 1
    for mode in modes[:-1]:
        matrix = carry.reshape(left * mode, -1)
        _, s, v = svd(matrix, min(matrix.shape))
        tail = s.square().flip(0).cumsum(0).flip(0)  # tail[r]: what is lost when r triples are kept
        rank = max(1, int((tail > allowed).sum()))
        carry, left = s[:rank, None] * v[:rank], rank
        ranks.append(rank)
    return tuple(ranks)


def unfold(tensor: Float[Tensor, "..."], mode: int) -> Float[Tensor, "k rest"]:
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def hooi(
    tensor: Tensor, ranks: tuple[int, ...], sweeps: int = 20, tolerance: float = 1e-9
) -> tuple[Tensor, list[Tensor]]:
    """Tucker: ``core (r_1, ..., r_d)`` and orthonormal ``factors (m_k, r_k)``; HOSVD, then orthogonal iteration.

    Reference: De Lathauwer, De Moor, Vandewalle 2000 (both halves).
    """
    tensor, modes = tensor.double(), range(tensor.ndim)
    factors = [svd(unfold(tensor, k), ranks[k])[0] for k in modes]
    before = -math.inf
    for _ in range(sweeps):
        for k in modes:
            factors[k] = svd(unfold(_project(tensor, factors, skip=k), k), ranks[k])[0]
        core = _project(tensor, factors)
        now = float(core.norm())
        if now - before <= tolerance * now:
            break
        before = now
    return core, factors


def _project(tensor: Tensor, factors: list[Tensor], skip: int | None = None) -> Tensor:
    for k, factor in enumerate(factors):
        if k != skip:
            tensor = torch.tensordot(factor.T, tensor.movedim(k, 0), 1).movedim(0, k)
    return tensor


def square_root(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric ``S`` with ``S S = gram``."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def roots(gram: Float[Tensor, "n n"], floor: float = 1e-10) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """The symmetric ``S`` with ``S S = gram`` and its inverse, eigenvalues below ``floor`` times the largest lifted to it."""
    diagonal = gram.diagonal().double()
    if torch.equal(gram, torch.diag(gram.diagonal())):
        root = diagonal.clamp_min(floor * diagonal.max().clamp_min(1e-300)).sqrt()
        return torch.diag(root), torch.diag(1 / root)
    values, vectors = torch.linalg.eigh(gram.double())
    root = values.clamp_min(floor * values[-1].clamp_min(1e-300)).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def solve_symmetric(gram: Float[Tensor, "*s n n"], right: Float[Tensor, "*s m n"]) -> Float[Tensor, "*s m n"]:
    """``x (..., m, n)`` with ``x gram = right``, ``gram (..., n, n)`` positive semidefinite; least squares, never fails.

    A Cholesky decomposition where that is safe, many times as fast for large systems; else by eigenvectors.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    if not bool(failed.any()) and bool((pivots.amin(-1) > 1e-10 * pivots.amax(-1)).all()):
        del gram  # may have been made for this call, and is large
        half = torch.linalg.solve_triangular(factor, right.mT, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT
    del factor
    values, vectors = torch.linalg.eigh(gram)
    cut = 1e-13 * values[..., -1:].abs().clamp_min(1e-300)
    inverse = torch.where(values > cut, 1 / values.clamp_min(1e-300), 0.0)
    return (right @ vectors * inverse[..., None, :]) @ vectors.mT
