"""Pre-training: a model from a configuration, dense or structured from noise, or a trained one, on transformers.Trainer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import default_data_collator
from transformers.trainer_callback import PrinterCallback

from tenfold.models.atomic_io import atomic_directory, disk_full_errors
from tenfold.models.config import Train
from tenfold.models.distributed import process_state
from tenfold.models.loading import silent
from tenfold.models.plan import check_rules, make_plan
from tenfold.models.precision import check_saved_dtype, in_bfloat16
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.train.checkpoints import is_folded, last_checkpoint, step_of
from tenfold.train.compress_midway import Compress, fold_midway, go_on_with
from tenfold.train.fsdp import whole_state
from tenfold.train.losses import IGNORED
from tenfold.train.model_factory import KINDS, length_of, new_model, outline, pad_as
from tenfold.train.optimizer import optimizer_for
from tenfold.train.pretrain_distillation import DistilledForward, check_named, teacher_of
from tenfold.train.recipe_checks import check_wanted
from tenfold.train.run_manifest import check_apart, forget, same_recipe, same_sources, versions
from tenfold.train.self_guided import Guided
from tenfold.train.token_dataset import tokens_of
from tenfold.train.tokens import Tokens
from tenfold.train.trainer import (
    DivergenceGuard,
    DivergenceGuardTrainer,
    Log,
    PackedDataset,
    Progress,
    shared_out,
    training_arguments,
    unwrapped,
)


def pretrain(
    recipe: Recipe | str | dict,
    data: Sequence[str | Path],
    output: str | Path,
    dtype: torch.dtype = torch.float16,
    advance: Callable[[int, int, float], None] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    compress: Compress | None = None,
) -> dict[str, Any]:
    """Train the recipe's model on ``data`` and write a Hugging Face folder; an interrupted run resumes, and repeats no data.

    The recipe has ``model`` (a ``model_type`` and arguments of its configuration, or ``from``, the folder or the name of a model
    that is trained on), ``tokenizer`` (``vocab_size`` of a byte-level BPE that is trained on the first ``documents``, or where to
    take it from), ``train`` (see :class:`tenfold.models.recipe.Train`), and may have ``replace``: then the model is folded from
    noise before it is trained.

    The folder has ``run.json`` (recipe, text and versions), ``tokens`` (the text as numbers, which other runs may take as their
    data), ``log.jsonl`` (a line every few steps) and ``checkpoints``, each a Hugging Face folder, the last one and the best one.

    Args:
        data: files of text, or one folder of tokens: ``tokens`` of another run.
        dtype: in which the result is written.
        advance: called as ``advance(step, steps, tokens_per_second)``.
        device: ``cpu`` keeps an accelerator out of it.
        overwrite: delete what another run has left in ``output``, and begin anew.
        compress: folds the model midway, where the recipe wants that (``train.fold``); :func:`tenfold.pretrain` gives it.

    Returns:
        What ``training.json`` in the folder holds: the recipe, the loss curve, the time, the versions.

    Raises:
        ValueError: the folder is another run's, the recipe can't be, the text has too few tokens, the loss or a weight is no
            number, or the loss runs away.
        OSError: there is no room on the disk; the same call goes on from the last whole checkpoint.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if recipe.model is None or recipe.train is None:
        raise ValueError(f"recipe {recipe.name!r} has no model or no train section, which pre-training needs")
    check_wanted(recipe)
    check_named(recipe)
    check_saved_dtype(dtype)
    check_apart(Path(output), recipe)
    folder, settings, length = Path(output), recipe.train, length_of(recipe)
    with process_state().main_process_first():
        if overwrite and process_state().is_main_process:
            forget(folder, data)
        same_recipe(folder, recipe, data)
        tokens = tokens_of(folder, data, recipe)
        tokenizer = tokens.tokenizer()
        if process_state().is_main_process:
            tokens.check(len(tokenizer))
        same_sources(folder, tokens, {"teacher": recipe.train.teacher, "model": recipe.origin})
    pad_as(recipe, tokenizer)
    masked = (tokenizer, settings.hide) if settings.objective == "masked" else None
    if masked and tokenizer.mask_token is None:
        raise ValueError(
            f"the tokenizer of {tokens.folder} has no mask token, which the objective masked needs; give text"
        )
    train, rest = _split(tokens, length, settings.held_out)
    held = PackedDataset(rest, length, masked=masked) if len(rest) else None
    windows = PackedDataset(train, length, settings.seed, masked)
    steps, teacher = _steps(windows, settings), teacher_of(recipe, tokenizer)
    torch.manual_seed(settings.seed)

    def trainer_of(model, checkpoints: Path) -> _Pretrainer:
        if teacher is not None:
            model.forward = DistilledForward(model, teacher, settings)  # hides the method of the class
        return _trainer(model, checkpoints, recipe, windows, held, tokenizer, steps, device, folder, advance)

    begun, stop = time.perf_counter(), round(settings.fold * steps)
    if settings.fold and not stop:
        raise ValueError(f"train.fold {settings.fold:g} of {steps} steps is none; give more of them, or a larger share")
    with silent():
        if stop:
            model = _folded_midway(folder, stop, recipe, windows, tokenizer, trainer_of, compress)
        else:
            model = new_model(recipe, tokenizer)
    size = sum(p.numel() for p in model.parameters())
    guided = Guided(model, settings.guide) if settings.guide else None
    trainer = trainer_of(model, folder / "checkpoints")
    trainer.since = stop
    if guided is not None:
        trainer.add_callback(guided)
    with silent(), disk_full_errors(folder / "checkpoints"):
        trainer.train(resume_from_checkpoint=_resumed(folder))
    report = {
        "recipe": recipe.model_dump(exclude_defaults=True),
        "tokens": steps * settings.batch * settings.accumulate * length,
        "parameters": size,
        "precision": "bfloat16" if trainer.args.bf16 else "float32",
        "seconds_of_last_run": round(time.perf_counter() - begun, 1),
        "curve": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
        "held_out": [[row["step"], row["eval_loss"]] for row in trainer.state.log_history if "eval_loss" in row],
        "versions": versions(),
    }
    _finish(trainer, folder, dtype, tokenizer, report, guided)
    return report


