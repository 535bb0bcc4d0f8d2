"""Rotations of the residual stream: which are free, how a model is rotated, and which rotation serves slicing or structures.

A rotation ``Q`` turns a vector ``x`` of the stream into ``Q^T x`` and leaves the function of the model as it is, at no cost at
run time. Where an RMSNorm stands before every reader any ``Q`` is free, since ``n(Q^T x) = Q^T n(x)`` once the gains are moved
to the readers; LayerNorm needs ``Q 1 = 1``, so that the mean stays, too. A norm behind the sum or the writer (BERT, Gemma 3)
leaves no rotation. The gain of the last norm can't be moved into a head that is tied to the embedding: such a model gets one
more matrix.

References: SliceGPT (arXiv 2401.15024) for rotations, ProcrustesGPT (arXiv 2506.02818) for rotations towards a structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.invariances.stream import WRITES, PreNorm, prenorms, transform_stream
from tenfold.models.sites import find_sites, head_path, is_tied, weight_of
from tenfold.models.surgery import set_matrix, untie
from tenfold.structure import Factors, Structure


@torch.no_grad()
def fuse_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Move the gain ``g`` and shift ``b`` of every norm of a pre-norm model into the matrices that read it.

    ``W (g n(x) + b) = W' (n(x) + b')`` with ``W' = W diag(g)`` and ``b' = b / g``; where all readers have a bias, the bias
    absorbs ``W b`` instead and ``b' = 0``. A norm whose gains are all the same is left alone. A tied head that reads one of the
    others gets a matrix of its own.

    Raises:
        ValueError: the basis of the stream is not free.
    """
    norms = [norm for norm in prenorms(model) if norm.is_uneven]
    _untie_reader(model, norms)
    for norm in norms:
        gain, shift = norm.gain, norm.shift
        readers: list[Any] = [model.get_submodule(path) for path in norm.readers]
        moved = all(reader.bias is not None for reader in readers)
        for reader in readers:
            matrix, bias = weight_of(reader).double(), None
            if moved and shift is not None:
                bias = reader.bias.double() + matrix @ shift
            set_matrix(reader, matrix * gain, bias)
        norm.module.weight.fill_(1.0)
        if shift is not None:
            norm.module.bias.copy_(torch.zeros_like(shift) if moved else torch.where(shift == 0, 0.0, shift / gain))
    return model


def rotate_residual(model: PreTrainedModel, rotation: Tensor) -> PreTrainedModel:
    """Rotate the residual stream by ``Q``: ``W Q`` for all that reads it, ``Q^T W`` and ``Q^T b`` for all that writes.

    The norms are fused first (``fuse_norms``); their shifts become ``Q^T b'``. Best done in float32 or better.

    Args:
        rotation: ``Q (width, width)``, orthogonal; for LayerNorm models with ``Q 1 = 1``.

    Raises:
        ValueError: the basis of the stream is not free.
    """
    fuse_norms(model)
    q = rotation.detach().double()

    def rotate(p: Tensor, dim: int) -> Tensor:
        axes: Any = ([dim], [0])
        return torch.tensordot(p.double(), q.to(p.device), axes).movedim(-1, dim)

    transform_stream(model, rotate)
    return model


def center_residual(model: PreTrainedModel) -> PreTrainedModel:
    """Subtract the mean from all that is written to the stream of a LayerNorm model, which does so in any case.

    After it and a rotation from ``pca_rotation(..., layer_norm=True)`` the last coordinates of the stream are nearly zero.
    """
    _untie_reader(model, prenorms(model))
    transform_stream(model, lambda p, dim: p - p.double().mean(dim, keepdim=True).to(p), only_written=True)
    return model


def _untie_reader(model: PreTrainedModel, norms: list[PreNorm]) -> None:
    """Give a tied head that reads one of ``norms`` a matrix of its own."""
    if is_tied(model) and any(head_path(model) in norm.readers for norm in norms):
        untie(model)


# rotations for slicing -------------------------------------------------------------------------------------------------


