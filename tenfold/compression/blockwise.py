"""Compression guided by activations, block by block.

1. **Collect**: the original model runs forward over a part of the calibration text, and backward, block by block. The moments of
   the inputs of every site and the Fisher information at its outputs give the loss of every item at every size
   (``tenfold.compression.collect``).
2. **Allocate** the budget so that the sum of the losses is least (``tenfold.compression.allocation``).
3. **Carry out**: block by block, on the outputs of the blocks compressed so far, the sites are fitted and replaced.

Only one block's weights are needed at a time (``tenfold.compression.weight_source``), and an interrupted run is resumed
(``tenfold.compression.resume_state``).
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tenfold.compression.activations import Activations, freeze_copy
from tenfold.compression.allocation import LOSS_MODELS, TradeoffCurve
from tenfold.compression.block import Block
from tenfold.compression.block_finetune import finetune_block
from tenfold.compression.block_plan import BlockPlan, CompressionRun, plan_blocks
from tenfold.compression.budget import budget_total, choose_options
from tenfold.compression.calibration import Calibration, check_text, count_tokens, select_batches, split_for_processes
from tenfold.compression.collect import collect_curves, list_phases
from tenfold.compression.fit_actions import fit_in_parallel, split_independent
from tenfold.compression.memory_check import check_memory
from tenfold.compression.progress import Progress, no_progress
from tenfold.compression.resume_state import ResumeState
from tenfold.compression.tensor_store import TensorStore
from tenfold.compression.weight_source import InMemoryWeights, Weights
from tenfold.models.config import Calibrate
from tenfold.models.distributed import barrier, is_main_process, shard_items
from tenfold.models.recipe import Recipe
from tenfold.models.surgery import finish

IN_MEMORY = 2**28  # bytes of hidden states that are held in memory; more go to a temporary folder


def compress_blocks(
    model: PreTrainedModel,
    recipe: Recipe,
    text: Calibration,
    progress: Progress = no_progress,
    announce: Callable[[list[dict]], None] = lambda choices: None,
    weights: Weights | None = None,
    state: ResumeState | None = None,
) -> dict[str, Any]:
    """Compress the blocks of ``model`` in place by ``recipe``, guided by the calibration ``text``.

    Args:
        announce: is called with the choices before they are carried out.
        weights: source of the weights of a block; ``model`` holds them unless given.
        state: what an earlier run has reached, and this one will.

    Returns:
        ``choices``: what was chosen for every item, its parameters and its estimated loss (None where a rule alone decides) with
        its ``unit``; ``fits``: how iterative fits ended, of the blocks of this run; ``phases``: seconds; ``counted``: bytes of
        what is stored dense but counts as less, where there is any.

    Raises:
        ValueError: the blocks are no chain, a rule matches nothing, or the budget can't be met.
    """
    settings, plans, state = recipe.calibrate or Calibrate(), plan_blocks(model, recipe), state or ResumeState()
    batches = split_for_processes(text.batches)
    if is_main_process():
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        surveyed = count_tokens(shard_items(select_batches(batches, settings.fisher_tokens)))
        check_memory(model, plans, surveyed, longest, settings)
    weights = weights or InMemoryWeights(model, [plan.path for plan in plans])
    run = CompressionRun(model, plans, batches, settings, weights, state, progress=progress)
    training = model.training
    model.eval()
    try:
        with _states_folder(run) as run.folder:
            begun = time.perf_counter()
            if state.chosen is None:
                _choose(run, recipe, text)
            announce(state.choices)
            collected = time.perf_counter()
            _carry_out(run)
    finally:
        model.train(training)
    finish(model, recipe.name)
    phases = {"survey": round(collected - begun, 1), "fits": round(time.perf_counter() - collected, 1)}
    return {"choices": state.choices, "fits": state.fits, "phases": phases} | _count_bytes(plans, state.chosen)


@contextmanager
def _states_folder(run: CompressionRun) -> Iterator[Path | None]:
    """Open the folder of the hidden states, None for memory."""
    width, unfinished = run.model.get_input_embeddings().weight.shape[1], run.state.unfinished
    size = 4 * width * sum(batch["input_ids"].numel() for batch in shard_items(run.batches))
    if unfinished is None and size <= IN_MEMORY:
        yield None
        return
    if unfinished and is_main_process():
        unfinished.mkdir(parents=True, exist_ok=True)
        for left in unfinished.glob("states-*"):  # by a run that was killed
            shutil.rmtree(left)
    barrier()
    with tempfile.TemporaryDirectory(prefix="states-", dir=unfinished) as folder:
        yield Path(folder)


def _choose(run: CompressionRun, recipe: Recipe, text: Calibration) -> None:
    """Collect the curves, allocate the budget and save the choices in the state of the run."""
    curves, influence = collect_curves(run, _expected_ratio(run, recipe), partial(check_text, text))
    if run.settings.allocate in LOSS_MODELS:
        LOSS_MODELS[run.settings.allocate](run, curves)
    actions = [action for plan in run.plans for action in plan.actions]
    sites = [site for action in actions for site in action.sites]
    chosen = choose_options(run.model, recipe, run.settings, sites, curves, influence)
    unit = _loss_unit(run)
    units = {action.sites[0].path: action.loss_unit for action in actions if action.loss_unit}
    choices = [_describe_choice(curve, chosen[curve.name], units.get(curve.name, unit)) for curve in curves]
    run.state.save_choices(chosen, choices)


def _expected_ratio(run: CompressionRun, recipe: Recipe) -> float:
    """Return about which ratio of the blocks the budget leaves."""
    if recipe.budget is None:
        return 0.5
    keep = recipe.budget.keep
    if recipe.budget.of in ("model", "without_head"):
        inside = sum(site.shape[0] * site.shape[1] for plan in run.plans for site in plan.sites)
        keep = 1 - (1 - keep) * budget_total(run.model, recipe.budget) / inside
    return min(0.9, max(0.1, keep))


def _loss_unit(run: CompressionRun) -> str:
    """Return the unit of losses: nats a token where the metric of the outputs is a Fisher information."""
    fisher = run.settings.output_metric == "full" and run.settings.input_metric == "second"
    return "nats a token" if fisher and run.model.get_output_embeddings() is not None else "weighted squared error"


def _describe_choice(curve: TradeoffCurve, option: Any, unit: str) -> dict[str, Any]:
    number = next(k for k, other in enumerate(curve.options) if other is option or other == option)
    return {
        "item": curve.name,
        "chosen": option.to_json() if hasattr(option, "to_json") else option,
        "parameters": int(curve.costs[number]),
        "of": curve.whole,
        "loss": None if curve.settled or math.isnan(curve.losses[number]) else float(curve.losses[number]),
        "unit": unit,
    }


@torch.no_grad()
def _carry_out(run: CompressionRun) -> None:
    batches = shard_items(run.batches)
    activations = run.open_activations(batches, TensorStore(run.folder and run.folder / "streams"))
    phase = list_phases(batches, run.settings, len(run.plans))[2]
    for number, plan in enumerate(run.progress(run.plans, phase)):
        with run.weights.at(plan.path):
            _compress_block(run, number, plan, activations)


def _compress_block(run: CompressionRun, number: int, plan: BlockPlan, activations: Activations) -> None:
    """Compress one block; in a function of its own, so that its tensors are freed before the next block is loaded."""
    settings, state = run.settings, run.state
    original = freeze_copy(run.model.get_submodule(plan.path))
    finished = state.is_finished(number)
    barrier()  # until all have looked
    if finished:
        state.load_block(run.model, number)
    else:
        fisher = state.fisher(number)
        block = Block(activations, number, plan.sites, settings, fisher, original)
        block.orders = state.orders(number)
        for actions in split_independent(plan.actions, block):
            fit_in_parallel(actions, block, state.chosen)
            for action in actions:
                action.apply(block, state.chosen)
        state.fits |= block.fits
        del block
        if settings.block_finetune_steps:
            module = run.model.get_submodule(plan.path)
            how = (settings.block_finetune_steps, settings.block_finetune_rate, settings.seed)
            finetune_block(activations, number, module, original, fisher.get(plan.path), *how)
        run.weights.finish_block(number, plan.path)
    if number + 1 == len(run.plans):
        return
    if settings.refit:
        activations.advance(number, original if settings.original_share or settings.block_finetune_steps else None)
    else:
        activations.advance(number, compressed=original)


def _count_bytes(plans: list[BlockPlan], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the total of ``tenfold.compression.block.Action.count_bytes``, where any action counts bytes."""
    counts = [count for plan in plans for action in plan.actions if (count := action.count_bytes(chosen))]
    if not counts:
        return {}
    total = {"bytes": sum(count for count, _ in counts), "dense_bytes": sum(dense for _, dense in counts)}
    return {"counted": total | {"note": "counted bytes, stored dense"}}
