"""Which symmetry is good for what: rotations for slicing and for structures, orders of hidden units for structures.

Nothing here changes a model; :mod:`tenfold.models.invariances.free_symmetries` does, with what is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.invariances.stream import READS, WRITES
from tenfold.models.sites import find_sites, weight_of
from tenfold.structure import Factors, Scattered, Structure
from tenfold.structure.permutation_search import search

# rotations for slicing -------------------------------------------------------------------------------------------------


def pca_rotation(second_moment: Tensor, layer_norm: bool = False) -> Tensor:
    """``Q`` after which few coordinates of the stream carry most of it, in float64.

    For RMSNorm models the columns of ``Q`` are the eigenvectors of ``C`` by falling eigenvalue: ``Q^T C Q`` is diagonal,
    and the first ``k`` coordinates hold the ``k`` leading principal components.

    For LayerNorm models ``Q 1 = 1``, so that ``Q`` turns the complement of the ones only and no coordinate can be a
    principal component: its axis is not in there. But the vectors of zero sum that live on the first ``k + 1`` coordinates
    are a space of ``k`` dimensions, one inside the other for all ``k``; the Helmert basis ``h_1, h_2, ...`` runs through
    them. With the eigenvectors ``v_k`` of ``C`` in the complement,

        Q = 1 1^T / n + sum_k v_k h_k^T,

    so that the first ``k + 1`` coordinates hold the ``k`` leading components, and what these leave is the mean of the stream
    in all others. ``center_residual`` makes that zero: slicing costs one coordinate more than with RMSNorm, and the norms
    stay as they are (SliceGPT replaces them by RMSNorm instead). Inside the first coordinates nothing is ordered.

    Args:
        second_moment: ``C (width, width)``, the mean of ``x x^T`` over the stream.
        layer_norm: whether the model's norms take the mean away.

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
    """An orthonormal basis ``(size, size - 1)`` of the vectors of zero sum; ``h_k`` lives on the first ``k + 1`` places.

    ``h_k = (1, ..., 1, -k, 0, ..., 0) / sqrt(k (k + 1))``, float64.
    """
    k = torch.arange(1, size, dtype=torch.float64)
    basis = torch.ones(size, size - 1, dtype=torch.float64).triu() - torch.diag(k, -1)[:, :-1]
    return basis / (k * (k + 1)).sqrt()


# rotations for structures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One matrix at the stream, and the structure that it is to have after the rotation.

    Args:
        weight: ``W (out, in)``, the gain of its norm moved into it.
        structure: of the rotated matrix.
        reads: whether its columns lie in the stream (what reads it, and embeddings) or its rows (what writes it).
        metric: ``C (in, in)``: the second moment of its inputs before the rotation; None for the Frobenius norm.
    """

    weight: Tensor
    structure: Structure
    reads: bool
    metric: Tensor | None = None

    @property
    def width(self) -> int:
        """Of the stream."""
        return self.weight.shape[1 if self.reads else 0]

    def turned(self, turn: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rotated matrix and its metric: ``W Q`` and ``Q^T C Q``, or ``Q^T W`` and ``C``."""
        weight, metric = self.weight.double(), None if self.metric is None else self.metric.double()
        if not self.reads:
            return turn.T @ weight, metric
        return weight @ turn, None if metric is None else turn.T @ metric @ turn

    def fitted(self, turn: Tensor, start: Factors | None, settings: dict) -> Factors:
        """Factors that are never worse than ``start``."""
        weight, metric = self.turned(turn)
        exact = metric is None and self.structure.optimal
        return self.structure.fit(weight, metric, start=None if exact else start, **settings)

    def loss(self, turn: Tensor, near: Tensor) -> float:
        """The squared error of ``near``."""
        weight, metric = self.turned(turn)
        rest = weight - near
        return float((rest * (rest if metric is None else rest @ metric)).sum())

    def pull(self, turn: Tensor, near: Tensor) -> Tensor:
        """``G (width, width)``: a rotation with more of ``tr(Q^T G)`` than ``turn`` has less error.

        The error is ``tr(B Q^T C Q) - 2 tr(Q^T C W^T near)`` and what is constant, ``B = near^T near``. The first term is
        convex and bounded by its tangent and ``l ||Q - turn||^2``, ``l`` the product of the largest eigenvalues.
        """
        weight, metric = self.weight.double(), None if self.metric is None else self.metric.double()
        if not self.reads:
            return (weight if metric is None else weight @ metric) @ near.T
        if metric is None:
            return weight.T @ near
        gram = near.T @ near
        bound = torch.linalg.eigvalsh(gram)[-1] * torch.linalg.eigvalsh(metric)[-1]
        return metric @ (weight.T @ near - turn @ gram) + bound * turn


def stream_parts(
    model: PreTrainedModel, structures: Mapping[str, Structure], metrics: Mapping[str, Tensor] | None = None
) -> list[Part]:
    """The parts of a model whose norms are fused (``fuse_norms``): ``{path: structure}``, ``{path: second moment}``.

    Raises:
        ValueError: a path is no matrix that reads or writes the stream.
    """
    roles, metrics = {site.path: site.role for site in find_sites(model)}, metrics or {}
    for path in structures:
        if roles.get(path) not in (*READS, *WRITES, "embed"):
            raise ValueError(
                f"{path} has role {roles.get(path)}: it neither reads nor writes the residual stream; leave it out"
            )
    return [
        Part(weight_of(model.get_submodule(path)).detach(), structure, roles[path] not in WRITES, metrics.get(path))
        for path, structure in structures.items()
    ]


