"""Pre-training on transformers.Trainer: a dense or structured model from a configuration, or a trained one."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import default_data_collator

from tenfold.evaluation.text_files import list_files
from tenfold.models.atomic_io import atomic_directory
from tenfold.models.config import Train
from tenfold.models.distillation_config import Heal
from tenfold.models.distributed import process_state
from tenfold.models.loading import silent
from tenfold.models.output_folder import claim_output
from tenfold.models.precision import in_bfloat16, saved_dtype
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.train.checkpoints import is_compressed_here, last_checkpoint, step_of
from tenfold.train.compress_midway import compress_midway
from tenfold.train.distillation import Distillation
from tenfold.train.fsdp import full_state_dict
from tenfold.train.losses import IGNORED
from tenfold.train.model_factory import new_model, vocabulary_size, window_length
from tenfold.train.optimizer import optimizer_for
from tenfold.train.recipe_checks import check_recipe_keys, check_teacher_named
from tenfold.train.run_manifest import FILE, check_inputs_outside, check_recipe, check_sources, delete_run, versions
from tenfold.train.self_guided import SelfGuidance, without_guides
from tenfold.train.teacher import check_teacher, check_vocabulary, load_teacher
from tenfold.train.token_dataset import load_tokens
from tenfold.train.trainer import (
    Advance,
    DivergenceGuardTrainer,
    PackedDataset,
    split_step,
    training_arguments,
    unwrap_model,
)

LOSSES = {"cross_entropy": 0.5, "kl": 0.5}  # with a teacher


def pretrain(
    recipe: Recipe | str | dict,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    dtype: torch.dtype | str = "float16",
    advance: Advance | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the recipe's model on ``data`` and write a Hugging Face folder; rerun an interrupted call to resume it.

    The recipe has ``model`` (a ``model_type`` and arguments of its configuration, or ``from``, the folder or name of a trained
    model), ``tokenizer`` (``vocab_size`` of a byte-level BPE trained on the first ``documents``, or the name of one), ``train``
    (see ``tenfold.models.recipe.Train``), and may have ``replace``: then the model is structured from the start.

    The folder has ``run.json`` (recipe, text and versions), ``tokens`` (the tokenized text, which other runs may use as data),
    ``log.jsonl`` (a line every few steps) and ``checkpoints``, each a Hugging Face folder, the last one and the best one.

    Args:
        data: files of text, or one folder of tokens: ``tokens`` of another run.
        dtype: of the written model.
        advance: called as ``advance(step, steps, tokens_per_second)``.
        device: ``cpu`` disables accelerators.
        overwrite: delete another run in ``output`` first.

    Returns:
        The contents of ``training.json``: the recipe, the loss curve, the time, the versions.

    Raises:
        ValueError: the folder is another run's, the recipe is not valid, the text has too few tokens, loss or weights are not
            finite, or the loss diverges.
        OSError: there is no room on the disk; the same call resumes from the last complete checkpoint.
    """
    recipe, data = load_recipe(recipe), list_files(data)
    if recipe.model is None or recipe.train is None:
        raise ValueError(f"recipe {recipe.name!r} has no model or no train section, which pre-training needs")
    check_recipe_keys(recipe)
    check_teacher_named(recipe)
    dtype = saved_dtype(dtype)
    check_inputs_outside(Path(output), recipe)
    with claim_output(output) as folder:
        return _pretrain(recipe, data, folder, dtype, advance, device, overwrite)


