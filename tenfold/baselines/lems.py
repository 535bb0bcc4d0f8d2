"""Layer-wise error model search (LEMS): a measured error for every matrix, and an integer program over their ranks.

The error of matrix ``i`` in block ``b`` of ``B`` at rank ``r`` is modelled as

``e_i(r) = m_b  K_i  l_i(r) / l_i(r_0)``, ``m_b = 1 + GAMMA (B - 1 - b) / (B - 1)``

``l_i(r)``: local importance, the sum of the squared singular values beyond ``r`` in the metrics of inputs and outputs;
``K_i``: global importance, the measured Kullback-Leibler divergence of the model in which this matrix alone has rank
``r_0 = 0.1 mn / (m + n)``, in nats a token; ``m_b``: propagation: errors of early blocks grow on their way through the model.
Ranks minimise ``sum_i e_i(r_i)`` within the budget, exactly.

Reference: Thoma et al., Advancing SVD-based LLM Compression via Layer-Wise Error Model Search, ICML 2026, and its code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tenfold.baselines.knapsack import solve_knapsack
from tenfold.compression.activations import Activations
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Block
from tenfold.compression.block_plan import BlockPlan, CompressionRun
from tenfold.compression.calibration import select_batches
from tenfold.compression.divergence import Correction, batches_with_tokens, divergences, run_variants
from tenfold.compression.fit_actions import FactorizeSite
from tenfold.compression.progress import Phase
from tenfold.compression.tensor_store import TensorStore
from tenfold.models.config import Calibrate
from tenfold.models.distributed import shard_items

GAMMA = 5.0  # in the published configuration, with alpha 0
REFERENCE = 0.1  # ratio of the whole cost at which the divergence is measured
LEAST = (0.3, 0.1)  # ratio that every matrix keeps, where half or more is kept in all, and where less is
TOKENS = 8192  # on which divergences are measured


def allocate_by_error_model(
    settings: Calibrate, curves: Sequence[TradeoffCurve], budget: float, influence: Mapping[str, float]
) -> dict[str, Any]:
    """Return ``{name: option}`` with the least sum of modelled errors; every item keeps at least the ratio ``LEAST``.

    Args:
        curves: with losses as ``measure_curves`` leaves them.
        budget: parameters of all items together.
    """
    least = LEAST[0] if budget >= 0.5 * sum(curve.whole for curve in curves) else LEAST[1]
    masks = [curve.costs >= min(least * curve.whole, curve.costs[-1]) for curve in curves]
    if sum(curve.costs[mask].min() for curve, mask in zip(curves, masks, strict=True)) > budget:
        masks = [curve.costs > 0 for curve in curves]
    modelled = []
    for curve, mask, factor in zip(curves, masks, propagation([curve.name for curve in curves]), strict=True):
        options = [option for option, allowed in zip(curve.options, mask, strict=True) if allowed]
        modelled.append(TradeoffCurve(curve.name, curve.costs[mask], factor * curve.losses[mask], options))
    return solve_knapsack(modelled, budget)


def propagation(names: Sequence[str]) -> list[float]:
    """Return ``m_b`` for items by their paths, whose first number is that of the block."""
    blocks = [int(number[0]) if (number := re.search(r"\d+", name)) else 0 for name in names]
    last = max(blocks)
    return [1 + GAMMA * (last - block) / max(1, last) for block in blocks]


@torch.no_grad()
def measure_curves(run: CompressionRun, curves: list[TradeoffCurve]) -> None:
    """Scale the losses of every curve, in place, to the divergence measured at ``REFERENCE``, on about ``TOKENS`` tokens.

    A block runs once for every matrix in it and in every block before it; the weights of two blocks are needed at a time.

    Raises:
        ValueError: a rule does more than factorise matrices one by one, or the model returns no logits.
    """
    batches = shard_items(select_batches(run.batches, run.settings.fisher_tokens))
    activations = run.open_activations(batches, TensorStore(run.folder and run.folder / "measured"), "float32")
    free = {curve.name: curve for curve in curves if not curve.settled}
    for number, plan in enumerate(run.progress(run.plans, Phase("divergences"))):
        measure = partial(_measure_block, run, activations, number, free)
        for path, divergence in run.state.tasks.run_or_load(f"measured-{number}", measure).items():
            curve = free[path]
            loss = float(curve.losses[curve.index_within(REFERENCE * curve.whole)])
            if loss > 0:
                curve.losses = curve.losses * (divergence / loss)
        with run.weights.at(plan.path):
            activations.advance(number)


def _measure_block(
    run: CompressionRun, activations: Activations, number: int, curves: dict[str, TradeoffCurve]
) -> dict[str, float]:
    """Return the divergence for every matrix of a block that is not settled."""
    plan = run.plans[number]
    with run.weights.at(plan.path):
        fixed, fisher = run.settings.model_copy(update={"refit": False}), run.state.fisher(number)
        block = Block(activations, number, plan.sites, fixed, fisher)
        corrections = _truncate_at_reference(plan, block, curves)
        variants = [{}, *({path: correction} for path, correction in corrections.items())]
        before = [activations.states(k)[0] for k in range(batches_with_tokens(activations, TOKENS))]
        states = run_variants(activations, run.weights, number, before, variants)
    with run.weights.outside():
        return dict(zip(corrections, divergences(activations, states), strict=True))


def _truncate_at_reference(plan: BlockPlan, block: Block, curves: dict[str, TradeoffCurve]) -> dict[str, Correction]:
    """Return ``{path: (What - W, change of the bias)}`` at the reference size of every item of the block."""
    corrections = {}
    for action in plan.actions:
        if not isinstance(action, FactorizeSite):
            raise ValueError(
                f"allocate lems measures matrices that are folded one by one, and {action.sites[0].path} is not; give it a plain "
                "rule, or another allocation"
            )
        curve = curves.get(action.site.path)
        if curve is not None:
            structure, weight = curve.options[curve.index_within(REFERENCE * curve.whole)], block.weight(curve.name)
            near = weight if structure is None else structure.dense(action.fit(block, structure))
            bias, new = block.bias(curve.name), block.corrected_bias(curve.name, near)
            corrections[curve.name] = near - weight, None if bias is None else new - bias
    return corrections
