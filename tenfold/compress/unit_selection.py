"""Narrowing: fewer hidden units in an MLP, fewer dimensions in the heads of an attention, and the neighbours follow.

Both work on products of two matrices with something between them. A **hidden unit** that goes takes a row of the matrix
before it and a column of the one behind it along; what it contributed is made up for by the units that stay, as far as
they can tell (least squares). Units are chosen one at a time: the one whose activation, given those chosen so far, lowers
the weighed error at the output most. **Heads** are expressed in the basis in which few dimensions carry most of what
matters, queries with keys and values with the output matrix, and the last dimensions go.

All errors are in nats a token: ``1/2 tr(G E C E^T)``, see :mod:`tenfold.compress.fisher`.

Reference: the three modules of MoDeGPT (arXiv 2408.09632) choose units by ridge leverage scores, dimensions of queries
and keys by norms, and values by an SVD, all without regard to the loss behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.structure.linalg import roots

STEPS = 192  # at most: of more units, several are chosen at once, among the best ones, which is nearly as good


def choose_units(weight: Tensor, outputs: Tensor, second: Tensor) -> tuple[list[int], np.ndarray]:
    """An order of the units, and the loss ``(units + 1,)`` that is left when its first ``k`` stay.

    Args:
        weight: ``W (out, units)`` that reads the units.
        outputs: ``G (out, out)``.
        second: ``C (units, units)``, positive definite; it is overwritten, and its precision is that of the work.
    """
    rest, reader = second, (roots(outputs)[0] @ weight).to(second.dtype)
    seen = reader @ second  # the covariances that the chosen units do not explain, here with the outputs
    losses, order, units = [float((seen * reader).sum(dtype=torch.float64))], [], len(second)
    floor = (1e-12 if second.dtype == torch.float64 else 1e-6) * float(second.diagonal().mean())
    del reader
    while len(order) < units:
        some = min(max(1, units // STEPS), units - len(order))
        gains = seen.square().sum(0) / rest.diagonal().clamp_min(floor)
        gains[order] = -1.0
        near = gains.topk(min(4 * some, units - len(order))).indices
        picked, drops = _pick(rest[near][:, near], seen[:, near], some, floor)
        chosen = near[picked]
        order += chosen.tolist()
        for drop in drops:
            losses.append(losses[-1] - drop)
        corner = rest[chosen][:, chosen]
        corner.diagonal().add_(floor)
        lower = torch.linalg.cholesky_ex(corner)[0]
        along = torch.linalg.solve_triangular(lower, rest[chosen], upper=False)
        out = torch.linalg.solve_triangular(lower, seen[:, chosen].T, upper=False)
        rest.addmm_(along.T, along, alpha=-1.0)
        seen.addmm_(out.T, along, alpha=-1.0)
    return order, np.maximum(losses, 0.0) / 2


def _pick(rest: Tensor, seen: Tensor, count: int, floor: float) -> tuple[list[int], list[float]]:
    """``count`` units one at a time, and by how much each lowers the error."""
    picked, drops = [], []
    for _ in range(count):
        variance = rest.diagonal().clamp_min(floor)
        gains = seen.square().sum(0) / variance
        gains[picked] = -1.0
        unit = int(gains.argmax())
        along, out = rest[:, unit] / variance[unit].sqrt(), seen[:, unit] / variance[unit].sqrt()
        rest, seen = rest - torch.outer(along, along), seen - torch.outer(out, along)
        picked.append(unit)
        drops.append(float(out.square().sum()))
    return picked, drops


@dataclass
class Basis:
    """A basis of one head: ``x -> there x`` and back; the first dimensions carry most.

    Args:
        there: ``(size, size)``.
        back: its inverse.
        losses: ``(size + 1,)``: what it costs in nats when only the first ``k`` dimensions stay.
    """

    there: Tensor
    back: Tensor
    losses: np.ndarray


def best_basis(outputs: Tensor, second: Tensor) -> Basis:
    """The basis in which ``tr(G (1 - P) C (1 - P)^T)`` is least for every number of dimensions that stay.

    With ``R^2 = G``, ``L^2 = C`` and ``R L = U S V^T``: ``there = U^T R`` and ``back = R^-1 U``.
    """
    (root, inverse), (other, _) = roots(outputs), roots(second)
    left, values, _ = torch.linalg.svd(root @ other)
    return Basis(left.T @ root, inverse @ left, _tails(values.square()))


def best_units(outputs: Tensor, second: Tensor, units: list[list[int]]) -> tuple[list[int], np.ndarray]:
    """Where no basis is free: the order of ``units`` (sets of dimensions), and the losses as in :class:`Basis`."""
    shares = outputs.diagonal() * second.diagonal()
    weights = torch.stack([shares[unit].sum() for unit in units])
    order = weights.argsort(descending=True, stable=True)
    return order.tolist(), _tails(weights[order])


def least_units(products: Tensor) -> tuple[list[int], np.ndarray]:
    """Return an order of units, and the losses ``(units + 1,)`` when only the first ``k`` stay.

    Units go one at a time: the one with which all that have gone cost least, ``1/2`` the sum of ``products`` over pairs of them.

    Args:
        products: ``(units, units)``: the second moment of what losing each does to the loss.
    """
    gone: list[int] = []
    losses, along = [0.0], torch.zeros(len(products)).to(products)
    while len(gone) < len(products):
        costs = products.diagonal() + 2 * along
        costs[gone] = torch.inf
        unit = int(costs.argmin())
        losses.append(losses[-1] + max(0.0, float(costs[unit])))
        along = along + products[unit]
        gone.append(unit)
    return gone[::-1], np.array(losses[::-1]) / 2


def _tails(squares: Tensor) -> np.ndarray:
    ahead = squares.flip(0).cumsum(0).flip(0)
    return np.append(ahead.cpu().numpy(), 0.0) / 2
