"""ROCKET: a dictionary and sparse coefficients for every matrix, from one decomposition in the space of whitened inputs.

With ``C = R R`` the second moment of the inputs and ``R W^T = U V``, ``U`` orthonormal (eigenvectors of ``R W^T W R``, the
largest first):

1. the first ``k`` rows of ``V`` (k, out) are the coefficients;
2. those of the largest ``|V_ij| sqrt(||R^-1 u_i||)`` stay: the same number for every output, then a few over all outputs;
3. the dictionary ``D = W^T S^T (S S^T + eps 1)^-1`` (in, k) is fitted to the sparse ``S`` (k, out); the least squares are the
   same in whitened and in original space;
4. ``What = (D S)^T``.

The sizes of all matrices minimise the sum of ``||W - What|| / ||W||`` within the budget
(``tenfold.baselines.knapsack``). ``What`` is stored dense, so that it runs everywhere, and counts as ``count_bytes``.

Reference: arXiv 2602.11008 and its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Action, Block
from tenfold.models.recipe import Rule
from tenfold.models.sites import Site
from tenfold.structure.linalg import roots, solve_symmetric

SHARES = np.arange(0.3, 0.96, 0.05)  # of the bytes of a matrix that stay
RATIOS = (1.0, 1.5, 2.0, 2.5, 3.0)  # atoms of the dictionary for every coefficient of an output
REFILL = 0.005  # ratio of the coefficients that are chosen over all outputs
RIDGE = 1e-3  # eps, relative to the mean of the diagonal of S S^T


def count_bytes(inner: int, out: int, atoms: int, nonzeros: int) -> int:
    """Return the bytes of a dictionary ``(inner, atoms)`` and coefficients ``(atoms, out)`` of so many ``nonzeros``.

    Values are in bfloat16. The indices of the nonzeros take a bit for every entry, or an int16 each and an int32 per output, or
    nothing where zeros are stored too, whichever is the least.
    """
    dense, mask = 2 * atoms * out, 2 * nonzeros + -(-atoms * out // 8)
    return 2 * inner * atoms + min(dense, mask, 4 * nonzeros + 4 * (out + 1))


def decompose(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose ``weight (out, in)`` in the metric ``inputs (in, in)``, as many rows as its rank can be.

    Returns:
        The coefficients ``(k, out)`` before thresholding, and ``||R^-1 u_i||`` of their rows ``(k,)``.
    """
    root, back = roots(inputs)
    white = root @ weight.double().T
    vectors = torch.linalg.eigh(white @ white.T)[1].flip(1)[:, : min(white.shape)]
    return vectors.T @ white, (back @ vectors).norm(dim=0)


def select_coefficients(found: tuple[Tensor, Tensor], atoms: int, nonzeros: int) -> Tensor:
    """Return ``S (atoms, out)`` with ``nonzeros`` of the first ``atoms`` rows of what ``decompose`` found, zeros elsewhere."""
    values, norms = found[0][:atoms], found[1][:atoms, None]
    each = min(atoms, max(1, nonzeros // values.shape[1] - round(REFILL * atoms)))
    stays = torch.zeros_like(values, dtype=torch.bool)
    stays.scatter_(0, (values.abs() * norms.sqrt()).topk(each, dim=0).indices, True)
    rest = (values.abs() * norms).masked_fill(stays, -1.0).flatten()
    stays.view(-1)[rest.topk(nonzeros - each * values.shape[1]).indices] = True
    return torch.where(stays, values, 0.0)


def fit_dictionary(weight: Tensor, kept: Tensor) -> Tensor:
    """Return ``D (in, atoms)``, fitted to the coefficients ``kept (atoms, out)``."""
    gram = kept @ kept.T
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean().clamp_min(1e-300)))
    return solve_symmetric(gram, weight.double().T @ kept.T)


def relative_error(weight: Tensor, kept: Tensor) -> float:
    """Return ``||W - (D S)^T|| / ||W||`` for the coefficients ``kept``, without the product."""
    basis, size = fit_dictionary(weight, kept), weight.double().square().sum()
    cross = weight.double().T @ kept.T
    square = size - 2 * (basis * cross).sum() + ((basis.T @ basis) * (kept @ kept.T)).sum()
    return float((square.clamp_min(0) / size.clamp_min(1e-300)).sqrt())


def list_sizes(inner: int, out: int, share: float) -> list[tuple[int, int]]:
    """Return ``(atoms, nonzeros)`` for every ratio of both: the largest that fit in ``share`` of the dense bytes."""
    found = []
    for ratio in RATIOS:
        pairs = [(k, max(1, int(k / ratio)) * out) for k in range(1, min(inner, out) + 1)]
        within = [pair for pair in pairs if count_bytes(inner, out, *pair) <= 2 * share * inner * out]
        found += within[-1:]
    return list(dict.fromkeys(found))


@dataclass
class SparseSite(Action):
    """One site as the product of a dictionary and sparse coefficients, stored dense.

    Costs are in units of two bytes, so that a budget of parameters is that of a model in bfloat16.

    Raises:
        ValueError: the rule sets more than its method.
    """

    site: Site
    rule: Rule
    loss_unit = "relative error"

    def __post_init__(self):
        if self.rule.structures != [{"kind": "dense"}] or self.rule.keep is not None or self.rule.bias == "drop":
            raise ValueError(
                f"the rule for role {self.rule.role} fills matrices by rocket: give it structure {{kind: dense}}, no keep, no "
                "bias, and the recipe a budget"
            )
        self.sites = [self.site]

    def curves(self, block: Block) -> list[TradeoffCurve]:
        (out, inner), target = self.site.shape, block.target(self.site.path)
        found = decompose(target.weight, target.inputs)
        costs, losses, options = [], [], []
        for share in SHARES:
            sizes = list_sizes(inner, out, share)
            tried = [(relative_error(target.weight, select_coefficients(found, *size)), size) for size in sizes]
            if tried:
                error, size = min(tried)
                costs.append(-(-count_bytes(inner, out, *size) // 2))
                losses.append(error)
                options.append(list(size))
        if not costs:  # the matrix is too small; as in the published code, no other one stays dense
            costs, losses, options = [out * inner], [0.0], [None]
        size = {"products": np.full(len(costs), out * inner), "calls": self.site.calls, "whole": out * inner}
        return [TradeoffCurve(self.site.path, np.array(costs), np.array(losses), options, **size)]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        path, size = self.site.path, chosen[self.site.path]
        target = block.target(path)
        near = target.weight
        if size is not None:
            kept = select_coefficients(decompose(target.weight, target.inputs), *size)
            near = (fit_dictionary(target.weight, kept) @ kept).T
        block.set_dense(path, near)

    def count_bytes(self, chosen: dict[str, Any]) -> tuple[int, int]:
        (out, inner), size = self.site.shape, chosen[self.site.path]
        return 2 * out * inner if size is None else count_bytes(inner, out, *size), 2 * out * inner
