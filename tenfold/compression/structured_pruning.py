"""Pruning of the hidden units of an MLP; ``tenfold.compression.head_pruning`` prunes the heads of an attention.

A ``PruningCriterion`` chooses what stays: see ``tenfold.compression.pruning_criteria``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Action, Block, Target, with_ridge
from tenfold.compression.divergence import Trial
from tenfold.compression.evidence import (
    Split,
    expected_loss,
    fisher_losses,
    scale_losses,
    split_halves,
    unit_products,
)
from tenfold.compression.moments import Moments
from tenfold.compression.unit_selection import Basis, order_units_by_products
from tenfold.models.distributed import all_reduce_number
from tenfold.models.sites import Site, weight_of
from tenfold.models.stock import mlp_kind
from tenfold.structure.linalg import solve_symmetric

ALIGNED = 8  # hidden units of a large MLP come in multiples of this, for kernels in half precision


class PruningCriterion(Protocol):
    """Choice of the units and dimensions that stay; ``action`` is a ``tenfold.compression.head_pruning.PruneHeads``.

    ``refit``: whether the output matrix of an attention compensates for those that go even where nothing else is refitted.
    """

    refit: bool

    def order_units(self, target: Target) -> tuple[list[int], np.ndarray]:
        """Return an order of the hidden units, which ``target`` reads, and the losses."""
        ...

    def choose_value_basis(self, action: Any, block: Block, group: int) -> Basis:
        """Return the basis of the values of a group."""
        ...

    def order_queries(self, action: Any, block: Block, group: int) -> Basis | tuple[list[int], np.ndarray]:
        """Return the basis of the queries and keys of a group, or an order of their units and the losses."""
        ...


class PruneUnits(Action):
    """Prune units that some matrices make and one reads; those that stay compensate for the others, as least squares can.

    ``into`` are the sites that make them, ``out`` is the one that reads them, ``whole`` their number.
    """

    into: Sequence[Site]
    out: Site
    whole: int

    def __post_init__(self):
        self.name = self.out.path
        self.fisher_paths = self.evidence_paths = [self.name]

    def columns(self, kept: Tensor) -> Tensor:
        """Return the columns of the output matrix that read the units ``kept``."""
        return kept

    def rows(self, site: Site, kept: Tensor) -> Tensor:
        """Return the rows of the matrix ``site`` that make the units ``kept``."""
        return kept

    def _error(self, block: Block, kept: Tensor, of: Moments | Split | None = None) -> tuple[Tensor, Tensor | None]:
        """Return ``W - What`` and the error of the bias where the units ``kept`` compensate for the others."""
        of = of or block.moments(self.name)
        return restricted_error(block, self.name, self.columns(kept.sort().values), of.second, of.mean)

    def trials(self, block: Block, sizes: Mapping[str, Any]) -> list[Trial]:
        count = sizes[self.name]
        if self.out.expert is not None or count == self.whole:  # each of many experts matters little
            return []
        error, shift = self._error(block, block.orders[self.name][:count].long())
        return [Trial({self.name: count}, self.name, (-error, None if shift is None else -shift))]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        for site in self.into:
            block.refit_dense(site.path)
        if chosen[self.name] == self.whole:
            block.refit_dense(self.name)
            return
        kept = block.orders[self.name][: chosen[self.name]].long().sort().values
        near, bias = solve_restricted(block, self.name, self.columns(kept), block.weight(self.name))
        for site in self.into:
            module: Any = block.model.get_submodule(site.path)
            rows = self.rows(site, kept)
            matrix = weight_of(module).detach().double()[rows]
            short = None if module.bias is None else module.bias.detach().double()[rows]
            block.set_dense(site.path, matrix, short)
        block.set_dense(self.name, near, bias)


@dataclass
class PruneMlp(PruneUnits):
    """Prune the hidden units of one MLP."""

    sites: list[Site]
    criterion: PruningCriterion

    def __post_init__(self):
        self.into = [site for site in self.sites if site.role != "mlp.out"]
        (self.out,) = [site for site in self.sites if site.role == "mlp.out"]
        self.whole = self.out.shape[1]
        super().__post_init__()

    def curves(self, block: Block) -> list[TradeoffCurve]:
        units = self.out.shape[1]
        order, losses = self.criterion.order_units(block.target(self.name))
        if self.name in block.evidence:
            order, losses = self._compare_orders(block, order, losses)
        block.orders[self.name] = torch.tensor(order)
        losses[-1] = 0.0
        step = ALIGNED if units >= 32 * ALIGNED else 1
        counts = np.array([k for k in range(max(1, units // 32), units + 1) if k % step == 0 or k == units])
        products = sum(site.shape[1] for site in self.into) + self.out.shape[0]  # per unit
        numel = products + sum(site.bias for site in self.into)
        given = {"products": products * counts, "calls": self.out.calls, "tied": mlp_kind(self.out)}
        return [TradeoffCurve(self.name, numel * counts, losses[counts], counts.tolist(), **given)]

    def _compare_orders(self, block: Block, order: list[int], losses: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Return the order by moments or that by gradients token by token, whichever loses less on unseen text, and its losses.

        Moments know what the remaining units can compensate for. Gradients know which units are large just where they matter: in
        a last block, whose units write single tokens, that is worth more.
        """
        pairs, weight, tokens = block.evidence[self.name], block.weight(self.name), block.activations.num_tokens
        splits = split_halves(pairs, len(losses) - 1, tokens)
        candidates = [(order, losses, [order] * len(splits))]  # with the orders of the fitted halves
        if splits:
            products = [unit_products(split.fitted, weight) for split in splits]
            halves = [order_units_by_products(half)[0] for half in products]
            both = torch.stack(products).sum(0) / max(1.0, all_reduce_number(tokens))
            candidates.append((*order_units_by_products(both), halves))

        def measure(order: list[int], halves: list[list[int]], k: int) -> tuple[float, float]:
            """Return the losses on the text and on unseen text when ``k`` units compensate for the others."""
            inside = block.evidence_loss(self.name, self._error(block, torch.tensor(order[:k]))[0])
            outside = [
                fisher_losses(split.judging, *self._error(block, torch.tensor(half[:k]), split), split.tokens)[0]
                for split, half in zip(splits, halves, strict=True)
            ]
            return inside, sum(outside) / len(outside) if outside else inside

        sizes = measured_sizes(len(losses) - 1)[1:]
        found = [[measure(order, halves, k) for k in sizes] for order, _, halves in candidates]
        scores = [sum(np.log(max(outside, 1e-30)) for _, outside in one) for one in found]
        best = int(np.argmin(scores))
        measured = {k: expected_loss(*pair) for k, pair in zip(sizes, found[best], strict=True)}
        order, losses, _ = candidates[best]
        return order, scale_losses(losses, measured)


