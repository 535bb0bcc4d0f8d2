"""Compression midway: train dense for a part of the steps, compress as the recipe says, and train on.

A matrix that is far from trained loses much of itself at little cost, and training recovers it; a structured model that starts
from random factors has to find everything by them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tenfold.compression.calibration import Calibration
from tenfold.compression.compress import compress
from tenfold.models.atomic_io import disk_full_errors, read_json, write_json
from tenfold.models.config import Calibrate
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.loading import from_pretrained
from tenfold.models.plan import check_rules, make_plan
from tenfold.models.recipe import Recipe
from tenfold.train.checkpoints import COMPRESSED, STATE, check_hashes, last_checkpoint, step_of, write_hashes
from tenfold.train.model_factory import AUTO_CLASSES, new_empty_model, new_model
from tenfold.train.trainer import DivergenceGuardTrainer, PackedDataset, step_size

BATCH_TOKENS = 1024  # tokens in a batch of calibration
RNG_STATES = "rng_state*.pth"  # of the last dense checkpoint; its optimizer state belongs to other parameters


def compress_midway(
    folder: Path,
    step: int,
    recipe: Recipe,
    windows: PackedDataset,
    tokenizer,
    make_trainer: Callable[[Any, Path], DivergenceGuardTrainer],
):
    """Return the model at ``step``, compressed; training resumes from the checkpoint in ``folder / "checkpoints"``.

    Dense checkpoints are in ``folder / "dense"``, and are deleted once the compressed one is written.

    Args:
        windows: the training data; windows evenly spread over those of the dense part are the calibration text.
        make_trainer: ``make_trainer(model, folder of its checkpoints)``.
    """
    dense, target = folder / "dense", folder / "checkpoints" / f"checkpoint-{step}"
    plain = recipe.model_copy(update={"replace": [], "stages": []})
    check_rules(recipe)
    if not recipe.stages and recipe.calibrate is None:  # what can't be compressed is refused before anything is trained
        make_plan(new_empty_model(plain, tokenizer), recipe)
    if last_checkpoint(target.parent) is None:
        arguments = _train_dense(make_trainer(new_model(plain, tokenizer), dense), step)
        loaded: Any = _load(last_checkpoint(dense), recipe)
        model, report = loaded.to(arguments.device), {}
        text = _calibration(windows, step * step_size(arguments), recipe)
        for stage in recipe.stage_recipes():
            report = compress(model, stage, text=stage.calibrate and text)[1]
        if is_main_process():
            _write_checkpoint(model, last_checkpoint(dense), target, report)
        barrier()
    if is_main_process():
        shutil.rmtree(dense, ignore_errors=True)
    return _load(last_checkpoint(target.parent), recipe)


def _load(checkpoint: Any, recipe: Any):
    check_hashes(checkpoint)
    attention = recipe.model.get("attn_implementation")
    given = {"dtype": torch.float32, "attn_implementation": attention}
    return from_pretrained(checkpoint, AUTO_CLASSES[recipe.training.objective], **given)


def _train_dense(trainer: DivergenceGuardTrainer, step: int) -> TrainingArguments:
    known, trainer.last_step = last_checkpoint(Path(str(trainer.args.output_dir))), step
    if known is None or step_of(known) < step:
        trainer.train(known)
    barrier()  # until the checkpoint is complete
    trainer.accelerator.free_memory()
    return trainer.args


def _calibration(windows: PackedDataset, seen: int, recipe: Recipe) -> Calibration:
    """Return windows out of the ``seen`` first ones, as many and as long as the stage that reads most asks for."""
    settings = [stage.calibrate for stage in recipe.stage_recipes() if stage.calibrate]
    largest = max(settings, key=lambda one: one.num_samples, default=Calibrate.model_validate({}))
    chosen = torch.linspace(0, seen - 1, min(largest.num_samples, seen)).round().long().tolist()
    ids = torch.stack([windows.ids(k) for k in chosen])[:, : largest.window]
    parts = ids.split(max(1, BATCH_TOKENS // ids.shape[1]))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]
    return Calibration(batches, {"files": ["the run's own"], "samples": len(ids), "window": ids.shape[1]})


def _write_checkpoint(model, dense: Any, target: Path, report: dict[str, Any]) -> None:
    """Write a checkpoint that Trainer resumes from: the compressed model at the step of the dense one."""
    new = target.with_name("compressed.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    best = {"best_metric": None, "best_model_checkpoint": None, "best_global_step": None}
    with disk_full_errors(new):
        model.save_pretrained(new)
        for file in dense.glob(RNG_STATES):
            shutil.copy(file, new)
        write_json(new / COMPRESSED, report)
        write_hashes(new)
        write_json(new / STATE, read_json(dense / STATE) | best)
    new.rename(target)
