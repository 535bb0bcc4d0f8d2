"""The compressor that reads activations: block by block, every site fitted to what the original model would say there.

1. The original model runs forward over a part of the calibration text, and backward, block by block: what goes into every
   site, and how much what comes out of it matters (:mod:`tenfold.compress.fisher`). From this every item's loss at
   every size.
2. The budget is shared out so that the losses add up to the least (:mod:`tenfold.compress.allocate`).
3. Block by block, on the outputs of the blocks compressed so far, the sites are fitted and put in.

Only one block's weights are needed at a time (:mod:`tenfold.compress.weight_source`), and an interrupted run goes on
where it was (:mod:`tenfold.compress.resume_state`).
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

import numpy as np
import torch
from transformers import PreTrainedModel

from tenfold.compress.activations import Streams, twin
from tenfold.compress.allocate import TradeoffCurve, allocate
from tenfold.compress.block import Block, stages_of
from tenfold.compress.block_finetune import refine
from tenfold.compress.block_influence import block_influence
from tenfold.compress.block_plan import BlockPlan, plan_work
from tenfold.compress.budget import choose, total_of
from tenfold.compress.budget_split import LOSS_MODELS
from tenfold.compress.calibration import Batch, Calibration, check_text
from tenfold.compress.divergence import Trial, scale_by_trials
from tenfold.compress.fisher import FisherPass
from tenfold.compress.fit_actions import fit_apart, independent
from tenfold.compress.memory_check import check_room
from tenfold.compress.progress import Phase, Progress, phases_of, untold
from tenfold.compress.resume_state import ResumeState
from tenfold.compress.tensor_store import TensorStore
from tenfold.compress.weight_source import InMemoryWeights, Weights
from tenfold.models.config import Calibrate
from tenfold.models.distributed import barrier, is_main_process, num_processes, process_state, shard_items
from tenfold.models.invariances.maps import absorb_index_maps
from tenfold.models.recipe import Recipe
from tenfold.models.surgery import finish

WAYS = 4  # in which a block is wrong: its MLP, its values, its queries and keys, and hardly at all
IN_MEMORY = 2**28  # bytes of hidden states of one stream that are held in memory; more go to a temporary folder


def compress_blocks(
    model: PreTrainedModel,
    recipe: Recipe,
    text: Calibration,
    progress: Progress = untold,
    announce: Callable[[list[dict]], None] = lambda choices: None,
    weights: Weights | None = None,
    journal: ResumeState | None = None,
) -> dict[str, Any]:
    """Compress the blocks of ``model`` in place as ``recipe`` says, guided by the calibration ``text``.

    Args:
        announce: is told the choices before the work starts.
        weights: where the weights of a block come from; ``model`` holds them unless given.
        journal: what an earlier run has reached, and this one will.

    Returns:
        ``choices``: per item what was chosen, its parameters and the loss that was foreseen (None where a rule alone says what
        the item becomes) with its ``unit``; ``fits``: how alternating fits ended, of the blocks of this run; ``phases``: seconds;
        ``counted``: bytes of what is stored dense but counts as less, where there is any.

    Raises:
        ValueError: the blocks are no chain, a rule matches nothing, or the budget can't be met.
    """
    settings, works, journal = recipe.calibrate or Calibrate(), plan_work(model, recipe), journal or ResumeState()
    batches = enough(text.batches)
    if is_main_process():
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        check_room(model, works, _tokens(shard_items(part_of(batches, settings.survey))), longest, settings)
    weights = weights or InMemoryWeights(model, [work.path for work in works])
    training = model.training
    model.eval()
    try:
        with _folder(model, shard_items(batches), journal) as folder:
            begun = time.perf_counter()
            if journal.chosen is None:
                given, told = (batches, settings, weights, journal, folder, progress), partial(check_text, text)
                curves, influence = survey(model, works, *given, told, share=_share(model, recipe, works))
                if settings.allocate in LOSS_MODELS:
                    measure = LOSS_MODELS[settings.allocate]
                    measure(model, works, batches, settings, weights, journal, folder, curves, progress)
                sites = [site for work in works for action in work.actions for site in action.sites]
                chosen = choose(model, recipe, settings, sites, curves, influence)
                unit, own = unit_of(model, settings), _units(works)
                choices = [_choice(curve, chosen[curve.name], own.get(curve.name, unit)) for curve in curves]
                journal.choose(chosen, choices)
            announce(journal.choices)
            looked = time.perf_counter()
            _carry_out(model, works, shard_items(batches), settings, weights, journal, folder, progress)
    finally:
        model.train(training)
    finish(model, recipe.name)
    phases = {"survey": round(looked - begun, 1), "fits": round(time.perf_counter() - looked, 1)}
    return {"choices": journal.choices, "fits": journal.fits, "phases": phases} | _counted(works, journal.chosen)


def _counted(works: list[BlockPlan], chosen: dict[str, Any]) -> dict[str, Any]:
    """Add up the bytes of items that are stored dense but count as less; see :meth:`tenfold.baselines.rocket.Sparse.counted`."""
    found = [a.counted(chosen) for work in works for a in work.actions if hasattr(a, "counted")]
    if not found:
        return {}
    total = {"bytes": sum(count for count, _ in found), "dense_bytes": sum(dense for _, dense in found)}
    return {"counted": total | {"note": "counted bytes, stored dense"}}


@contextmanager
def _folder(model: PreTrainedModel, batches: list[Batch], journal: ResumeState) -> Iterator[Path | None]:
    """Where hidden states lie, None for memory."""
    width = model.get_input_embeddings().weight.shape[1]
    if journal.notes is None and 4 * width * sum(b["input_ids"].numel() for b in batches) <= IN_MEMORY:
        yield None
    else:
        if journal.notes and is_main_process():
            for left in journal.notes.glob("states-*"):  # by a run that was killed
                shutil.rmtree(left)
        barrier()
        with tempfile.TemporaryDirectory(prefix="states-", dir=journal.notes) as folder:
            yield Path(folder)


@torch.no_grad()
def _carry_out(
    model, works: list[BlockPlan], batches: list[Batch], settings, weights, journal, folder, progress
) -> None:
    shelf = TensorStore(folder and folder / "streams")
    with weights.outside():
        streams = Streams(model, [work.path for work in works], batches, shelf, settings.skip_first, settings.precision)
    for number, work in enumerate(progress(works, phases(batches, settings, len(works))[2])):
        with weights.at(work.path):
            _one_block(model, number, work, streams, settings, weights, journal, number + 1 == len(works))


def _one_block(model, number: int, work: BlockPlan, streams: Streams, settings, weights, journal, last: bool) -> None:
    """In a function of its own, so that nothing of one block is in memory when the next one is read."""
    original = twin(model.get_submodule(work.path))
    finished = journal.finished(number)
    barrier()  # for those that have not looked yet
    if finished:
        journal.restore(model, number)
    else:
        matters = journal.matters(number)
        block = Block(model, work.path, work.sites, streams, number, settings, matters, original)
        block.orders = journal.orders(number)
        for some in independent(work.actions, block):
            fit_apart(some, block, journal.chosen)
            for action in some:
                action.apply(block, journal.chosen)
        journal.fits |= block.fits
        del block
        if settings.refine:
            here, how = model.get_submodule(work.path), (settings.refine, settings.refine_rate, settings.seed)
            refine(streams, number, here, original, matters.get(work.path), *how)
        absorb_index_maps(model, work.path)
        weights.keep(number, work.path)
    if not last and settings.refit:
        streams.advance(number, original if settings.original_share or settings.refine else None)
    elif not last:
        streams.advance(number, now=original)


def survey(
    model: PreTrainedModel,
    works: list[BlockPlan],
    batches: list[Batch],
    settings: Calibrate,
    weights: Weights,
    journal: ResumeState,
    folder: Path | None,
    progress: Progress = untold,
    told: Callable[[float], None] = lambda nats: None,
    share: float = 0.5,
) -> tuple[list[TradeoffCurve], dict[str, float]]:
    """What every item could become, judged by the original model, and the influence of every block.

    Sensitivities go to the journal.

    Args:
        told: is told how many nats the model needs for a token of the text, if it predicts any.
        share: about how much of an item will stay: at that size divergences are measured.
    """
    some, gradients, steps = shard_items(part_of(batches, settings.survey)), settings.outputs != "none", journal.survey
    shelf = TensorStore(
        steps.folder / f"states-{process_state().process_index}" if steps.folder else folder and folder / "survey"
    )
    with weights.outside():
        streams = Streams(model, [work.path for work in works], some, shelf, settings.skip_first, settings.precision)
    look = FisherPass(streams, settings.seed, settings.token_weights == "clipped")
    still = settings.model_copy(update={"refit": False})
    stages, curves, influence, ratios, measured = [], [], {}, [], set[str]()
    ahead, back, _ = phases(batches, settings, len(works))
    wanted = settings.divergence and gradients and model.get_output_embeddings() is not None

    def forward(number: int, work: BlockPlan) -> tuple[list[list[str]], float]:
        with weights.at(work.path):
            inside = stages_of(work.path, work.sites, streams, number)
            look.forward(number, inside)
            return inside, block_influence(streams, number)

    def turn() -> None:
        with weights.outside():
            look.turn()

    def nats() -> float | None:
        with weights.outside():
            return look.nats()

    def backward(number: int, work: BlockPlan) -> tuple[list[dict], list[str], list[float], list[str]]:
        weighed = {p for a in work.actions for p in getattr(a, "weighed", [site.path for site in a.sites])}
        evident = {path for action in work.actions for path in getattr(action, "evident", ())}
        with weights.at(work.path):
            seen = look.backward(number, work.path, stages[number], weighed if gradients else None, evident)
            with torch.no_grad():
                given = (seen.matters, None, seen.moments, seen.evidence)
                block = Block(model, work.path, work.sites, streams, number, still, *given)
                found = {curve.name: curve for action in work.actions for curve in action.curves(block)}
                seen.evidence.clear()  # logits of trials take as much memory
                trials = trials_of(work, block, [*found.values(), *curves]) if wanted else []
                done = scale_by_trials(found, trials, streams, weights, number, settings.divergence)
                journal.weigh(number, seen.matters, block.orders)
                return [curve.to_json() for curve in found.values()], journal.weighed[number], block.ratios, done

    def trials_of(work: BlockPlan, block: Block, known: list[TradeoffCurve]) -> list[Trial]:
        """At the sizes that the items would get if there were no other blocks than those that are known."""
        free = [curve for curve in known if curve.settled is None]
        least, whole = (sum(float(curve.costs[k]) for curve in free) for k in (0, -1))
        sizes = allocate(free, max(least, share * whole))
        tried = [a for a in work.actions if hasattr(a, "trials")]
        return [trial for action in tried for trial in action.trials(block, sizes)]

    for number, work in enumerate(progress(works, ahead)):
        inside, influence[work.path] = steps.once(f"forward-{number}", partial(forward, number, work))
        stages.append(inside)
        look.stand_before(number + 1)
    if (needed := steps.once("nats", nats)) is not None and is_main_process():
        told(needed)
    if gradients:
        steps.once("turn", turn)
    for number, work in zip(reversed(range(len(works))), progress(works[::-1], back), strict=True):
        step = partial(backward, number, work)
        found, journal.weighed[number], more, done = steps.once(f"backward-{number}", step)
        look.leave(number)
        curves = [TradeoffCurve.from_json(plain) for plain in found] + curves
        ratios += more
        measured |= set(done)
    for curve in curves if ratios else []:
        if curve.name in measured:
            continue
        curve.losses = curve.losses * float(np.mean(ratios))
    return curves, influence


def _share(model: PreTrainedModel, recipe: Recipe, works: list[BlockPlan]) -> float:
    """About what share of the blocks a budget leaves."""
    if recipe.budget is None:
        return 0.5
    keep, of = recipe.budget.keep, recipe.budget.of
    if of in ("model", "without_head"):
        inside = sum(site.shape[0] * site.shape[1] for work in works for site in work.sites)
        keep = 1 - (1 - keep) * total_of(model, recipe.budget) / inside
    return min(0.9, max(0.1, keep))


def enough(batches: list[Batch]) -> list[Batch]:
    """``batches``, cut into single samples where several processes would not have one each.

    Raises:
        ValueError: there are not as many samples either.
    """
    if len(batches) >= num_processes():
        return batches
    single = [
        {name: value[k : k + 1] for name, value in b.items()} for b in batches for k in range(len(b["input_ids"]))
    ]
    if len(single) < num_processes():
        raise ValueError(
            f"{num_processes()} processes can't share {len(single)} samples of calibration text; start fewer, or give more text"
        )
    return single


def phases(batches: list[Batch], settings: Calibrate, blocks: int) -> tuple[Phase, Phase, Phase]:
    """Forward and backward through the original model, and the fits; see :func:`tenfold.compress.progress.phases_of`."""
    surveyed, behind = _tokens(part_of(batches, settings.survey)), WAYS * settings.divergence * blocks / 2
    return phases_of(surveyed, _tokens(batches), settings.outputs != "none", behind)


def _tokens(batches: list[Batch]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def part_of(batches: list[Batch], tokens: int) -> list[Batch]:
    """As many of ``batches``, spread evenly, as hold about ``tokens``, and one for every process."""
    each = _tokens(batches) / len(batches)
    count = min(len(batches), max(num_processes(), round(tokens / each)))
    return [batches[k * len(batches) // count] for k in range(count)]


def unit_of(model: PreTrainedModel, settings: Calibrate) -> str:
    """Of losses: nats a token where the metric of the outputs is a Fisher information."""
    nats = settings.outputs == "full" and settings.inputs == "second" and model.get_output_embeddings() is not None
    return "nats a token" if nats else "weighted squared error"


def _units(works: list[BlockPlan]) -> dict[str, str]:
    """Of the losses of items that have a unit of their own."""
    return {a.sites[0].path: a.loss_unit for work in works for a in work.actions if hasattr(a, "loss_unit")}


def _choice(curve: TradeoffCurve, option: Any, unit: str) -> dict[str, Any]:
    number = next(k for k, other in enumerate(curve.options) if other is option or other == option)
    shown = option.to_json() if hasattr(option, "to_json") else option
    return {
        "item": curve.name,
        "chosen": shown,
        "parameters": int(curve.costs[number]),
        "of": curve.whole,
        "loss": None if curve.settled is not None or math.isnan(curve.losses[number]) else float(curve.losses[number]),
        "unit": unit,
    }