def measured_sizes(count: int) -> list[int]:
    """Return the sizes at which the scale of a curve is measured."""
    return sorted({max(1, count * part // 8) for part in (2, 4, 6)} - {count})


def restricted_error(
    block: Block, path: str, kept: Tensor, second: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return ``W - What`` and the error of the bias where the inputs ``kept`` compensate for the others."""
    weight, centers = block.weight(path), block.centers(path)
    second = second - torch.outer(mean, mean) if centers else second
    near = _solve_on(second, weight @ second, kept, weight, block.damping(second))
    error = weight.index_add(1, kept, near, alpha=-1)
    return error, -error @ mean if centers else None


def solve_restricted(
    block: Block, path: str, kept: Tensor, before: Tensor, basis: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the best matrix ``(out, kept)`` that reads the inputs ``kept`` only, damped towards ``before``, and its bias.

    Args:
        basis: ``(in, in)``: the matrix will read ``basis z`` where moments were taken of ``z``.
    """
    second, goal = block.input_covariance(path), block.cross_covariance(path)
    if basis is not None:
        second, goal = basis @ second @ basis.T, goal @ basis.T
    near = _solve_on(second, goal, kept, before, block.damping(second))
    whole = torch.zeros_like(before).index_copy(1, kept, near)
    return near, block.corrected_bias(path, whole if basis is None else whole @ basis)


def _solve_on(second: Tensor, goal: Tensor, kept: Tensor, before: Tensor, damping: float) -> Tensor:
    """Return ``(out, kept)``: least squares on the inputs ``kept``, a little damped towards ``before``."""
    ridge = damping / 10
    return solve_symmetric(with_ridge(second[kept][:, kept], ridge), goal[:, kept] + ridge * before[:, kept])
