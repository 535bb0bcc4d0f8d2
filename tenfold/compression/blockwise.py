"""Compression guided by activations, block by block.

1. **Collect**: the original model runs forward over a part of the calibration text, and backward, block by block. The moments of
   the inputs of every site and the Fisher information at its outputs give the loss of every item at every size.
2. **Allocate** the budget so that the sum of the losses is least (``tenfold.compression.allocation``).
3. **Carry out**: block by block, on the outputs of the blocks compressed so far, the sites are fitted and replaced.

Only one block's weights are needed at a time (``tenfold.compression.weight_source``), and an interrupted run is resumed
(``tenfold.compression.resume_state``).
"""

from __future__ import annotations

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

from tenfold.compression.actions import BlockPlan, plan_blocks
from tenfold.compression.activations import Activations, freeze_copy
from tenfold.compression.allocation import TradeoffCurve, allocate_by_loss
from tenfold.compression.block import Block
from tenfold.compression.budget import budget_total, choose_options
from tenfold.compression.calibration import (
    Batch,
    Calibration,
    check_text,
    count_tokens,
    select_batches,
    settings_of,
    split_for_processes,
)
from tenfold.compression.depth import measure_removals
from tenfold.compression.divergence import Correction, Trial, measure_together, measure_trials, scale_curves
from tenfold.compression.embedding_ranks import EmbeddingRanks, find_embedding
from tenfold.compression.fisher import FisherPass
from tenfold.compression.fit_actions import apply_actions
from tenfold.compression.memory_check import check_memory
from tenfold.compression.progress import Progress, estimate_phases, no_progress
from tenfold.compression.resume_state import ResumeState
from tenfold.compression.stock_shapes import DROPPED, choose_stock, expect_stock_sizes
from tenfold.compression.tensor_store import TensorStore
from tenfold.compression.weight_source import InMemoryWeights, Weights
from tenfold.models.depth import block_list, remove_blocks
from tenfold.models.distributed import barrier, is_main_process, num_processes, process_state, shard_items
from tenfold.models.recipe import Recipe
from tenfold.models.sites import shape_of
from tenfold.models.surgery import finish
from tenfold.models.text_mode import is_causal_lm

DEPTH_TOKENS = 2048  # on which the loss without a block is measured where no divergence is
IN_MEMORY = 2**28  # bytes of hidden states that are held in memory; more go to a temporary folder
VARIANTS = 4  # of a block whose divergence is measured: its MLP, its values, its queries and keys, and a faint error