def _pretrain(recipe: Any, data: Sequence[str | Path], folder: Path, dtype, advance, device, overwrite: bool) -> dict:
    settings, length = recipe.train, window_length(recipe)
    with process_state().main_process_first():
        if overwrite and process_state().is_main_process:
            delete_run(folder, data)
        check_recipe(folder, recipe, data)
        tokens, tokenizer = load_tokens(folder, data, recipe)
        if process_state().is_main_process:
            tokens.check(len(tokenizer))
        check_sources(folder, tokens.manifest, {"teacher": settings.teacher, "model": recipe.origin})
    masked = (tokenizer, settings.mlm_probability) if settings.objective == "masked" else None
    end = len(tokens.ids) - _held_out_tokens(len(tokens.ids), length, settings.eval_tokens)
    held_out = PackedDataset(tokens.ids[end:], length, masked=masked) if settings.eval_tokens else None
    windows = PackedDataset(tokens.ids[:end], length, settings.seed, masked)
    size = settings.batch_size * settings.gradient_accumulation_steps
    steps = len(windows) // size
    if not steps:
        raise ValueError(
            f"the text has {len(windows)} windows, fewer than the {size} of a step; give more text or a smaller batch"
        )
    teacher = _load_teacher(recipe, tokenizer)
    torch.manual_seed(settings.seed)

    def make_trainer(model, checkpoints: Path) -> _Pretrainer:
        arguments = _arguments(checkpoints, settings, steps, device)
        if teacher is not None:
            check_teacher(model, teacher, ())
            losses, temperature = settings.losses or LOSSES, settings.temperature
            distilled = Heal.model_validate({"losses": losses, "temperature": temperature, "compile": settings.compile})
            # hides the method of the class
            model.forward = Distillation(model, teacher.to(arguments.device), distilled)
        return _Pretrainer(
            model=model,
            args=arguments,
            train_dataset=windows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            recipe=recipe,
            log=folder / "log.jsonl",
            advance=advance,
            tokens_per_step=size * length,
        )

    begun, compress_step = time.perf_counter(), round(settings.compress_at * steps)
    if settings.compress_at and not compress_step:
        raise ValueError(
            f"train.compress_at {settings.compress_at:g} of {steps} steps is none; give more of them, or a larger share"
        )
    with silent():
        if compress_step:
            model = compress_midway(folder, compress_step, recipe, windows, tokenizer, make_trainer)
        else:
            model = new_model(recipe, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    guidance = [SelfGuidance(model, settings.self_guided_fraction)] if settings.self_guided_fraction else []
    trainer = make_trainer(model, folder / "checkpoints")
    trainer.first_step = compress_step
    for callback in guidance:
        trainer.add_callback(callback)
    trainer.train(last_checkpoint(folder / "checkpoints"))
    report = {
        "recipe": recipe.model_dump(exclude_defaults=True),
        "tokens": steps * size * length,
        "parameters": parameters,
        "precision": "bfloat16" if trainer.args.bf16 else "float32",
        "seconds_of_last_run": round(time.perf_counter() - begun, 1),
        "curve": trainer.curve(),
        "held_out": trainer.curve("eval_loss"),
        "versions": versions(),
    }
    _save(trainer, folder, dtype, tokenizer, report)
    return report


def _held_out_tokens(total: int, length: int, wanted: int) -> int:
    """Return the tokens of the whole windows at the end that are for evaluation."""
    size = wanted // length * length
    if wanted and (size >= total - length or not size):
        raise ValueError(f"eval_tokens {wanted} leaves no text to train on, or no window: there are {total} tokens")
    return size


def _load_teacher(recipe: Any, tokenizer) -> Any:
    name = recipe.training.teacher
    if name is None:
        return None
    teacher = load_teacher(name, torch.device("cpu")).requires_grad_(False)
    check_vocabulary(teacher, name, tokenizer)
    size, own = teacher.config.get_text_config().vocab_size, vocabulary_size(recipe, tokenizer)
    if own != size:
        way_out = "a teacher of its size" if recipe.origin else "the teacher's own tokens as data (--data DIR/tokens)"
        raise ValueError(f"teacher {name} predicts {size:,} tokens and the model {own:,}; take {way_out}")
    return teacher


def _arguments(checkpoints: Path, settings: Train, steps: int, device: str | None):
    batch, accumulate = split_step(settings.batch_size, settings.gradient_accumulation_steps)
    return training_arguments(
        checkpoints,
        settings.learning_rate,
        batch,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        bf16=in_bfloat16(settings.precision, device),
        torch_compile=settings.compile and settings.teacher is None,  # with a teacher, Distillation compiles
        activation_checkpointing=settings.gradient_checkpointing,
        max_steps=steps,
        logging_steps=max(1, min(50, steps // 10)),
        save_steps=settings.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if settings.eval_tokens else "no",
        eval_steps=settings.save_steps,
        per_device_eval_batch_size=batch,
        metric_for_best_model="eval_loss" if settings.eval_tokens else None,
        train_sampling_strategy="sequential",  # windows are shuffled already, alike for any number of processes
        seed=settings.seed,
        use_cpu=device == "cpu" or not torch.accelerator.is_available(),
    )


class _Pretrainer(DivergenceGuardTrainer):
    """Trainer whose losses are means over the tokens of a step, however many batches and processes it is split into.

    Whole windows have equally many next tokens, so that a mean over batches is that, and the router loss of a mixture of experts
    counts once. The number of masked tokens differs between batches.
    """

    def __init__(self, *args, recipe: Any, **kwargs):
        self.recipe = recipe
        loss = _masked_loss if recipe.training.objective == "masked" else None
        super().__init__(*args, compute_loss_func=loss, compute_metrics=_mean_loss, **kwargs)

    def initial_best(self, loss):
        """Return the loss of a guess at least: a new model is no better, and the first step may have no masked token."""
        if self.recipe.origin and self.recipe.training.objective == "causal":
            return loss
        return max(loss, math.log(self.model.config.get_text_config().vocab_size))

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the sum of the losses of every window, and the number of its tokens, independent of the batches."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            logits, labels = model(**inputs).logits, inputs["labels"]
        if self.recipe.training.objective == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        return None, losses.sum(-1), (labels != IGNORED).sum(-1)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            train = self.recipe.train
            self.optimizer = optimizer_for(
                model or self.model, train.optimizer, train.lr_scaling, train.learning_rate, train.weight_decay
            )
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not is_compressed_here(resume_from_checkpoint):  # otherwise the model was loaded from there
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load the optimizer's state, unless the model was compressed since; the recipe's learning rate is at its old step."""
        scheduler, rates = self.lr_scheduler, self.lr_scheduler.base_lrs
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            set_schedule(scheduler, step_of(checkpoint), rates)


def set_schedule(scheduler: Any, step: int, rates: list[float]) -> None:
    """Set ``scheduler``, a ``LambdaLR``, and its optimizer to where they are at ``step`` for initial learning ``rates``."""
    scheduler.base_lrs, scheduler.last_epoch, scheduler._step_count = rates, step, step + 1
    scheduler._last_lr = [factor(step) * rate for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)]
    for group, rate, now in zip(scheduler.optimizer.param_groups, rates, scheduler._last_lr, strict=True):
        group["initial_lr"], group["lr"] = rate, now


def _masked_loss(outputs, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
    total = cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / num_items_in_batch.clamp_min(1)


def _mean_loss(prediction) -> dict[str, float]:
    """Return the mean loss of all tokens, from the sums and numbers of tokens of the windows."""
    return {"loss": float(prediction.predictions.sum(dtype="float64") / max(1, prediction.label_ids.sum()))}


def _save(trainer, folder: Path, dtype: torch.dtype, tokenizer, report: dict[str, Any]) -> None:
    trainer.accelerator.wait_for_everyone()
    weights = without_guides(full_state_dict(trainer))
    if not trainer.is_world_process_zero():
        return
    weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
    with silent(), atomic_directory(folder) as new:
        unwrap_model(trainer).to(dtype).save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)
        shutil.copy(folder / FILE, new)
        (new / "training.json").write_text(json.dumps(report, indent=1))
