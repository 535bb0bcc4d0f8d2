"""Criterion of pruning by the least loss in nats; ``tenfold.baselines.modegpt`` has that of a paper."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tenfold.compression.block import Block, Target
from tenfold.compression.head_pruning import PruneHeads
from tenfold.compression.structured_pruning import QueryOrder
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
        second = target.inputs if len(target.inputs) <= LARGE else target.inputs.float()
        target.inputs = second.new_empty(0)
        return order_units_by_covariance(target.weight, target.outputs, second)

    def choose_value_basis(self, action: PruneHeads, block: Block, group: int) -> Basis:
        target = block.target(action.out.path)
        outputs, second = 0, 0
        for head in action.members(group):
            at = action.columns(head)
            reads = target.weight[:, at]
            outputs = outputs + reads.T @ target.outputs @ reads
            second = second + target.inputs[at][:, at]
        assert isinstance(outputs, Tensor) and isinstance(second, Tensor)
        return best_basis(outputs, second / action.heads.each)

    def order_queries(self, action: PruneHeads, block: Block, group: int) -> QueryOrder:
        if action.heads.freedom == "basis":
            basis = best_basis(*action.query_moments(block, group))
            return QueryOrder(list(range(action.heads.size)), basis.losses, basis)
        if block.evidence:
            return QueryOrder(*order_units_by_products(action.query_products(block, group)))
        return QueryOrder(*order_units_by_variance(*action.query_moments(block, group), action.units))
