"""Healing: train a compressed model to predict the distributions of the model that it came from (distillation)."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, TrainingArguments

from tenfold.evaluation.perplexity import check_tokens
from tenfold.evaluation.text_files import documents, list_files, token_stream
from tenfold.models.distillation_config import Heal
from tenfold.models.precision import in_bfloat16
from tenfold.models.text_mode import context_of, is_causal_lm
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.chunked_head import ChunkedHead
from tenfold.train.distillation import Distillation
from tenfold.train.losses import CROSS_ENTROPY, STATES
from tenfold.train.run_manifest import versions
from tenfold.train.teacher import (
    Teacher,
    check_teacher,
    check_vocabulary,
    eager_attention,
    load_teacher,
    weights_digest,
)
from tenfold.train.teacher_cache import TeacherCache, make_manifest
from tenfold.train.trainer import (
    Advance,
    DivergenceGuardTrainer,
    PackedDataset,
    processes_started,
    split_step,
    step_size,
    training_arguments,
)

BATCH_TOKENS = 1024  # tokens in a batch on a CPU


def heal(
    model: PreTrainedModel,
    teacher: Teacher | None,
    tokenizer,
    files: str | Path | Sequence[str | Path],
    settings: Heal | None = None,
    window: int | None = None,
    seed: int = 0,
    advance: Advance | None = None,
    store: str | Path | None = None,
    top_k: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
    checkpoints: str | Path | None = None,
) -> dict[str, Any]:
    """Train ``model``, in place, to predict what ``teacher`` predicts on ``files``; see ``tenfold.train.losses``.

    A causal model reads windows of the concatenated text. A masked language model reads lines, truncated and padded, with a new
    mask each time; cross entropy is of the masked tokens, divergences as ``settings.positions`` says.

    Args:
        teacher: a model, or the folder or name of one; None if the losses need none (``cross_entropy``).
        settings: the losses and their weights, steps or epochs, tokens per step, learning rate and schedule.
        window: tokens in a sequence; the model's context, 1,024 at most, unless given.
        advance: called as ``advance(step, steps, tokens_per_second)``.
        store: a folder to cache the teacher's ``top_k`` likeliest tokens and their log-probabilities in. The first call writes
            it; later ones read it and load no teacher. Divergences are then over these tokens and one class for all others.
        progress: wraps the batches for the cache.
        checkpoints: a folder for checkpoints and ``log.jsonl``; the same call resumes from the last complete checkpoint.

    Returns:
        ``steps``, ``tokens``, ``seconds``, ``losses`` (their weights), ``seed``, ``versions`` and ``curve`` (step, loss); and
        what is needed to repeat it: ``settings``, ``window``, ``teacher``, ``text`` and, with a cache, ``top_k``.

    Raises:
        ValueError: teacher and student don't fit together, the cache was made from something else, the text is too short, loss
            or weights are not finite, the loss diverges, or the processes can't share a step.
        OSError: there is no room on the disk.
    """
    settings, files = settings or Heal.model_validate({}), list_files(files)
    guided, causal = settings.losses.keys() - {CROSS_ENTROPY}, is_causal_lm(model)
    window = window or min(context_of(model), 1024)
    _check(model, teacher, tokenizer, settings, window, store)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as cleanup:
        folder = None if checkpoints is None else Path(checkpoints)
        arguments = _arguments(folder or Path(temporary), settings, window, seed, folder is not None, causal)
        data, collator = _read_data(model, tokenizer, files, window, seed)
        size = step_size(arguments)
        if settings.warmup < 1:  # Trainer rounds up, and the learning rate of a first step of warm-up is 0
            steps = settings.steps or math.ceil((settings.epochs or 1.0) * math.ceil(len(data) / size))
            arguments.warmup_steps = int(settings.warmup * steps)
        length = window if causal else sum(len(row["input_ids"]) for row in data) / len(data)
        loaded: Any = None
        if guided and store is not None:
            data = _add_predictions(data, model, teacher, tokenizer, settings, Path(store), top_k, arguments, progress)
        elif guided:
            loaded = load_teacher(teacher, arguments.device)
            check_teacher(model, loaded, guided)
        if "attention" in guided:
            cleanup.enter_context(eager_attention([model, loaded]))
        model.forward = Distillation(model, loaded, settings, causal)  # hides the method of the class
        for name in ("forward", "_original_forward"):  # accelerate leaves the second one if it is interrupted
            cleanup.callback(model.__dict__.pop, name, None)
        trainer = _Healer(
            model=model,
            args=arguments,
            train_dataset=_fill_last_step(data, arguments.max_steps, size),
            data_collator=collator,
            tokenizer=tokenizer,
            log=folder and folder / "log.jsonl",
            advance=advance,
            tokens_per_step=size * length,
        )
        begun = time.perf_counter()
        trainer.train_and_unwrap(folder and last_checkpoint(folder))
    report = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": round(time.perf_counter() - begun, 1),
        "losses": dict(settings.losses),
        "seed": seed,
        "versions": versions(),
        "curve": trainer.curve(),
        "settings": settings.model_dump(mode="json"),
        "window": window,
        "teacher": str(getattr(teacher, "name_or_path", teacher)) if guided else None,
        "text": [str(file) for file in files],
    }
    return report | ({} if store is None else {"top_k": top_k})


def _check(model: PreTrainedModel, teacher: Teacher | None, tokenizer, settings: Heal, window: int, store) -> None:
    guided, kind = settings.losses.keys() - {CROSS_ENTROPY}, type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"a {kind} reads one text and writes another; healing is for models that read one text")
    if not 2 <= window <= context_of(model):
        raise ValueError(f"window {window} must be from 2 to the model's context of {context_of(model)}")
    if tokenizer is None:
        raise ValueError("the model has no tokenizer to read the text with; copy tokenizer.json there")
    if guided and teacher is None:
        raise ValueError(f"the loss {', '.join(sorted(guided))} needs a teacher: give one, or cross_entropy alone")
    if settings.positions != "all" and is_causal_lm(model):
        raise ValueError(
            f"positions {settings.positions} is for masked language models, and a {kind} is causal; leave it out"
        )
    if guided and teacher is not None:
        check_vocabulary(model, teacher, tokenizer)
    if store is None:
        return
    if not guided:
        raise ValueError(f"{', '.join(settings.losses)} needs no teacher: leave the store {store} out")
    if states := sorted(settings.losses.keys() & STATES.keys()):
        raise ValueError(
            f"a store has the teacher's predictions, not the hidden states and attention that {', '.join(states)} compare: "
            "leave the store out, or these losses"
        )
    if not is_causal_lm(model):
        raise ValueError(
            "a masked language model's inputs are masked anew each time, so that predictions can't be stored: leave the store out"
        )


def _arguments(folder: Path, settings: Heal, window: int, seed: int, save: bool, causal: bool) -> TrainingArguments:
    windows = max(1, settings.tokens_per_step // window)
    batch = min(settings.batch_size or _default_batch(windows, window), windows)
    batch, accumulate = split_step(batch, max(1, round(windows / batch)))
    return training_arguments(
        folder,
        settings.learning_rate,
        batch,
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1.0,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type=settings.schedule,
        bf16=in_bfloat16(settings.precision),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        activation_checkpointing=settings.gradient_checkpointing,
        adam_beta2=0.95,
        save_strategy="steps" if save else "no",
        save_steps=settings.save_steps,
        remove_unused_columns=False,
        include_num_input_tokens_seen="all" if causal else "non_padding",
        logging_steps=max(1, (settings.steps or 200) // 20),
        seed=seed,
    )


def _default_batch(windows: int, window: int) -> int:
    """Return all windows of a step on an accelerator; a CPU is as fast with ``BATCH_TOKENS`` tokens, which need less memory."""
    if torch.accelerator.is_available():
        return windows
    processes, most = processes_started(), max(1, BATCH_TOKENS // window)
    fitting = [n for n in range(1, most + 1) if windows % n == 0 and windows // n % processes == 0]
    return max(fitting, default=windows)


def _read_data(model: PreTrainedModel, tokenizer, files, window: int, seed: int) -> tuple[Any, Any]:
    """Return the training examples and their collator, None for Trainer's own."""
    if is_causal_lm(model):
        tokens = token_stream(documents(files, tokenizer), tokenizer)
        check_tokens(tokens, model, window)
        return PackedDataset(tokens, window), None
    lines = [line for text in documents(files, tokenizer) for line in text.splitlines() if line.strip()]
    if not lines or tokenizer.mask_token is None:
        lack = "the tokenizer has no mask token" if lines else "the text is empty"
        raise ValueError(f"a {type(model).__name__} learns from masked text, but {lack}; give another")
    rows = tokenizer(lines, truncation=True, max_length=window, return_overflowing_tokens=True)["input_ids"]
    return [{"input_ids": ids} for ids in rows], DataCollatorForLanguageModeling(tokenizer, seed=seed)


