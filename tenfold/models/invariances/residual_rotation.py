"""Rotations of the residual stream: which are free, how a model is rotated, and which rotation serves slicing or structures.

A rotation ``Q`` turns a vector ``x`` of the stream into ``Q^T x`` and leaves the function of the model as it is, at no cost at
run time. Where an RMSNorm stands before every reader any ``Q`` is free, since ``n(Q^T x) = Q^T n(x)`` once the gains are moved
to the readers; LayerNorm needs ``Q 1 = 1``, so that the mean stays, too. A norm behind the sum or the writer (BERT, Gemma 3)
leaves no rotation. The gain of the last norm can't be moved into a head that is tied to the embedding: such a model is rotated
with ``untie=True`` and then has one more matrix.

References: SliceGPT (arXiv 2401.15024) for rotations, ProcrustesGPT (arXiv 2506.02818) for rotations towards a structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.invariances.stream import READS, WRITES, PreNorm, Stream
from tenfold.models.plan import Plan
from tenfold.models.sites import find_sites, head_path, is_tied, weight_of
from tenfold.models.surgery import set_matrix, untie
from tenfold.structure import Factors, Structure

LARGEST_SHIFT = 1e4  # of b / g: beyond it too many digits are lost


def check_rotatable(model: PreTrainedModel) -> bool:
    """Return whether the norms of ``model`` subtract the mean (LayerNorm), so that only rotations with ``Q 1 = 1`` are free.

    Raises:
        ValueError: the residual stream can't be rotated; the message says why.
    """
    try:
        norms = Stream(model).prenorms()
        _check_norms(model, norms)
    except ValueError as reason:
        raise ValueError(f"the residual stream of this {model.config.model_type} can't be rotated: {reason}") from None
    return any(norm.mean for norm in norms)


# rotating a model ------------------------------------------------------------------------------------------------------


def fuse_norms(model: PreTrainedModel, untie: bool = False) -> PreTrainedModel:
    """Move the gain ``g`` and shift ``b`` of every norm of a pre-norm model into the matrices that read it.

    ``W (g n(x) + b) = W' (n(x) + b')`` with ``W' = W diag(g)`` and ``b' = b / g``; where all readers have a bias, the bias
    absorbs ``W b`` instead and ``b' = 0``. A norm whose gains are all the same is left alone.

    Args:
        untie: give a tied head a matrix of its own if its norm is one of them.

    Raises:
        ValueError: the model is not pre-norm, its head is tied, or ``b / g`` is too large for a reader without bias.
    """
    _fuse(model, Stream(model).prenorms(), untie)
    return model


def rotate_residual(model: PreTrainedModel, rotation: Tensor, untie: bool = False) -> PreTrainedModel:
    """Rotate the residual stream by ``Q``: ``W Q`` for all that reads it, ``Q^T W`` and ``Q^T b`` for all that writes.

    The norms are fused first (``fuse_norms``); their shifts become ``Q^T b'``. Best done in float32 or better.

    Args:
        rotation: ``Q (width, width)``, orthogonal; for LayerNorm models with ``Q 1 = 1``.
        untie: give a tied head a matrix of its own.

    Raises:
        ValueError: ``Q`` is no such matrix, or the model can't be rotated; the message says why.
    """
    stream = Stream(model)
    norms = stream.prenorms()
    rotation = _check_rotation(rotation, stream.width, any(norm.mean for norm in norms))
    _fuse(model, norms, untie)

    def rotate(p: Tensor, dim: int) -> Tensor:
        return torch.tensordot(p.double(), rotation.to(p.device), ([dim], [0])).movedim(-1, dim)

    stream.transform(rotate, ("reads", "writes", "shift"))
    return model


def center_residual(model: PreTrainedModel, untie: bool = False) -> PreTrainedModel:
    """Subtract the mean from all that is written to the stream: ``(1 - 11^T / n) W``. LayerNorm does so in any case.

    After it and a rotation from ``pca_rotation(..., layer_norm=True)`` the last coordinates of the stream are nearly zero.

    Raises:
        ValueError: the model's norms keep the mean, it is not pre-norm, or its head is tied.
    """
    stream = Stream(model)
    norms = stream.prenorms()
    if not all(norm.mean for norm in norms):
        raise ValueError(
            "the norms of this model keep the mean (RMSNorm), so that it can't be subtracted; rotate without centring"
        )
    _untie_reader(model, norms, untie)
    stream.transform(lambda p, dim: p - p.double().mean(dim, keepdim=True).to(p), ("writes",))
    return model


@torch.no_grad()
def _fuse(model: PreTrainedModel, norms: list[PreNorm], own_head: bool) -> None:
    norms = [norm for norm in norms if _is_uneven(norm)]
    _check_norms(model, norms)
    _untie_reader(model, norms, own_head)
    for norm in norms:
        gain, shift, moved = norm.gain, norm.shift, not _readers_without_bias(model, norm)
        assert gain is not None
        for path in norm.readers:
            reader = model.get_submodule(path)
            matrix, bias = weight_of(reader).double(), None
            if shift is not None and moved:
                bias = reader.bias.double() + matrix @ shift
            set_matrix(reader, matrix * gain, bias)
        norm.module.weight.fill_(norm.unit)
        if shift is not None:
            left = torch.zeros_like(shift) if moved else torch.where(shift == 0, 0.0, shift / gain)
            norm.module.bias.copy_(left)


def _is_uneven(norm: PreNorm) -> bool:
    """Tell whether the gains differ, so that they do not commute with a rotation."""
    return norm.gain is not None and bool((norm.gain != norm.gain[0]).any())


def _readers_without_bias(model: PreTrainedModel, norm: PreNorm) -> list[str]:
    return [path for path in norm.readers if model.get_submodule(path).bias is None]


def _check_norms(model: PreTrainedModel, norms: list[PreNorm]) -> None:
    """Raise ValueError for gains and shifts that can't be moved."""
    for norm in filter(_is_uneven, norms):
        gain, shift, bare = norm.gain, norm.shift, _readers_without_bias(model, norm)
        assert gain is not None
        if not norm.readers:
            raise ValueError(
                f"no matrix of this model reads {norm.path}, so that its gains have nowhere to go; give it with its head"
            )
        wrong = 0 if shift is None else int((shift.abs() > LARGEST_SHIFT * gain.abs()).sum())
        if wrong and bare:
            raise ValueError(
                f"{wrong} gains of {norm.path} are zero or nearly so where it shifts, and {bare[0]} has no bias to absorb the "
                "shift; give it one, or leave the stream as it is"
            )


