"""Narrowing carried out: the hidden units of an MLP; :mod:`tenfold.compress.head_pruning` has the heads of an attention.

What is chosen, and by which measure, is a :class:`PruningCriterion`'s to say: :class:`ByLoss` is ours,
:mod:`tenfold.baselines.modegpt` has that of a paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tenfold.compress.allocate import TradeoffCurve
from tenfold.compress.block import Block, Target, with_ridge
from tenfold.compress.divergence import Trial
from tenfold.compress.evidence import Fold, corrected, expected_loss, fisher_loss, folds_of, unit_products
from tenfold.compress.unit_selection import Basis, best_basis, best_units, choose_units, least_units
from tenfold.models.distributed import all_reduce_number
from tenfold.models.sites import Site, weight_of
from tenfold.structure import Dense
from tenfold.structure.linalg import solve_symmetric

if TYPE_CHECKING:
    from tenfold.compress.head_pruning import NarrowHeads


@dataclass
class Queries:
    """How queries and keys of a group of heads lose dimensions.

    Args:
        order: of the units of a head; the first ones stay.
        losses: ``(units + 1,)``: what it costs when only the first ``k`` stay.
        basis: they are expressed in first; None: as they are.
    """

    order: list[int]
    losses: np.ndarray
    basis: Basis | None = None


LARGE = 1024  # hidden units; more are chosen in single precision, which takes half the memory and half the time
ALIGNED = 8  # hidden units of a large MLP come in multiples of this: kernels for half precision want it


class PruningCriterion(Protocol):
    """Which units and dimensions stay, and whether the output matrix of an attention makes up for those that go."""

    refit: bool

    def units(self, target: Target) -> tuple[list[int], np.ndarray]:
        """An order of the hidden units, ``target`` being the matrix that reads them, and the losses; uses ``target`` up."""
        ...

    def values(self, action: NarrowHeads, block: Block, group: int) -> Basis:
        """Of the values of a group."""
        ...

    def queries(self, action: NarrowHeads, block: Block, group: int) -> Queries:
        """Of the queries and keys of a group, where anything about them is free."""
        ...


class ByLoss:
    """The least loss in nats, see :mod:`tenfold.compress.unit_selection`."""

    refit = True

    def units(self, target: Target) -> tuple[list[int], np.ndarray]:
        second = target.inputs if len(target.inputs) <= LARGE else target.inputs.float()
        target.inputs = second.new_empty(0)
        return choose_units(target.weight, target.outputs, second)

    def values(self, action: NarrowHeads, block: Block, group: int) -> Basis:
        """By what the output matrix makes of them."""
        target = block.target(action.out.path)
        outputs, second = 0, 0
        for head in action.members(group):
            at = action.columns(head)
            reads = target.weight[:, at]
            outputs = outputs + reads.T @ target.outputs @ reads
            second = second + target.inputs[at][:, at]
        assert isinstance(outputs, Tensor) and isinstance(second, Tensor)
        return best_basis(outputs, second / action.heads.each)

    def queries(self, action: NarrowHeads, block: Block, group: int) -> Queries:
        if action.heads.freedom == "basis":
            basis = best_basis(*action.query_moments(block, group))
            return Queries(list(range(action.heads.size)), basis.losses, basis)
        if block.evidence:
            return Queries(*least_units(action.query_products(block, group)))
        return Queries(*best_units(*action.query_moments(block, group), action.units))


@dataclass
class NarrowMlp:
    """The hidden units of one MLP."""

    sites: list[Site]
    chooser: PruningCriterion = field(default_factory=ByLoss)

    def __post_init__(self):
        self.into = [site for site in self.sites if site.role != "mlp.out"]
        (self.out,) = [site for site in self.sites if site.role == "mlp.out"]
        self.name = self.out.path
        self.weighed = self.evident = [self.out.path]

    @property
    def unit(self) -> int:
        """Parameters of one hidden unit."""
        return sum(site.shape[1] + site.bias for site in self.into) + self.out.shape[0]

    def curves(self, block: Block) -> list[TradeoffCurve]:
        units = self.out.shape[1]
        order, losses = self.chooser.units(block.take(self.name))
        if self.name in block.evidence:
            order, losses = self._judged(block, order, losses)
        block.orders[self.name] = torch.tensor(order)
        losses[-1] = 0.0
        least = max(1, units // 32)
        step = ALIGNED if units >= 32 * ALIGNED else 1
        counts = np.array([k for k in range(least, units + 1) if k % step == 0 or k == units])
        products = (self.unit - sum(site.bias for site in self.into)) * counts
        prices = {"products": products, "calls": self.out.calls}
        return [TradeoffCurve(self.name, self.unit * counts, losses[counts], counts.tolist(), **prices)]

    def _judged(self, block: Block, order: list[int], losses: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The order by moments or that by gradients token by token, whichever text that it does not know finds better.

        Moments know what the units that stay can make up for. Gradients know which units are large just where they matter: in
        a last block, whose units write single tokens, that is worth more.
        """
        pairs, weight, sizes = block.evidence[self.name], block.weight(self.name), measured_sizes(len(losses) - 1)[1:]
        folds = folds_of(pairs, len(losses) - 1, block.tokens)
        found = [(order, losses, self._costs(block, sizes, order, folds, [order] * len(folds)))]
        if folds:
            halves = [unit_products(fold.known, weight) for fold in folds]
            other, rest = least_units(sum(halves) / max(1.0, all_reduce_number(block.tokens)))
            known = [least_units(half)[0] for half in halves]
            found.append((other, rest, self._costs(block, sizes, other, folds, known)))
        order, losses, costs = min(found, key=lambda one: sum(np.log(max(out, 1e-30)) for _, out in one[2]))
        return order, corrected(losses, {k: expected_loss(*cost) for k, cost in zip(sizes, costs, strict=True)})

    def _costs(
        self, block: Block, sizes: list[int], order: list[int], folds: list[Fold], known: list[list[int]]
    ) -> list[tuple[float, float]]:
        """What it costs when the first units of ``order`` stay, and make up for the others, on the text and on other text.

        Args:
            known: the orders that the halves of the text would have.
        """
        moments, costs = block.moments(self.name), []
        for k in sizes:
            inside = block.cost(self.name, self._left(block, order[:k], moments.second, moments.mean)[0])
            outside = [
                fisher_loss(fold.judged, *self._left(block, half[:k], fold.second, fold.mean), fold.tokens)
                for fold, half in zip(folds, known, strict=True)
            ]
            costs.append((inside, sum(outside) / len(outside) if outside else inside))
        return costs

    def _left(self, block: Block, kept: list[int], second: Tensor, mean: Tensor) -> tuple[Tensor, Tensor | None]:
        """``W - What``, and what the bias lacks, where the units ``kept`` make up for the others."""
        weight, free, at = block.weight(self.name), block.centres(self.name), torch.tensor(sorted(kept))
        second = second - torch.outer(mean, mean) if free else second
        error = weight.index_add(1, at, _on(second, weight @ second, at, weight, block.damping(second)), alpha=-1)
        return error, -error @ mean if free else None

    def trials(self, block: Block, sizes: Mapping[str, Any]) -> list[Trial]:
        """Return what the MLP lacks at its size in ``sizes``."""
        count, moments = sizes[self.name], block.moments(self.name)
        if self.out.expert is not None or count == self.out.shape[1]:  # of experts, each of many matters little
            return []
        error, lacks = self._left(block, block.orders[self.name][:count].tolist(), moments.second, moments.mean)
        return [Trial({self.name: count}, {self.name: (-error, None if lacks is None else -lacks)})]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        for site in self.into:
            refit_site(block, site.path)
        count = chosen[self.name]
        if count < self.out.shape[1]:
            self._cut(block, count)
        else:
            refit_site(block, self.name)

    def _cut(self, block: Block, count: int) -> None:
        kept = block.orders[self.name][:count].long().sort().values
        near, bias = restricted(block, self.name, kept, block.weight(self.name))
        for site in self.into:
            _shorten(block, site, kept)
        _keep_columns(block, self.out, near, bias)


