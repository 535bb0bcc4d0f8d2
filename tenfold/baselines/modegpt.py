"""MoDeGPT: three modules, each the closed-form compression of two matrices with something between them.

| module | matrices | what stays |
|---|---|---|
| I, Nystroem | MLP in, gate and out | hidden units of the highest ridge leverage score ``[C (C + lambda I)^-1]_ii`` |
| II, CR | query and key | dimensions of the highest ``sqrt(Cq_ii Ck_ii)`` |
| III, SVD | value and output | ``Wv Wo`` of a head in the metric of the inputs of the block |

In I the output matrix becomes ``Wd C S (S^T C S)^-1``: least squares on the original activations. With rotary positions the
two dimensions of a pair go together in II. ``lambda`` is the mean of the diagonal of ``C``, a scale-free reading of
the paper's constant.

Reference: arXiv 2408.09632.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Block, Target
from tenfold.compression.head_pruning import PruneHeads
from tenfold.compression.unit_selection import Basis, best_basis, sum_tails


class MoDeGPTCriterion:
    """Choices of the three modules, from second moments only."""

    refit = False

    def order_units(self, target: Target) -> tuple[list[int], np.ndarray]:
        order = leverage_scores(target.inputs).argsort(descending=True, stable=True)
        return order.tolist(), residual_losses(target, order)

    def choose_value_basis(self, action: PruneHeads, block: Block, group: int) -> Basis:
        """Return the basis of the SVD of ``C^(1/2) Wv^T`` times all output matrices that read these values."""
        weight = block.target(action.out.path).weight
        reads = torch.cat([weight[:, action.columns(head)] for head in action.members(group)])
        return best_basis(reads.T @ reads, output_moment(action, block, "v", group))

    def order_queries(self, action: PruneHeads, block: Block, group: int) -> tuple[list[int], np.ndarray]:
        queries = [output_moment(action, block, "q", head).diagonal() for head in action.members(group)]
        scores = torch.stack(queries).sum(0) * output_moment(action, block, "k", group).diagonal()
        weights = torch.stack([scores[unit].sum() for unit in action.units])
        order = weights.argsort(descending=True, stable=True)
        return order.tolist(), sum_tails(weights[order])


def output_moment(action: PruneHeads, block: Block, which: str, head: int) -> Tensor:
    """Return the second moment ``(size, size)`` of the outputs of the ``q``, ``k`` or ``v`` matrix of a head, bias included."""
    path, at = action.into[which].path, action.rows(which, head)
    weight, bias, moments = block.weight(path)[at], block.bias(path), block.moments(path)
    second = weight @ moments.second @ weight.T
    if bias is not None:
        cross = torch.outer(weight @ moments.mean, bias[at])
        second = second + cross + cross.T + torch.outer(bias[at], bias[at])
    return second


def leverage_scores(second: Tensor) -> Tensor:
    """Return the ridge leverage scores ``(units,)`` of ``C (units, units)``."""
    values, vectors = torch.linalg.eigh(second)
    ridge = second.diagonal().mean()
    return vectors.square() @ (values.clamp_min(0) / (values.clamp_min(0) + ridge))


def residual_losses(target: Target, order: Tensor) -> np.ndarray:
    """Return ``(units + 1,)``: half the squared error at the output when the first ``k`` of ``order`` compensate for the others.

    With ``C = L L^T`` in this order, what the first ``k`` can't explain are the columns of ``W L`` from ``k`` on.
    """
    second = target.inputs[order][:, order]
    lower = torch.linalg.cholesky_ex(second + 1e-10 * second.diagonal().mean() * torch.eye(len(second)).to(second))[0]
    return sum_tails((target.weight[:, order] @ lower).square().sum(0)) / 2


def influence_ratios(
    curves: Sequence[TradeoffCurve], influence: Mapping[str, float], budget: float, temperature: float
) -> dict[str, float]:
    """Return ``{name of an item: ratio of it that stays}``: what a block loses is proportional to ``softmax(-s / temperature)``.

    All items of a block keep the same ratio. What a block can't lose the others do.

    Args:
        influence: ``{path of a block: s}``; an item is in the block that its name begins with.
        budget: parameters of all items together.
    """
    block_of = {curve.name: next(path for path in influence if curve.name.startswith(f"{path}.")) for curve in curves}
    paths = list(dict.fromkeys(block_of.values()))
    whole = np.array([sum(c.whole for c in curves if block_of[c.name] == path) for path in paths], float)
    least = np.array([sum(c.costs[0] for c in curves if block_of[c.name] == path) for path in paths], float)
    scores = -np.array([influence[path] for path in paths]) / temperature
    weights = np.exp(scores - scores.max())
    low, high, most = 0.0, 1e12, whole - least
    for _ in range(200):
        middle = np.sqrt(max(low, 1e-12) * high)
        enough = np.minimum(middle * weights * whole, most).sum() >= whole.sum() - budget
        low, high = (low, middle) if enough else (middle, high)
    keeps = 1 - np.minimum(high * weights * whole, most) / whole
    return {curve.name: float(keeps[paths.index(block_of[curve.name])]) for curve in curves}