def _untie_reader(model: PreTrainedModel, norms: list[PreNorm], own_head: bool) -> None:
    """Give a tied head that reads one of ``norms`` a matrix of its own, or raise ValueError without ``own_head``."""
    head = head_path(model)
    norm = next((norm for norm in norms if head in norm.readers), None) if is_tied(model) else None
    if norm is None:
        return
    if not own_head:
        raise ValueError(
            f"the head of this model is tied to its embedding, but only the head reads the output of {norm.path}; untie=True "
            f"gives it a matrix of its own, {model.get_output_embeddings().weight.numel():,} parameters more"
        )
    untie(model, Plan({}, untie=True))


def _check_rotation(rotation: Tensor, width: int, keeps_ones: bool) -> Tensor:
    """Return ``Q`` in float64."""
    if tuple(rotation.shape) != (width, width):
        raise ValueError(
            f"the rotation has shape {tuple(rotation.shape)}, but the residual stream needs {(width, width)}"
        )
    q = rotation.detach().double()
    identity = torch.eye(width, dtype=q.dtype, device=q.device)
    if not float(off := (q.T @ q - identity).abs().max()) < 1e-5:
        raise ValueError(
            f"the rotation is not orthogonal: Q^T Q differs from the identity by {off:.2g}; torch.linalg.qr makes it so"
        )
    if keeps_ones and float(off := (q.sum(1) - 1).abs().max()) > 1e-5:
        raise ValueError(
            "the norms of this model subtract the mean (LayerNorm), so that only rotations with Q 1 = 1 are free, but here "
            f"Q 1 differs from 1 by {off:.2g}; pca_rotation and best_rotation make one with layer_norm=True"
        )
    return q


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

    Raises:
        ValueError: ``C`` is not square, not symmetric or not finite.

    Reference: SliceGPT, arXiv 2401.15024.
    """
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise ValueError(f"the second moment has shape {tuple(second_moment.shape)}; it must be (width, width)")
    second = second_moment.detach().double()
    if not float(off := (second - second.T).abs().max()) <= 1e-5 * float(second.abs().max()):
        raise ValueError(
            f"the second moment is not symmetric, or holds NaN or Inf: it differs by {off:.2g}; use mean x x^T"
        )
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

    @property
    def width(self) -> int:
        """Return the width of the stream."""
        return self.weight.shape[1 if self.reads else 0]

    def rotate(self, rotation: Tensor) -> Tensor:
        """Return ``W Q`` or ``Q^T W``."""
        weight = self.weight.double()
        return weight @ rotation if self.reads else rotation.T @ weight

    def fit(self, rotation: Tensor, start: Factors | None, **settings) -> Factors:
        """Return factors of the rotated matrix that are never worse than ``start``."""
        start = None if self.structure.optimal else start
        return self.structure.fit(self.rotate(rotation), start=start, **settings)

    def loss(self, rotation: Tensor, near: Tensor) -> float:
        """Return the squared error of ``near``."""
        rest = self.rotate(rotation) - near
        return float((rest * rest).sum())

    def procrustes_term(self, near: Tensor) -> Tensor:
        """Return ``G (width, width)``: the more of ``tr(Q^T G)`` a rotation has, the smaller is the error."""
        weight = self.weight.double()
        return weight.T @ near if self.reads else weight @ near.T


def stream_matrices(model: PreTrainedModel, structures: Mapping[str, Structure]) -> list[StreamMatrix]:
    """Return the matrices ``{path: structure}`` of a model whose norms are fused (``fuse_norms``).

    Raises:
        ValueError: a path is no matrix that reads or writes the stream.
    """
    roles = {site.path: site.role for site in find_sites(model)}
    for path in structures:
        if roles.get(path) not in (*READS, *WRITES, "embed"):
            raise ValueError(
                f"{path} has role {roles.get(path)}: it neither reads nor writes the residual stream; leave it out"
            )
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

    Raises:
        ValueError: there are no matrices, or they are at streams of several widths.

    Reference: ProcrustesGPT, arXiv 2506.02818.
    """
    if len({matrix.width for matrix in matrices}) != 1:
        raise ValueError(
            f"the matrices lie at streams of widths {[matrix.width for matrix in matrices]}; give some, of one stream"
        )
    width = matrices[0].width
    basis = helmert(width) if layer_norm else torch.eye(width, dtype=torch.float64)
    fixed = torch.full((width, width), 1 / width if layer_norm else 0.0, dtype=torch.float64)
    rotation = torch.eye(width, dtype=torch.float64)
    factors: list[Factors | None] = [None] * len(matrices)
    losses: list[float] = []
    while True:
        factors = [matrix.fit(rotation, start, **settings) for matrix, start in zip(matrices, factors, strict=True)]
        near = [matrix.structure.dense(found) for matrix, found in zip(matrices, factors, strict=True)]
        losses.append(sum(matrix.loss(rotation, dense) for matrix, dense in zip(matrices, near, strict=True)))
        if len(losses) >= rounds or (len(losses) > 1 and losses[-2] - losses[-1] <= tolerance * losses[0]):
            return rotation, losses
        terms = torch.stack([matrix.procrustes_term(dense) for matrix, dense in zip(matrices, near, strict=True)])
        left, _, right = torch.linalg.svd(basis.T @ terms.sum(0) @ basis)
        rotation = fixed + basis @ left @ right @ basis.T
