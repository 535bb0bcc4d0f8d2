"""Criterion of pruning by the least loss in nats; ``tenfold.baselines.modegpt`` has that of a paper."""

from __future__ import annotations

import numpy as np
import torch

from tenfold.compression.block import Block, Target
from tenfold.compression.head_pruning import PruneHeads
from tenfold.compression.unit_selection import (
    Basis,
    best_basis,
    order_units_by_covariance,
    order_units_by_products,
    order_units_by_variance,
)

LARGE = 1024  # hidden units; more are chosen in single precision, which takes half the memory and half the time


class LossCriterion:
    """Least loss in nats, see ``tenfold.compression.unit_selection``."""

    refit = True

    def order_units(self, target: Target) -> tuple[list[int], np.ndarray]:
        dtype = torch.float64 if len(target.inputs) <= LARGE else torch.float32
        return order_units_by_covariance(target.weight, target.outputs, target.inputs.to(dtype, copy=True))

    def choose_value_basis(self, action: PruneHeads, block: Block, group: int) -> Basis:
        target = block.target(action.out.path)
        outputs = second = torch.zeros(action.heads.size, action.heads.size, dtype=torch.float64)
        for head in action.members(group):
            at = action.columns(head)
            reads = target.weight[:, at]
            outputs = outputs + reads.T @ target.outputs @ reads
            second = second + target.inputs[at][:, at]
        return best_basis(outputs, second / action.heads.each)

    def order_queries(self, action: PruneHeads, block: Block, group: int) -> Basis | tuple[list[int], np.ndarray]:
        if action.heads.freedom == "basis":
            return best_basis(*action.query_moments(block, group))
        if block.evidence:
            return order_units_by_products(action.query_products(block, group))
        return order_units_by_variance(*action.query_moments(block, group), action.units)
