"""Selection of the hidden units of an MLP, and of the dimensions of the heads of an attention, that stay.

Both work on products of two matrices with something between them. A **hidden unit** that goes takes a row of the matrix
before it and a column of the one behind it along; the units that stay compensate for it as far as they can (least squares). Units
are chosen one at a time: the one whose activation, given those chosen so far, lowers the weighted error at the output most.
**Heads** are expressed in the basis in which few dimensions carry most of what matters, queries with keys and values with the
output matrix, and the last dimensions go.

All errors are in nats a token: ``1/2 tr(G E C E^T)``, see ``tenfold.compression.fisher``.

Reference: the three modules of MoDeGPT (arXiv 2408.09632) choose units by ridge leverage scores, dimensions of queries
and keys by norms, and values by an SVD, all without regard to the loss behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.structure.linalg import roots

MAX_STEPS = 192  # of more units, several are chosen at once, among the best ones, which is nearly as good


def order_units_by_covariance(weight: Tensor, outputs: Tensor, second: Tensor) -> tuple[list[int], np.ndarray]:
    """Return an order of the units, and the losses ``(units + 1,)`` when only its first ``k`` stay.

    Args:
        weight: ``W (out, units)`` that reads the units.
        outputs: ``G (out, out)``.
        second: ``C (units, units)``, positive definite; it is overwritten, and sets the precision.
    """
    rest, reader = second, (roots(outputs)[0] @ weight).to(second.dtype)
    seen = (
        reader @ second
    )  # covariances with the outputs that the chosen units do not explain; ``rest``: among the units
    losses, order, units = [float((seen * reader).sum(dtype=torch.float64))], [], len(second)
    floor = (1e-12 if second.dtype == torch.float64 else 1e-6) * float(second.diagonal().mean())
    del reader
    while len(order) < units:
        some = min(max(1, units // MAX_STEPS), units - len(order))
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
    """Return ``count`` units, chosen one at a time, and by how much each lowers the error."""
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
    """Basis of one head, whose first dimensions carry most.

    Args:
        forward: ``(size, size)``, to the basis.
        inverse: its inverse.
        losses: ``(size + 1,)``: nats lost when only the first ``k`` dimensions stay.
    """

    forward: Tensor
    inverse: Tensor
    losses: np.ndarray


def best_basis(outputs: Tensor, second: Tensor) -> Basis:
    """Return the basis in which ``tr(G (1 - P) C (1 - P)^T)`` is least for every number of dimensions that stay.

    With ``R^2 = G``, ``L^2 = C`` and ``R L = U S V^T``: ``forward = U^T R`` and ``inverse = R^-1 U``.
    """
    (root, inverse), (other, _) = roots(outputs), roots(second)
    left, values, _ = torch.linalg.svd(root @ other)
    return Basis(left.T @ root, inverse @ left, sum_tails(values.square()) / 2)


def order_units_by_variance(outputs: Tensor, second: Tensor, units: list[list[int]]) -> tuple[list[int], np.ndarray]:
    """Return an order of ``units`` (sets of dimensions) for a fixed basis, and the losses as in ``Basis``."""
    losses = outputs.diagonal() * second.diagonal()
    weights = torch.stack([losses[unit].sum() for unit in units])
    order = weights.argsort(descending=True, stable=True)
    return order.tolist(), sum_tails(weights[order]) / 2


def order_units_by_products(products: Tensor) -> tuple[list[int], np.ndarray]:
    """Return an order of units, and the losses ``(units + 1,)`` when only the first ``k`` stay.

    Units go one at a time: the one whose removal makes ``1/2`` the sum of ``products`` over pairs of removed units least.

    Args:
        products: ``(units, units)``: the second moment of the changes of the loss when each is removed.
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


def sum_tails(squares: Tensor) -> np.ndarray:
    """Return ``(n + 1,)``: the sums of ``squares (n,)`` from each index on."""
    return np.append(squares.flip(0).cumsum(0).flip(0).cpu().numpy(), 0.0)


def order_groups_by_covariance(
    weight: Tensor, outputs: Tensor, second: Tensor, groups: Sequence[Tensor]
) -> tuple[list[int], np.ndarray]:
    """Return an order of groups of units, and the losses ``(groups + 1,)`` when only its first ``k`` stay.

    Groups are chosen one at a time, as units are by ``order_units_by_covariance``.

    Args:
        weight: ``W (out, units)`` that reads the units.
        outputs: ``G (out, out)``.
        second: ``C (units, units)``, positive definite.
        groups: the indices of the units of each.
    """
    rest, reader = second.clone(), roots(outputs)[0] @ weight
    seen = reader @ second
    losses, order = [float((seen * reader).sum())], list[int]()
    floor = 1e-12 * float(second.diagonal().mean())
    while len(order) < len(groups):
        found = {}
        for number in set(range(len(groups))) - set(order):
            at = groups[number]
            corner = rest[at][:, at]
            corner.diagonal().add_(floor)
            lower = torch.linalg.cholesky_ex(corner)[0]
            found[number] = lower, torch.linalg.solve_triangular(lower, seen[:, at].T, upper=False)
        chosen = max(found, key=lambda number: float(found[number][1].square().sum()))
        lower, out = found[chosen]
        along = torch.linalg.solve_triangular(lower, rest[groups[chosen]], upper=False)
        rest.addmm_(along.T, along, alpha=-1.0)
        seen.addmm_(out.T, along, alpha=-1.0)
        losses.append(losses[-1] - float(out.square().sum()))
        order.append(chosen)
    return order, np.maximum(losses, 0.0) / 2