def _add_predictions(data, model, teacher, tokenizer, settings, folder, top_k, arguments, progress) -> TeacherCache:
    """Return ``data`` with the teacher's predictions, computed and cached first if they are not yet."""
    vocabulary = model.config.get_text_config().vocab_size
    digest, temperature = weights_digest(teacher), settings.temperature
    manifest = make_manifest(digest, tokenizer, data.tokens, data.length, temperature, top_k, vocabulary)
    with arguments.main_process_first(local=False, desc="the teacher's predictions"):
        cache = TeacherCache(folder, manifest, data)
        if not cache.finished:
            loaded = load_teacher(teacher, arguments.device)
            check_teacher(model, loaded, ())
            with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
                cache.fill(ChunkedHead(loaded), arguments.per_device_train_batch_size, settings.chunk, progress)
    return cache


def _fill_last_step(data, steps: int, size: int):
    """Return ``data`` with its first windows repeated to fill the last step of an epoch, for any number of processes alike.

    accelerate itself fills up only what several processes share, and one process would have a smaller step.
    """
    if 0 < steps * size <= len(data):  # every step of the run is complete
        return data
    return torch.utils.data.Subset(data, [k % len(data) for k in range(-(-len(data) // size) * size)])


class _Healer(DivergenceGuardTrainer):
    """Trainer of a model whose ``forward`` returns its loss; as ``processing_class`` the tokenizer would change its config."""

    def __init__(self, *args, tokenizer, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokenizer = tokenizer

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.tokenizer.save_pretrained(output_dir or self.args.output_dir)
