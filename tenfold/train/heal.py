"""Healing: a folded model learns the distributions of the model that it came from (distillation)."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from tenfold.evaluate.perplexity import check_tokens
from tenfold.evaluate.text_files import documents, token_stream
from tenfold.models.atomic_io import disk_full_errors
from tenfold.models.distillation_config import Heal
from tenfold.models.loading import silent
from tenfold.models.precision import in_bfloat16
from tenfold.models.text_mode import context_of, is_causal_lm
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.chunked_head import ChunkedHead
from tenfold.train.distillation import Distillation
from tenfold.train.fsdp import UnshardedShell
from tenfold.train.losses import STATES, WITHOUT_TEACHER
from tenfold.train.run_manifest import versions
from tenfold.train.teacher import Teacher, check_teacher, check_vocabulary, eager, load_teacher, weights_digest
from tenfold.train.teacher_cache import DatasetWithTeacher, TeacherCache, is_finished, origin, write_store
from tenfold.train.trainer import (
    DivergenceGuard,
    DivergenceGuardTrainer,
    Log,
    PackedDataset,
    Progress,
    shared_out,
    step_size,
    training_arguments,
    unwrapped,
)

AT_ONCE = 1024  # tokens that a CPU reads at once


def heal(
    model: PreTrainedModel,
    teacher: Teacher | None,
    tokenizer,
    files: Sequence[str | Path],
    settings: Heal | None = None,
    window: int | None = None,
    seed: int = 0,
    advance: Callable[[int, int, float], None] | None = None,
    store: str | Path | None = None,
    top_k: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
    checkpoints: str | Path | None = None,
) -> dict[str, Any]:
    """Train ``model``, in place, to predict what ``teacher`` predicts on ``files``; see :mod:`tenfold.train.losses`.

    A causal model reads windows of one stream of text. A masked language model reads lines, cut to the window and padded, whose
    tokens are masked anew each time; cross entropy is of the masked ones, divergences as ``settings.positions`` says.

    Args:
        teacher: a model, or a folder or name of one; None where the losses ask for none (``cross_entropy``).
        settings: the losses and their weights, steps or epochs, tokens a step, learning rate and schedule.
        window: tokens that the model sees at once; its context, 1,024 at most, unless given.
        advance: is told ``(step, steps, tokens_per_second)``.
        store: a folder for the teacher's ``top_k`` likeliest tokens and their log-probabilities. The first call writes it;
            later ones read it, and load no teacher. Divergences are then over these tokens and one class for the rest.
        progress: wraps the writing of the store.
        checkpoints: a folder to keep some in, and ``log.jsonl``; the same call goes on behind the last whole one.

    Returns:
        ``steps``, ``tokens``, ``seconds``, ``losses`` (their weights), ``seed``, ``versions`` and ``curve`` (step, loss); and
        what makes another healing the same: ``settings``, ``window``, ``teacher``, ``text`` and, with a store, ``top_k``.

    Raises:
        ValueError: teacher and student don't fit together, the store was made from something else, the text is too short,
            the loss is no number or runs away, or the processes can't share a step.
        OSError: there is no room on the disk; with ``checkpoints`` the same call goes on from the last whole one.
    """
    settings = settings or Heal()
    asked = settings.losses.keys() - WITHOUT_TEACHER
    window = _window(model, window)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer to read the text with; copy tokenizer.json there")
    if asked and teacher is None:
        raise ValueError(f"the loss {', '.join(sorted(asked))} needs a teacher: give one, or cross_entropy alone")
    if settings.positions != "all" and is_causal_lm(model):
        raise ValueError(
            f"positions {settings.positions} is of masked language models, and a {type(model).__name__} is causal; leave it out"
        )
    if store is not None and not asked:
        raise ValueError(f"{', '.join(settings.losses)} asks nothing of a teacher: leave the store {store} out")
    if asked:
        check_vocabulary(model, teacher, tokenizer)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as restored:
        kept = None if checkpoints is None else Path(checkpoints)
        arguments = _arguments(kept or Path(folder), settings, window, seed, kept is not None, is_causal_lm(model))
        data, collator = _data(model, tokenizer, files, window, seed)
        tokens = step_size(arguments) * _mean_length(data)
        if settings.warmup < 1:  # Trainer would round up, and the rate of a first step of warming up is 0
            steps = settings.steps or math.ceil((settings.epochs or 1.0) * math.ceil(len(data) / step_size(arguments)))
            arguments.warmup_steps = int(settings.warmup * steps)
        loaded = None
        if asked and store is not None:
            data = _answered(data, model, teacher, tokenizer, settings, Path(store), top_k, arguments, progress)
        elif asked:
            loaded = load_teacher(teacher, arguments.device)
            check_teacher(model, loaded, asked)
        if "attention" in asked:
            restored.enter_context(eager([model, loaded]))
        model.forward = Distillation(model, loaded, settings, is_causal_lm(model))  # hides the method of the class
        for name in ("forward", "_original_forward"):  # the second is what accelerate keeps where it is interrupted
            restored.callback(model.__dict__.pop, name, None)
        report = _train(model, tokenizer, arguments, data, collator, settings, advance, tokens, kept)
    named = str(getattr(teacher, "name_or_path", teacher)) if asked else None
    told = {"settings": settings.model_dump(mode="json"), "window": window, "teacher": named}
    told |= {"text": [str(file) for file in files]} | ({} if store is None else {"top_k": top_k})
    return report | told


def _window(model: PreTrainedModel, window: int | None) -> int:
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"a {type(model).__name__} reads one text and writes another; healing is for models that read one text"
        )
    longest = context_of(model)
    if window is not None and not 2 <= window <= longest:
        raise ValueError(f"window {window} must be from 2 to the model's context of {longest}")
    return window or min(longest, 1024)


def _arguments(folder: Path, settings: Heal, window: int, seed: int, keep: bool, whole: bool) -> TrainingArguments:
    length = {"max_steps": settings.steps} if settings.steps else {"num_train_epochs": settings.epochs or 1.0}
    windows = max(1, settings.tokens_per_step // window)
    batch = min(settings.batch or _at_once(windows, window), windows)
    batch, accumulate = _shared_out(batch, max(1, round(windows / batch)), window, settings)
    return training_arguments(
        folder,
        settings.learning_rate,
        batch,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type=settings.schedule,
        bf16=in_bfloat16(settings.precision),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        activation_checkpointing=settings.checkpointing,
        adam_beta2=0.95,
        save_strategy="steps" if keep else "no",
        save_steps=settings.save_steps,
        remove_unused_columns=False,
        include_num_input_tokens_seen="all" if whole else "non_padding",
        logging_steps=max(1, (settings.steps or 200) // 20),
        seed=seed,
        **length,
    )


def _at_once(windows: int, window: int) -> int:
    """All of a step on an accelerator; a CPU is as fast with ``AT_ONCE`` tokens, whose activations take less memory."""
    if torch.accelerator.is_available():
        return windows
    processes, most = int(os.environ.get("WORLD_SIZE", "1")), max(1, AT_ONCE // window)
    fitting = [n for n in range(1, most + 1) if windows % n == 0 and windows // n % processes == 0]
    return max(fitting, default=windows)


def _shared_out(batch: int, accumulate: int, window: int, settings: Heal) -> tuple[int, int]:
    """What each process gets of a step."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        return shared_out(batch, accumulate, processes)
    except ValueError:
        even = processes * (settings.batch or 1)
        tokens = -(-batch * accumulate // even) * even * window
        raise ValueError(
            f"{processes} processes can't share a step of {batch * accumulate} windows of {window} tokens, {batch} at once; "
            f"give --tokens-per-step {tokens}, or another --batch-size"
        ) from None


def _data(model: PreTrainedModel, tokenizer, files, window: int, seed: int) -> tuple[torch.utils.data.Dataset, Any]:
    """What is trained on, and how a batch is made of it: None as Trainer does."""
    if is_causal_lm(model):
        tokens = token_stream(documents(files, tokenizer), tokenizer)
        check_tokens(tokens, model, window)
        return PackedDataset(tokens, window), None
    lines = [line for text in documents(files, tokenizer) for line in text.splitlines() if line.strip()]
    if not lines or tokenizer.mask_token is None:
        lack = "the tokenizer has no mask token" if lines else "the text is empty"
        raise ValueError(f"a {type(model).__name__} learns from masked text, but {lack}; give another")
    cut = tokenizer(lines, truncation=True, max_length=window, return_overflowing_tokens=True)
    rows = [{"input_ids": ids} for ids in cut["input_ids"]]
    return rows, DataCollatorForLanguageModeling(tokenizer, seed=seed)


def _mean_length(data) -> float:
    return data.length if isinstance(data, PackedDataset) else sum(len(row["input_ids"]) for row in data) / len(data)


def _answered(data, model, teacher, tokenizer, settings, folder, top_k, arguments, progress) -> DatasetWithTeacher:
    """``data`` with the teacher's answers, which are computed where they are not there yet."""
    if inside := sorted(settings.losses.keys() & STATES.keys()):
        raise ValueError(
            f"a store holds what the teacher predicts and nothing from inside it, which {', '.join(inside)} compare: leave "
            "the store out, or these losses"
        )
    if not is_causal_lm(model):
        raise ValueError(
            "a masked language model's inputs are masked anew each time, so that no answer can be stored: leave the store out"
        )
    vocabulary = model.config.get_text_config().vocab_size
    made_from = origin(
        weights_digest(teacher), tokenizer, data.tokens, data.length, settings.temperature, top_k, vocabulary
    )
    with arguments.main_process_first(local=False, desc="the teacher's answers"):
        if not is_finished(folder, made_from):
            loaded = load_teacher(teacher, arguments.device)
            check_teacher(model, loaded, ())
            batch = arguments.per_device_train_batch_size
            with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
                write_store(folder, made_from, ChunkedHead(loaded), data, batch, settings.chunk, progress)
    return DatasetWithTeacher(data, TeacherCache(folder))


def _train(
    model, tokenizer, arguments, data, collator, settings: Heal, advance, tokens: float, kept: Path | None
) -> dict[str, Any]:
    told = {"train_dataset": _in_whole_steps(data, arguments), "data_collator": collator, "tokenizer": tokenizer}
    trainer = _Healer(model=model, args=arguments, **told)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(DivergenceGuard(trainer))
    if advance is not None:
        trainer.add_callback(Progress(advance, tokens))
    if kept is not None:
        trainer.add_callback(Log(kept / "log.jsonl", tokens))
    whole = UnshardedShell(model) if trainer.is_fsdp_enabled else None
    begun, last = time.perf_counter(), kept and last_checkpoint(kept)
    with silent(), disk_full_errors(arguments.output_dir):
        trainer.train(resume_from_checkpoint=last and str(last))
    if whole is not None:
        whole.fill()
    model = unwrapped(trainer).eval()
    steps = trainer.state.global_step
    if not all(bool(value.isfinite().all()) for value in model.parameters()):
        raise ValueError(f"the weights are not finite after step {steps}; lower the learning rate")
    return {
        "steps": steps,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": round(time.perf_counter() - begun, 1),
        "losses": dict(settings.losses),
        "seed": arguments.seed,
        "versions": versions(),
        "curve": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
    }


def _in_whole_steps(data, arguments: TrainingArguments):
    """``data`` whose first windows come once more where they fill up the last step of a pass: with any number of processes alike.

    By itself accelerate fills up what several processes share out, and one process would have a smaller step.
    """
    size = step_size(arguments)
    if 0 < arguments.max_steps * size <= len(data):  # no step of the run is an incomplete one
        return data
    return torch.utils.data.Subset(data, [k % len(data) for k in range(-(-len(data) // size) * size)])


class _Healer(DivergenceGuardTrainer):
    """Trainer of a model whose ``forward`` is its loss."""

    def __init__(self, *args, tokenizer, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.tokenizer = tokenizer  # Trainer's own would be let into the model's configuration, which is the student's

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.tokenizer.save_pretrained(output_dir or self.args.output_dir)

    def _where(self, step):
        windows, size = step_size(self.args), len(self.train_dataset)
        done, step = divmod(step, -(-size // windows))
        return (
            f"windows {step * windows} to {min(size, (step + 1) * windows)} of pass {done + 1} over the text, in the order of "
            f"seed {self.args.seed}"
        )