def measured_sizes(count: int) -> list[int]:
    """The sizes at which the scale of a curve is measured."""
    return sorted({max(1, count * part // 8) for part in (2, 4, 6)} - {count})


def refit_site(block: Block, path: str) -> None:
    """Give a site the best matrix for the inputs that it now gets, if that is another one."""
    if block.refits(path):
        weight = block.refitted(path)
        block.put(path, weight, block.new_bias(path, weight))


def restricted(
    block: Block, path: str, kept: Tensor, before: Tensor, turn: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The best matrix ``(out, kept)`` that reads the inputs ``kept`` only, and its bias; damped towards ``before``.

    Args:
        turn: ``(in, in)``: the matrix will read ``turn z`` where moments were taken of ``z``.
    """
    second, goal = block.second(path), block.crossed(path)
    if turn is not None:
        second, goal = turn @ second @ turn.T, goal @ turn.T
    near = _on(second, goal, kept, before, block.damping(second))
    whole = torch.zeros_like(before).index_copy(1, kept, near)
    return near, block.new_bias(path, whole if turn is None else whole @ turn)


def _on(second: Tensor, goal: Tensor, kept: Tensor, before: Tensor, damping: float) -> Tensor:
    """``(out, kept)``: least squares on the inputs ``kept``, a little damped towards ``before``."""
    share = damping / 10
    return solve_symmetric(with_ridge(second[kept][:, kept], share), goal[:, kept] + share * before[:, kept])


def _shorten(block: Block, site: Site, kept: Tensor) -> None:
    """A matrix that makes the units ``kept`` only."""
    module = block.model.get_submodule(site.path)
    matrix = weight_of(module).detach().double()[kept]
    bias = None if module.bias is None else module.bias.detach().double()[kept]
    block.fold(site.path, Dense(out_features=len(kept), in_features=site.shape[1]), {"matrix": matrix}, bias)


def _keep_columns(block: Block, site: Site, near: Tensor, bias: Tensor | None) -> None:
    block.fold(site.path, Dense(out_features=site.shape[0], in_features=near.shape[1]), {"matrix": near}, bias)