def pca_rotation(second_moment: Tensor, layer_norm: bool = False) -> Tensor:
    """Return ``Q``, in float64, after which few coordinates of the stream carry most of it.

    For RMSNorm models the columns of ``Q`` are the eigenvectors of ``C`` by falling eigenvalue: ``Q^T C Q`` is diagonal,
    and the first ``k`` coordinates hold the ``k`` leading principal components.

    For LayerNorm models ``Q 1 = 1``, so that ``Q`` rotates only the complement of the ones, which contains no coordinate axis.
    But the vectors of zero sum on the first ``k + 1`` coordinates are a space of ``k`` dimensions, one inside the other for all
    ``k``; the Helmert basis ``h_1, h_2, ...`` spans them in turn. With the eigenvectors ``v_k`` of ``C`` in the complement,

        Q = 1 1^T / n + sum_k v_k h_k^T,

    so that the first ``k + 1`` coordinates hold the ``k`` leading components, and all others hold the mean of the stream.
    ``center_residual`` makes that zero: slicing costs one coordinate more than with RMSNorm, and the norms stay as they are
    (SliceGPT replaces them by RMSNorm instead). Inside the first coordinates nothing is ordered.

    Args:
        second_moment: ``C (width, width)``, the mean of ``x x^T`` over the stream.
        layer_norm: whether the model's norms subtract the mean.

    Reference: SliceGPT, arXiv 2401.15024.
    """
    second = second_moment.detach().double()
    if not layer_norm:
        return torch.linalg.eigh(second)[1].flip(1)
    basis = helmert(len(second)).to(second)
    return (
        torch.full_like(second, 1 / len(second))
        + basis @ torch.linalg.eigh(basis.T @ second @ basis)[1].flip(1) @ basis.T
    )


def helmert(size: int) -> Tensor:
    """Return an orthonormal basis ``(size, size - 1)`` of the vectors of zero sum, in float64.

    ``h_k = (1, ..., 1, -k, 0, ..., 0) / sqrt(k (k + 1))`` lives on the first ``k + 1`` coordinates.
    """
    k = torch.arange(1, size, dtype=torch.float64)
    basis = torch.ones(size, size - 1, dtype=torch.float64).triu() - torch.diag(k, -1)[:, :-1]
    return basis / (k * (k + 1)).sqrt()


# rotations for structures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamMatrix:
    """One matrix at the stream, and the structure that it is to have after the rotation.

    Args:
        weight: ``W (out, in)``, the gain of its norm moved into it.
        structure: of the rotated matrix.
        reads: whether its columns lie in the stream (readers and embeddings) or its rows (writers).
    """

    weight: Tensor
    structure: Structure
    reads: bool

    def rotate(self, rotation: Tensor) -> Tensor:
        """Return ``W Q`` or ``Q^T W``."""
        weight = self.weight.double()
        return weight @ rotation if self.reads else rotation.T @ weight

    def procrustes_term(self, near: Tensor) -> Tensor:
        """Return ``G (width, width)``: the more of ``tr(Q^T G)`` a rotation has, the smaller is the error."""
        weight = self.weight.double()
        return weight.T @ near if self.reads else weight @ near.T


def stream_matrices(model: PreTrainedModel, structures: Mapping[str, Structure]) -> list[StreamMatrix]:
    """Return the matrices ``{path: structure}`` at the stream of a model whose norms are fused (``fuse_norms``)."""
    roles = {site.path: site.role for site in find_sites(model)}
    return [
        StreamMatrix(weight_of(model.get_submodule(path)).detach(), structure, roles[path] not in WRITES)
        for path, structure in structures.items()
    ]


def best_rotation(
    matrices: Sequence[StreamMatrix],
    *,
    layer_norm: bool = False,
    rounds: int = 10,
    tolerance: float = 1e-6,
    **settings,
) -> tuple[Tensor, list[float]]:
    """Minimise ``sum ||W Q - What||^2`` over the rotation and the factors; ``||Q^T W - What||^2`` for writers.

    Two steps alternate, and neither raises the error: the fit of every structure, and the rotation, an orthogonal Procrustes
    problem that one SVD solves.

    Args:
        layer_norm: keep ``Q 1 = 1``.
        rounds: at most so many fits of all matrices.
        tolerance: stop when a round gains less than this ratio of the first error.
        settings: of ``tenfold.structure.Structure.fit``, such as ``sweeps``.

    Returns:
        ``Q (width, width)`` in float64, and the error after every round.

    Reference: ProcrustesGPT, arXiv 2506.02818.
    """
    width = matrices[0].weight.shape[1 if matrices[0].reads else 0]
    basis = helmert(width) if layer_norm else torch.eye(width, dtype=torch.float64)
    fixed = torch.full((width, width), 1 / width if layer_norm else 0.0, dtype=torch.float64)
    rotation = torch.eye(width, dtype=torch.float64)
    factors: list[Factors | None] = [None] * len(matrices)
    losses: list[float] = []
    while True:
        loss, terms = 0.0, []
        for k, matrix in enumerate(matrices):
            structure, rotated = matrix.structure, matrix.rotate(rotation)
            factors[k] = found = structure.fit(rotated, start=None if structure.optimal else factors[k], **settings)
            near = structure.dense(found)
            loss += float((rotated - near).square().sum())
            terms.append(matrix.procrustes_term(near))
        losses.append(loss)
        if len(losses) >= rounds or (len(losses) > 1 and losses[-2] - losses[-1] <= tolerance * losses[0]):
            return rotation, losses
        left, _, right = torch.linalg.svd(basis.T @ torch.stack(terms).sum(0) @ basis)
        rotation = fixed + basis @ left @ right @ basis.T