def _folded_midway(folder: Path, step: int, recipe: Recipe, windows, tokenizer, trainer_of, compress):
    if compress is None:
        raise ValueError("a recipe with train.fold is carried out by tenfold.pretrain, which knows how to fold a model")

    def load(checkpoint: Path):
        kind = KINDS[recipe.train.objective]
        return kind.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=recipe.model.get("attn_implementation")
        )

    check_rules(recipe)
    plain = recipe.model_copy(update={"replace": [], "stages": []})
    if not recipe.stages and recipe.calibrate is None:  # what can't be folded is told before anything is trained
        make_plan(outline(plain, tokenizer), recipe)
    model = partial(new_model, plain, tokenizer)
    return fold_midway(folder, step, recipe, windows, model, trainer_of, load, compress)


def _trainer(model, checkpoints: Path, recipe: Recipe, windows, held, tokenizer, steps: int, device, folder, advance):
    settings = recipe.train
    batch, accumulate = shared_out(settings.batch, settings.accumulate)
    arguments = training_arguments(
        checkpoints,
        settings.learning_rate,
        batch,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        bf16=in_bfloat16(settings.precision, device),
        torch_compile=settings.compile and settings.teacher is None,  # else Taught sees to it
        activation_checkpointing=settings.checkpointing,
        max_steps=steps,
        logging_steps=max(1, min(50, steps // 10)),
        save_steps=settings.save_steps,
        save_total_limit=2,
        train_sampling_strategy="sequential",  # windows are in their order already, which no number of processes changes
        seed=settings.seed,
        **({"use_cpu": True} if device == "cpu" else {}),
        **_evaluation(held, settings, batch),
    )
    trainer = _Pretrainer(
        model=model,
        args=arguments,
        train_dataset=windows,
        eval_dataset=held,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        recipe=recipe,
    )
    _watch(trainer, folder, settings.batch * settings.accumulate * windows.length, advance)
    return trainer


def _steps(windows: PackedDataset, settings: Train) -> int:
    each = settings.batch * settings.accumulate
    if len(windows) < each:
        raise ValueError(
            f"the text has {len(windows)} windows, fewer than the {each} of a step; give more text or a smaller batch"
        )
    return len(windows) // each


class _Pretrainer(DivergenceGuardTrainer):
    """Losses are means over the tokens of a step, however many batches and processes it is made of.

    Whole windows have equally many next tokens, so that the mean of the batches' losses is that, and what a mixture of experts
    adds to them counts once. Of hidden tokens there are more in one batch than in another.
    """

    def __init__(self, *args, recipe: Recipe, **kwargs):
        self.recipe = recipe
        masked = recipe.train.objective == "masked"
        told = {"compute_loss_func": _hidden_tokens if masked else None, "compute_metrics": _mean}
        super().__init__(*args, **told, **kwargs)
        self.model_accepts_loss_kwargs = (
            False  # some that take them leave them aside, in a part of the loss or the whole
        )

    def at_first(self, loss):
        """A new model is no better than a guess; of hidden tokens there may be none in the first step."""
        if self.recipe.origin and self.recipe.train.objective == "causal":
            return loss
        return max(loss, math.log(self.model.config.get_text_config().vocab_size))

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Of every window that is held out the sum of its tokens' losses, and how many these are: in whichever batch it is."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            logits, labels = model(**inputs).logits, inputs["labels"]
        if self.recipe.train.objective == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        return None, losses.sum(-1), (labels != IGNORED).sum(-1)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            train = self.recipe.train
            self.optimizer = optimizer_for(
                model or self.model, train.optimizer, train.rates, train.learning_rate, train.weight_decay
            )
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not is_folded(resume_from_checkpoint):  # else the model came from there
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The learning rate is the recipe's, not the checkpoint's, whose place on the schedule stays."""
        rates = [
            group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups
        ]  # not all schedules keep it
        if checkpoint and is_folded(checkpoint):
            go_on_with(self.lr_scheduler, step_of(checkpoint), rates)
            return
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"], group["initial_lr"] = group["lr"] * (rate / group.get("initial_lr", rate)), rate
        self.lr_scheduler.base_lrs = rates
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged


def _hidden_tokens(outputs, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
    total = cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / num_items_in_batch.clamp_min(1)


def _mean(told) -> dict[str, float]:
    """The mean loss of all tokens, by the sums of windows and how many tokens these are of."""
    return {"loss": float(told.predictions.sum(dtype="float64") / max(1, told.label_ids.sum()))}


def _watch(trainer: DivergenceGuardTrainer, folder: Path, tokens_a_step: int, advance) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(DivergenceGuard(trainer))
    trainer.add_callback(Log(folder / "log.jsonl", tokens_a_step))
    if advance is not None:
        trainer.add_callback(Progress(advance, tokens_a_step))


def _evaluation(held, settings, batch: int) -> dict[str, Any]:
    if held is None:
        return {}
    return {
        "eval_strategy": "steps",
        "eval_steps": settings.save_steps,
        "per_device_eval_batch_size": batch,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }


def _split(tokens: Tokens, length: int, held_out: int) -> tuple[Any, Any]:
    """The tokens to train on, and the last ones, to look at the loss on."""
    if not held_out:
        return tokens, ()
    held = held_out // length * length
    if held >= len(tokens) - length or not held:
        raise ValueError(
            f"held_out {held_out} leaves no text to train on, or no window: there are {len(tokens)} tokens"
        )
    rest = Tokens(tokens.folder, len(tokens) - held)
    return rest, tokens[len(tokens) - held :]


def _finish(trainer, folder: Path, dtype: torch.dtype, tokenizer, report: dict[str, Any], guided) -> None:
    trainer.accelerator.wait_for_everyone()
    state = whole_state(trainer)
    if not trainer.is_world_process_zero():
        return
    model = unwrapped(trainer)
    state = {key: _as(value, dtype) for key, value in state.items()}
    if guided is not None:
        guided.remove()
        state = {key: value for key, value in state.items() if key in model.state_dict()}
    with silent(), atomic_directory(folder) as new:
        model.to(dtype).save_pretrained(new, state_dict=state)
        tokenizer.save_pretrained(new)
        (new / "training.json").write_text(json.dumps(report, indent=1))


def _as(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value  # not index maps


def _resumed(folder: Path) -> str | None:
    kept = last_checkpoint(folder / "checkpoints")
    return None if kept is None else str(kept)
