"""Pruning of whole groups of heads: a head of keys and values, and the query heads that read it.

What is left is an attention of the same form with fewer heads, which a plain configuration can say. The heads that stay
compensate for those that go by the output matrix, as far as least squares can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Block
from tenfold.compression.evidence import scale_losses
from tenfold.compression.structured_pruning import PruneUnits
from tenfold.compression.unit_selection import order_groups_by_covariance
from tenfold.models.attention_layout import Heads
from tenfold.models.sites import Site


@dataclass
class PruneGroups(PruneUnits):
    """Prune whole groups of heads of one attention, whose queries, keys and values have matrices of their own."""

    sites: list[Site]
    heads: Heads

    def __post_init__(self):
        by_role = {site.role: site for site in self.sites}
        self.out, self.into = by_role["attn.out"], [by_role[f"attn.{which}"] for which in "qkv"]
        self.whole = self.heads.groups
        super().__post_init__()

    def columns(self, kept: Tensor) -> Tensor:
        each = self.heads.each * self.heads.size
        return (kept[:, None] * each + torch.arange(each)).flatten()

    def rows(self, site: Site, kept: Tensor) -> Tensor:
        if site.role == "attn.q":
            return self.columns(kept)
        which = site.role.removeprefix("attn.")
        return torch.cat([self.heads.rows(which, group, False) for group in kept.tolist()])

    def curves(self, block: Block) -> list[TradeoffCurve]:
        target, count = block.target(self.name), self.whole
        parts = [self.columns(torch.tensor([group])) for group in range(count)]
        order, losses = order_groups_by_covariance(target.weight, target.outputs, target.inputs, parts)
        kept = block.orders[self.name] = torch.tensor(order)
        sizes = range(1, count) if block.evidence else ()
        measured = {k: block.evidence_loss(self.name, self._error(block, kept[:k])[0]) for k in sizes}
        losses = scale_losses(np.append(losses[:-1], 0.0), measured)[1:]
        costs = sum(site.shape[0] * (site.shape[1] + site.bias) for site in self.into)
        costs = (costs + self.out.shape[0] * self.out.shape[1]) // count * np.arange(1, count + 1)
        return [TradeoffCurve(self.name, costs, losses, list(range(1, count + 1)), tied="heads")]