class BlockwiseCompression:
    """Compression of the blocks of one model, in place, by a recipe and a calibration text; ``run`` does it.

    Args:
        weights: source of the weights of a block; ``model`` holds them unless given.
        state: what an earlier run has reached, and this one will.

    Raises:
        ValueError: a rule matches nothing in the blocks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        text: Calibration,
        progress: Progress = no_progress,
        weights: Weights | None = None,
        state: ResumeState | None = None,
    ):
        self.model, self.recipe, self.text, self.progress = model, recipe, text, progress
        self.settings, self.plans = settings_of(recipe), plan_blocks(model, recipe)
        self.paths = [plan.path for plan in self.plans]
        self.weights, self.state = weights or InMemoryWeights(model, self.paths), state or ResumeState()
        self.embedding, self.outer = self._plan_embedding(), list[TradeoffCurve]()
        batches = split_for_processes(text.batches)
        surveyed = select_batches(batches, self.settings.fisher_tokens)
        self.batches, self.surveyed = shard_items(batches), shard_items(surveyed)
        self.gradients = self.settings.output_metric != "none"
        behind = VARIANTS * self.settings.divergence * len(self.plans) / 2
        self.phases = estimate_phases(count_tokens(surveyed), count_tokens(batches), self.gradients, behind)
        if is_main_process():
            longest = max(batch["input_ids"].shape[1] for batch in batches)
            self.memory = check_memory(model, self.plans, count_tokens(self.surveyed), longest, self.settings)

    def _plan_embedding(self) -> EmbeddingRanks | None:
        """Return what chooses the ranks of the embedding, where a rule asks for it and the model and the settings allow it."""
        if not (self.settings.divergence and any(rule.prune == "embedding" for rule in self.recipe.replace)):
            return None
        site = find_embedding(self.model, self.recipe.budget)
        return site and EmbeddingRanks(self.model, site, self.weights)

    def run(self, announce: Callable[[list[dict]], None] = lambda choices: None) -> dict[str, Any]:
        """Collect, allocate and carry out.

        Args:
            announce: is called with the choices before they are carried out.

        Returns:
            ``choices``: what was chosen for every item, its parameters and its estimated loss (None where a rule alone decides)
            with its ``unit``; ``fits``: how iterative fits ended; ``phases``: seconds; ``counted``:
            bytes of what is stored dense but counts as less, where there is any.

        Raises:
            ValueError: the blocks are no chain, or the budget can't be met.
        """
        training, begun = self.model.training, time.perf_counter()
        self.model.eval()
        try:
            with self._states_folder() as folder:
                if not self.state.chosen:
                    self.state.save_choices(*self.choose(*self.collect(folder)))
                announce(self.state.choices)
                collected = time.perf_counter()
                self._carry_out(folder)
        finally:
            self.model.train(training)
        if dropped := [k for k, path in enumerate(self.paths) if self.state.chosen.get(path) == DROPPED]:
            remove_blocks(self.model, dropped)
        finish(self.model, self.recipe.name)
        phases = {"survey": round(collected - begun, 1), "fits": round(time.perf_counter() - collected, 1)}
        return {"choices": self.state.choices, "fits": self.state.fits, "phases": phases} | self._count_bytes()

    @contextmanager
    def _states_folder(self) -> Iterator[Path | None]:
        """Open the folder of the hidden states of this process, None for memory; one in ``state`` stays until the job is done."""
        width = shape_of(self.model.get_input_embeddings())[1]
        if self.state.unfinished:
            yield self.state.unfinished / f"states-{process_state().process_index}-of-{num_processes()}"
        elif 4 * width * sum(batch["input_ids"].numel() for batch in self.batches) <= IN_MEMORY:
            yield None
        else:
            with tempfile.TemporaryDirectory(prefix="states-") as folder:
                yield Path(folder)

    def _open_activations(self, batches: list[Batch], folder: Path | None) -> Activations:
        with self.weights.outside():
            store, settings = TensorStore(folder), self.settings
            return Activations(self.model, self.paths, batches, store, settings.skip_first, settings.precision)

    def collect(self, folder: Path | None = None) -> tuple[list[TradeoffCurve], dict[str, float]]:
        """Return the curve of every item, judged by the original model, and the influence of every block.

        Every step is a task that an interrupted run does not repeat.

        Args:
            folder: of the hidden states; None: they are in memory.
        """
        tasks, settings = self.state, self.settings
        activations = self._open_activations(self.surveyed, folder and folder / "survey")
        fisher_pass = FisherPass(activations, settings.seed, settings.token_weights == "clipped")
        input_groups, influence = [], {}
        for number, plan in enumerate(self.progress(self.plans, self.phases[0])):
            forward = partial(self._forward, fisher_pass, number)
            groups, influence[plan.path] = tasks.run_or_load(f"forward-{number}", forward)
            input_groups.append(groups)
            fisher_pass.seek(number + 1)
        with self.weights.outside():
            loss = tasks.run_or_load("nats", fisher_pass.mean_loss)
            if self.gradients:
                tasks.run_or_load("turn", fisher_pass.start_backward)
        check_text(self.text, loss)
        if self.embedding is not None:
            found = tasks.run_or_load("embedding", partial(self._measure_embedding, self.embedding, activations))
            self.outer = [TradeoffCurve.from_json(found)]
        curves, ratios, tried = [], [], list[dict]()
        numbers = range(len(self.plans))[::-1]
        for number, _ in zip(numbers, self.progress(self.plans[::-1], self.phases[1]), strict=True):
            backward = partial(self._backward, fisher_pass, number, input_groups[number], curves)
            found, more, trials = tasks.run_or_load(f"backward-{number}", backward)
            if number:  # all blocks are tried together from the states in front of the first one
                fisher_pass.release(number)
            curves = [TradeoffCurve.from_json(plain) for plain in found] + curves
            ratios += more
            tried += trials
        joint = [trial for trial in tried if trial["together"]]
        together = tasks.run_or_load("together", partial(self._try_together, activations, joint)) if joint else {}
        fisher_pass.release(0)
        for trial in joint:  # not before what they say is saved
            activations.store.drop(f"error-{trial['path']}")
            activations.store.drop(f"shift-{trial['path']}")
        measured = {name for trial in tried for name in trial["items"]}
        for curve in curves:
            factor = np.mean(ratios) if ratios and curve.name not in measured else together.get(curve.name, 1.0)
            curve.losses = curve.losses * float(factor)
        return self.outer + curves, influence

    def _measure_embedding(self, embedding: EmbeddingRanks, activations: Activations) -> dict[str, Any]:
        """Return the curve of the embedding and save its statistics."""
        tokens = self.settings.divergence
        statistics = embedding.collect(activations, tokens)
        self.state.save_statistics(len(self.plans), {}, statistics)
        return embedding.curve(activations, statistics, tokens).to_json()

    def _forward(self, fisher_pass: FisherPass, number: int) -> tuple[list[list[str]], float]:
        """Run one block forward; return its input groups and its influence."""
        with self.weights.at(self.paths[number]):
            groups = fisher_pass.activations.find_input_groups(number, self.plans[number].sites)
            return groups, fisher_pass.forward(number, groups)

    def _backward(
        self, fisher_pass: FisherPass, number: int, input_groups: list[list[str]], known: list[TradeoffCurve]
    ) -> tuple[list[dict], list[float], list[dict]]:
        """Run backward through one block and save its statistics.

        Returns:
            Its curves, the ratios of ``tenfold.compression.evidence.fisher_losses``, and the trials by whose divergences
            curves are scaled: ``{"path": of the site that was wrong, "shifted": whether its bias was,
            "together": .., "items": .., "nats": ..}``.
        """
        plan, settings, activations = self.plans[number], self.settings, fisher_pass.activations
        fisher_paths = {path for action in plan.actions for path in action.fisher_paths}
        evidence_paths = {path for action in plan.actions for path in action.evidence_paths}
        with self.weights.at(plan.path):
            found = fisher_pass.backward(number, input_groups, fisher_paths if self.gradients else None, evidence_paths)
            moments, fisher, evidence = found
            with torch.no_grad():
                block = Block(activations, number, plan.sites, settings, fisher, None, moments, evidence)
                curves = {curve.name: curve for action in plan.actions for curve in action.curves(block)}
                evidence.clear()  # the logits of trials take as much memory
                predicts, trials = self.model.get_output_embeddings() is not None, []
                if settings.divergence and self.gradients and predicts:
                    sizes = self._expect_sizes([*curves.values(), *known])
                    trials = [trial for action in plan.actions for trial in action.trials(block, sizes)]
                tried = self._scale_by_trials(curves, trials, activations, number) if trials else []
                self.state.save_statistics(number, fisher, block.orders)
                return [curve.to_json() for curve in curves.values()], block.ratios, tried

    def _scale_by_trials(
        self, curves: dict[str, TradeoffCurve], trials: list[Trial], activations: Activations, number: int
    ) -> list[dict]:
        """Scale ``curves`` to the divergences of ``trials``; store the errors of these and return what they were."""
        tried = []
        measured = measure_trials(trials, activations, self.weights, number, self.settings.divergence)
        for (sizes, path, (error, shift), together), nats in zip(trials, measured, strict=True):
            if not scale_curves(curves, sizes, nats):
                continue
            about = {"path": path, "shifted": shift is not None, "together": together}
            tried.append(about | {"items": list(sizes), "nats": nats})
            if together:
                activations.store.put(f"error-{path}", error)
            if together and shift is not None:
                activations.store.put(f"shift-{path}", shift)
        return tried

    def _try_together(self, activations: Activations, tried: list[dict]) -> dict[str, float]:
        """Return ``{item: factor}``: what the trials of its role lose in all blocks together, over the sum of what each loses."""
        roles = {site.path: site.role for plan in self.plans for site in plan.sites}
        by_role: dict[str, list[dict]] = {}
        for trial in tried:
            by_role.setdefault(roles[trial["path"]], []).append(trial)

        def load(trial: dict) -> Correction:
            shift = activations.load(f"shift-{trial['path']}") if trial["shifted"] else None
            return activations.load(f"error-{trial['path']}"), shift

        def corrections(number: int) -> list[dict[str, Correction]]:
            inside = {site.path for site in self.plans[number].sites}
            return [{t["path"]: load(t) for t in some if t["path"] in inside} for some in by_role.values()]

        together = measure_together(corrections, activations, self.weights, self.settings.divergence)
        factors = {}
        for some, nats in zip(by_role.values(), together, strict=True):
            for trial in some:
                factors |= dict.fromkeys(trial["items"], nats / sum(other["nats"] for other in some))
        return factors

    def _expect_sizes(self, known: list[TradeoffCurve]) -> dict[str, Any]:
        """Return the sizes that the items would get if there were no other blocks than those that are known."""
        budget, ratio, free = self.recipe.budget, 0.5, [curve for curve in known if not curve.settled]
        blocks = sum(site.shape[0] * site.shape[1] for plan in self.plans for site in plan.sites)
        whole = sum(curve.whole for curve in free)
        if budget is not None:
            ratio = budget.keep
            if budget.of in ("model", "without_head"):
                inside = blocks + sum(curve.whole for curve in self.outer)
                ratio = 1 - (1 - ratio) * budget_total(self.model, budget) / inside
            ratio = min(0.9, max(0.1, ratio))
            if budget.shapes == "stock" and all(curve.tied for curve in free):
                return expect_stock_sizes(self.model, budget, self.paths, free, (1 - ratio) * whole)
        free += [curve.scale(whole / blocks) for curve in self.outer]  # the share of these blocks, at the same prices
        least, whole = (sum(float(curve.costs[k]) for curve in free) for k in (0, -1))
        return allocate_by_loss(free, max(least, ratio * whole))

    def choose(
        self, curves: list[TradeoffCurve], influence: dict[str, float]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return ``{item: option}`` within the budget, and the choices as ``run`` reports them."""
        actions = [action for plan in self.plans for action in plan.actions]
        sites = [site for action in actions for site in action.sites]
        budget = self.recipe.budget
        if budget is not None and budget.shapes == "stock":
            chosen, curves, about = choose_stock(self.model, budget, self.plans, curves, self._measure_depth)
        else:
            about, chosen = {}, choose_options(self.model, self.recipe, self.settings, sites, curves, influence)
        fisher = self.settings.output_metric == "full" and self.settings.input_metric == "second"
        nats = fisher and self.model.get_output_embeddings() is not None
        unit = "nats a token" if nats else "weighted squared error"
        units = {action.sites[0].path: action.loss_unit for action in actions if action.loss_unit}
        choices = [curve.describe(chosen[curve.name], units.get(curve.name, unit)) for curve in curves]
        return chosen, [c | ({"shape": about[c["item"]]} if about else {}) for c in choices]

    def _measure_depth(self, sizes: list[float], excess: float, limit: float) -> list[tuple[int, float]]:
        """Return the order in which whole blocks go, with the loss once each is gone; nothing where none can."""
        predicts = is_causal_lm(self.model) and self.model.get_output_embeddings() is not None
        if not predicts or block_list(self.model) is None:
            return []
        activations, tokens = self._open_activations(self.surveyed, None), self.settings.divergence or DEPTH_TOKENS
        return measure_removals(activations, self.weights, tokens, sizes, excess, limit, self.progress)

    @torch.no_grad()
    def _carry_out(self, folder: Path | None) -> None:
        if (ranks := self.embedding) is not None:
            ranks.install(
                self.state.chosen[ranks.site.path], self.state.statistics(len(self.plans))[1], self.recipe.name
            )
        activations = self._open_activations(self.batches, folder and folder / "streams")
        for number, plan in enumerate(self.progress(self.plans, self.phases[2])):
            if self.state.chosen.get(plan.path) == DROPPED:  # its states go on as they are
                continue
            with self.weights.at(plan.path):
                self._compress_block(number, plan, activations)

    def _compress_block(self, number: int, plan: BlockPlan, activations: Activations) -> None:
        """Compress one block; in a function of its own, so that its tensors are freed before the next block is loaded."""
        settings, state = self.settings, self.state
        original = freeze_copy(self.model.get_submodule(plan.path))
        finished = state.is_finished(number)
        barrier()  # until all have looked
        if finished:
            state.load_block(self.model, number)
        else:
            fisher, orders = state.statistics(number)
            block = Block(activations, number, plan.sites, settings, fisher, original)
            block.orders = orders
            apply_actions(plan.actions, block, state.chosen)
            state.fits |= block.fits
            del block
            self.weights.finish_block(number, plan.path)
        if number + 1 == len(self.plans):
            return
        if settings.refit:
            activations.advance(number, original if settings.original_share else None)
        else:
            activations.advance(number, compressed=original)

    def _count_bytes(self) -> dict[str, Any]:
        """Return the total of ``tenfold.compression.block.Action.count_bytes``, where any action counts bytes."""
        actions = [action for plan in self.plans for action in plan.actions]
        counts = [count for action in actions if (count := action.count_bytes(self.state.chosen))]
        if not counts:
            return {}
        total, dense = (sum(side) for side in zip(*counts, strict=True))
        return {"counted": {"bytes": total, "dense_bytes": dense, "note": "counted bytes, stored dense"}}