def best_rotation(
    parts: Sequence[Part],
    *,
    layer_norm: bool = False,
    rounds: int = 10,
    steps: int = 10,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    **settings,
) -> tuple[Tensor, list[float]]:
    """``Q`` after which all ``parts`` are nearer to their structures: ``minimise sum ||(W Q - What) Q^T L||^2`` over both.

    For matrices that write the stream ``||(Q^T W - What) L||^2``; ``L L^T = C``. Two steps alternate, and neither raises
    the error: the fit of every structure, and the rotation. Without the metric of a reader that is an orthogonal
    Procrustes problem, solved by one SVD; with one, ``steps`` such problems that bound the error from above.

    Args:
        layer_norm: keep ``Q 1 = 1``.
        rounds: at most so many fits of all parts.
        start: a rotation to start from, such as :func:`pca_rotation`; the identity.
        tolerance: stop when a round gains less than this share.
        settings: of :meth:`tenfold.structure.Structure.fit`, such as ``sweeps``.

    Returns:
        ``Q (width, width)`` in float64, and the error after every round.

    Raises:
        ValueError: there are no parts, or they are at streams of several widths.

    Reference: ProcrustesGPT, arXiv 2506.02818.
    """
    if len({part.width for part in parts}) != 1:
        raise ValueError(
            f"the parts lie at streams of widths {[part.width for part in parts]}; give some, of one stream"
        )
    width = parts[0].width
    basis = helmert(width) if layer_norm else torch.eye(width, dtype=torch.float64)
    fixed = torch.full((width, width), 1 / width if layer_norm else 0.0, dtype=torch.float64)
    turn = torch.eye(width, dtype=torch.float64) if start is None else start.detach().double()
    steps = steps if any(part.reads and part.metric is not None for part in parts) else 1
    known: list[Factors | None] = [None] * len(parts)
    losses: list[float] = []
    while True:
        found = [part.fitted(turn, factors, settings) for part, factors in zip(parts, known, strict=True)]
        near = [part.structure.dense(factors) for part, factors in zip(parts, found, strict=True)]
        losses.append(sum(part.loss(turn, dense) for part, dense in zip(parts, near, strict=True)))
        known = list(found)
        if len(losses) >= rounds or (len(losses) > 1 and losses[-2] - losses[-1] <= tolerance * losses[0]):
            return turn, losses
        for _ in range(steps):
            pulls = torch.stack([part.pull(turn, dense) for part, dense in zip(parts, near, strict=True)])
            left, _, right = torch.linalg.svd(basis.T @ pulls.sum(0) @ basis)
            turn = fixed + basis @ left @ right @ basis.T


# orders of hidden units ------------------------------------------------------------------------------------------------


def order_hidden(
    weights: Sequence[Tensor], structure: Structure, *, rounds: int = 5, starts: int = 1, seed: int = 0
) -> Tensor:
    """An order ``(units,)`` of hidden units in which all matrices of an MLP fold well; never worse than the one they have.

    ``minimise sum_i ||W_i[order] - What_i||^2``. The search of :mod:`tenfold.structure.permutation_search` works on the matrices
    side by side, as one with more columns. For block trains that is the same problem, because blocks share nothing; a sum of
    Kronecker products shares its inner factors then, which is stricter.

    Args:
        weights: ``(units, width)`` each, as ``hidden_weights`` gives them: that of the output transposed. Scale them to weigh.
        structure: of one of them, with ``outs`` and ``ins``: Kronecker, BlockTrain, TensorTrain.

    Raises:
        ImportError: scipy is missing.
        ValueError: the matrices have another shape than the structure, or it has no ``outs`` and ``ins``.
    """
    if not {"outs", "ins"} <= {field.name for field in dataclasses.fields(structure)}:
        raise ValueError(
            f"{structure} has no outs and ins, so that the order of its rows can't be searched; take Kronecker"
        )
    if wrong := [tuple(weight.shape) for weight in weights if tuple(weight.shape) != structure.shape]:
        raise ValueError(
            f"a weight has shape {wrong[0]} but {structure} is {structure.shape}: (units, width) for every weight"
        )
    beside = torch.cat([weight.detach().double().cpu() for weight in weights], 1)
    first, *rest = structure.ins  # type: ignore[attr-defined]
    base = dataclasses.replace(structure, ins=(first * len(weights), *rest))
    placed = Scattered(base=base, out_features=beside.shape[0], in_features=beside.shape[1], map_columns=False)
    order = search(placed, beside, rounds=rounds, starts=starts, seed=seed)["rows"].long()

    def lost(rows: Tensor) -> float:
        pairs = [
            (weight[rows], structure.fit(weight[rows], sweeps=20)) for weight in beside.split(structure.shape[1], 1)
        ]
        return sum(float((weight - structure.dense(factors)).square().sum()) for weight, factors in pairs)

    same = torch.arange(len(order))
    return order if lost(order) < lost(same) else same
