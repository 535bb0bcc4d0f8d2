"""Pruning of whole groups of heads: a head of keys and values, and the query heads that read it.

What is left is an attention of the same form with fewer heads, which a plain configuration can say. The heads that stay
compensate for those that go by the output matrix, as far as least squares can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Action, Block
from tenfold.compression.divergence import Trial
from tenfold.compression.evidence import scale_losses
from tenfold.compression.structured_pruning import restricted_error, solve_restricted
from tenfold.compression.unit_selection import order_groups_by_covariance
from tenfold.models.attention_layout import Heads
from tenfold.models.sites import Site, weight_of


@dataclass
class PruneGroups(Action):
    """Prune whole groups of heads of one attention, whose queries, keys and values have matrices of their own."""

    sites: list[Site]
    heads: Heads

    def __post_init__(self):
        by_role = {site.role: site for site in self.sites}
        self.out, self.into = by_role["attn.out"], {which: by_role[f"attn.{which}"] for which in "qkv"}
        self.name = self.out.path
        self.fisher_paths = self.evidence_paths = [self.name]

    def columns(self, groups: list[int]) -> Tensor:
        """Return the columns of the output matrix that read the heads of ``groups``."""
        each = self.heads.each * self.heads.size
        return torch.cat([group * each + torch.arange(each) for group in groups])

    def rows(self, which: str, groups: list[int]) -> Tensor:
        """Return the rows of the matrix ``which`` (``q``, ``k``, ``v``) that make ``groups``."""
        if which == "q":
            return self.columns(groups)
        return torch.cat([self.heads.rows(which, group, False) for group in groups])

    def curves(self, block: Block) -> list[TradeoffCurve]:
        target, count = block.target(self.name), self.heads.groups
        parts = [self.columns([group]) for group in range(count)]
        order, losses = order_groups_by_covariance(target.weight, target.outputs, target.inputs, parts)
        block.orders[self.name] = torch.tensor(order)
        sizes = range(1, count) if block.evidence else ()
        measured = {k: block.evidence_loss(self.name, self._error(block, order[:k])[0]) for k in sizes}
        losses = scale_losses(np.append(losses[:-1], 0.0), measured)[1:]
        costs = sum(site.shape[0] * (site.shape[1] + site.bias) for site in self.into.values())
        costs = (costs + self.out.shape[0] * self.out.shape[1]) // count * np.arange(1, count + 1)
        return [TradeoffCurve(self.name, costs, losses, list(range(1, count + 1)), tied="heads")]

    def _error(self, block: Block, kept: list[int]) -> tuple[Tensor, Tensor | None]:
        moments = block.moments(self.name)
        return restricted_error(block, self.name, self.columns(sorted(kept)), moments.second, moments.mean)

    def trials(self, block: Block, sizes: Mapping[str, Any]) -> list[Trial]:
        count = sizes[self.name]
        if count == self.heads.groups:
            return []
        error, shift = self._error(block, block.orders[self.name][:count].int().tolist())
        return [Trial({self.name: count}, self.name, (-error, None if shift is None else -shift))]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        for site in self.into.values():
            block.refit_dense(site.path)
        if chosen[self.name] == self.heads.groups:
            block.refit_dense(self.name)
            return
        kept = sorted(block.orders[self.name][: chosen[self.name]].int().tolist())
        columns = self.columns(kept)
        near, bias = solve_restricted(block, self.name, columns, block.weight(self.name))
        for which, site in self.into.items():
            rows = self.rows(which, kept)
            module: Any = block.model.get_submodule(site.path)
            matrix = weight_of(module).detach().double()[rows]
            short = None if module.bias is None else module.bias.detach().double()[rows]
            block.set_dense(site.path, matrix, short)
        block.set_dense(self.name, near, bias)
