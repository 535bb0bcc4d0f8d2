"""Collection of the statistics of the original model, and from them the tradeoff curve of every item.

Forward through all blocks, then backward through one block after another. Statistics that the fits need go to the state of the
run; each step is a task that an interrupted run does not repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from tenfold.compression.allocation import TradeoffCurve, allocate_by_loss
from tenfold.compression.block import Block
from tenfold.compression.block_plan import BlockPlan, CompressionRun
from tenfold.compression.calibration import Batch, count_tokens, select_batches
from tenfold.compression.divergence import Trial, scale_by_trials
from tenfold.compression.fisher import FisherPass
from tenfold.compression.progress import Phase, estimate_phases
from tenfold.compression.tensor_store import TensorStore
from tenfold.models.config import Calibrate
from tenfold.models.distributed import is_main_process, process_state, shard_items

VARIANTS = 4  # of a block whose divergence is measured: its MLP, its values, its queries and keys, and a faint error


def collect_curves(
    run: CompressionRun, ratio: float = 0.5, on_loss: Callable[[float], None] = lambda nats: None
) -> tuple[list[TradeoffCurve], dict[str, float]]:
    """Return the curve of every item, judged by the original model, and the influence of every block.

    Args:
        ratio: about how much of an item will stay; divergences are measured at that size.
        on_loss: is called with the loss of the model per token of the text, if it predicts any.
    """
    settings, tasks, count = run.settings, run.state.tasks, len(run.plans)
    own = (
        tasks.folder / f"states-{process_state().process_index}"
        if tasks.folder
        else run.folder and run.folder / "survey"
    )
    batches = shard_items(select_batches(run.batches, settings.fisher_tokens))
    fisher_pass = FisherPass(
        run.open_activations(batches, TensorStore(own)), settings.seed, settings.token_weights == "clipped"
    )
    input_groups, influence = [], {}
    ahead, back, _ = list_phases(run.batches, settings, count)
    for number, plan in enumerate(run.progress(run.plans, ahead)):
        forward = partial(_forward, run, fisher_pass, number)
        groups, influence[plan.path] = tasks.run_or_load(f"forward-{number}", forward)
        input_groups.append(groups)
        fisher_pass.seek(number + 1)

    def run_outside(method: Callable):
        with run.weights.outside():
            return method()

    loss = tasks.run_or_load("nats", partial(run_outside, fisher_pass.mean_loss))
    if loss is not None and is_main_process():
        on_loss(loss)
    if settings.output_metric != "none":
        tasks.run_or_load("turn", partial(run_outside, fisher_pass.start_backward))
    curves, ratios, scaled = [], [], set[str]()
    for number, _ in zip(reversed(range(count)), run.progress(run.plans[::-1], back), strict=True):
        backward = partial(_backward, run, fisher_pass, number, input_groups[number], curves, ratio)
        found, more, done = tasks.run_or_load(f"backward-{number}", backward)
        fisher_pass.release(number)
        curves = [TradeoffCurve.from_json(plain) for plain in found] + curves
        ratios += more
        scaled |= set(done)
    for curve in curves if ratios else []:
        if curve.name not in scaled:
            curve.losses = curve.losses * float(np.mean(ratios))
    return curves, influence


def _forward(run: CompressionRun, fisher_pass: FisherPass, number: int) -> tuple[list[list[str]], float]:
    """Run one block forward; return its input groups and its influence."""
    with run.weights.at(run.plans[number].path):
        groups = fisher_pass.activations.find_input_groups(number, run.plans[number].sites)
        return groups, fisher_pass.forward(number, groups)


def _backward(
    run: CompressionRun,
    fisher_pass: FisherPass,
    number: int,
    input_groups: list[list[str]],
    known: list[TradeoffCurve],
    ratio: float,
) -> tuple[list[dict], list[float], list[str]]:
    """Run backward through one block and save its statistics.

    Returns:
        Its curves, the ratios of ``tenfold.compression.evidence.fisher_losses``, and the names of
        the curves that are scaled by measured divergences.
    """
    plan, settings, activations = run.plans[number], run.settings, fisher_pass.activations
    gradients = settings.output_metric != "none"
    fisher_paths = {path for action in plan.actions for path in action.fisher_paths}
    evidence_paths = {path for action in plan.actions for path in action.evidence_paths}
    with run.weights.at(plan.path):
        seen = fisher_pass.backward(number, input_groups, fisher_paths if gradients else None, evidence_paths)
        with torch.no_grad():
            fixed = settings.model_copy(update={"refit": False})
            block = Block(activations, number, plan.sites, fixed, seen.fisher, None, seen.moments, seen.evidence)
            curves = {curve.name: curve for action in plan.actions for curve in action.curves(block)}
            seen.evidence.clear()  # the logits of trials take as much memory
            predicts = run.model.get_output_embeddings() is not None
            measured = settings.divergence and gradients and predicts
            trials = _make_trials(plan, block, [*curves.values(), *known], ratio) if measured else []
            scaled = scale_by_trials(curves, trials, activations, run.weights, number, settings.divergence)
            run.state.save_statistics(number, seen.fisher, block.orders)
            return [curve.to_json() for curve in curves.values()], block.ratios, scaled


def _make_trials(plan: BlockPlan, block: Block, known: list[TradeoffCurve], ratio: float) -> list[Trial]:
    """Return trials at the sizes that the items would get if there were no other blocks than those that are known."""
    free = [curve for curve in known if not curve.settled]
    least, whole = (sum(float(curve.costs[k]) for curve in free) for k in (0, -1))
    sizes = allocate_by_loss(free, max(least, ratio * whole))
    return [trial for action in plan.actions for trial in action.trials(block, sizes)]


def list_phases(batches: list[Batch], settings: Calibrate, blocks: int) -> tuple[Phase, Phase, Phase]:
    """Return the phases forward, backward and fits; see ``tenfold.compression.progress.estimate_phases``."""
    surveyed = count_tokens(select_batches(batches, settings.fisher_tokens))
    behind = VARIANTS * settings.divergence * blocks / 2
    return estimate_phases(surveyed, count_tokens(batches), settings.output_metric != "none", behind)
