"""Folded midway: trained dense for a part of the steps, then folded as the recipe says, and trained on.

A matrix that is far from trained can lose much of itself at little cost, and what it loses is learnt again behind it; a
structured model that starts from noise has to find everything by its factors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from tenfold.models.atomic_io import disk_full_errors, write_json
from tenfold.models.config import Calibrate
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.recipe import Recipe
from tenfold.train.checkpoints import FOLDED, STATE, last_checkpoint, step_of
from tenfold.train.trainer import PackedDataset, step_size

AT_ONCE = 1024  # tokens in a batch of those that guide the fold
# ``compress(model, recipe, batches)`` folds the model in place and returns a report
Compress = Callable[[Any, Recipe, list[dict[str, Tensor]]], dict[str, Any]]
KEPT = "rng_state*.pth"  # of the dense part's last checkpoint; its optimizer knows other tensors


class StopAtStep(TrainerCallback):
    """Ends a training behind ``step``, with a checkpoint, on the schedule of the whole."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_log = control.should_save = control.should_training_stop = True


def fold_midway(
    folder: Path, step: int, recipe: Recipe, windows: PackedDataset, model, trainer, load, compress: Compress
):
    """The model at ``step``, folded, whose training goes on with the checkpoint that is in ``folder / "checkpoints"`` then.

    The dense part has its checkpoints in ``folder / "dense"``, and these go once the folded one is there.

    Args:
        windows: what the model is trained on; it is folded by those of the dense part, evenly spread over it.
        model: makes the dense one.
        trainer: makes ``trainer(model, folder of its checkpoints)``.
        load: makes ``load(folder of a checkpoint)``, a model.
    """
    dense, target = folder / "dense", folder / "checkpoints" / f"checkpoint-{step}"
    if last_checkpoint(target.parent) is None:
        arguments = _train_dense(dense, step, model, trainer)
        found = last_checkpoint(dense)
        made = load(found).to(arguments.device)
        batches = _batches(windows, step * step_size(arguments), _settings(recipe))
        report = compress(made, recipe, batches)
        if is_main_process():
            _write(made, found, target, report)
        barrier()
    if is_main_process():
        shutil.rmtree(dense, ignore_errors=True)
    return load(last_checkpoint(target.parent))


def _train_dense(folder: Path, step: int, model, trainer) -> TrainingArguments:
    """Up to ``step``; with which arguments."""
    made, known = trainer(model(), folder), last_checkpoint(folder)
    made.callback_handler.callbacks.insert(0, StopAtStep(step))  # before what looks at the loss of what is saved
    if known is None or step_of(known) < step:
        with disk_full_errors(folder):
            made.train(resume_from_checkpoint=None if known is None else str(known))
    barrier()  # until the checkpoint is whole
    made.accelerator.free_memory()
    return made.args


def _settings(recipe: Recipe) -> Calibrate:
    """Those of the step that reads the most."""
    given = [step.calibrate for step in recipe.stage_recipes() if step.calibrate]
    return max(given, key=lambda one: one.samples, default=Calibrate())


def _batches(windows: PackedDataset, seen: int, settings: Calibrate) -> list[dict[str, Tensor]]:
    chosen = torch.linspace(0, seen - 1, min(settings.samples, seen)).round().long().tolist()
    ids = torch.stack([windows.ids(k) for k in chosen])[:, : settings.window]
    parts = ids.split(max(1, AT_ONCE // ids.shape[1]))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]


def _write(model, dense: Path, target: Path, report: dict[str, Any]) -> None:
    """A checkpoint that Trainer goes on from: the folded model, and how far the dense one was."""
    new = target.with_name("folded.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with disk_full_errors(new):
        model.save_pretrained(new)
        for file in dense.glob(KEPT):
            shutil.copy(file, new / file.name)
        state = json.loads((dense / STATE).read_text())
        none = {"best_metric": None, "best_model_checkpoint": None, "best_global_step": None}
        write_json(new / FOLDED, report)
        write_json(new / STATE, state | none)
    new.rename(target)


def go_on_with(scheduler, step: int, rates: list[float]) -> None:
    """Put a new optimizer of learning ``rates`` where its schedule is at ``step``."""
    if not hasattr(scheduler, "lr_lambdas"):  # it goes by losses, not by steps
        return
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    parts = [part(step) for part in scheduler.lr_lambdas]
    for group, rate, part in zip(scheduler.optimizer.param_groups, rates, parts, strict=True):
        group["lr"] = part * rate
    scheduler._last_lr = [part * rate for rate, part in zip(rates, parts, strict=True)]
