"""What all training shares: windows of tokens, Trainer's arguments, the log, and a guard against divergence."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from tenfold.models.atomic_io import disk_full_errors
from tenfold.models.loading import silent
from tenfold.train.checkpoints import STATE, check_checkpoint, check_hashes, complete_checkpoints, step_of, write_hashes
from tenfold.train.fsdp import UnshardedShell, full_state_dict, keep_output_dtype

# keys of a line of the log
LOGGED = (
    "step",
    "loss",
    "eval_loss",
    "eval_score",
    "learning_rate",
    "grad_norm",
    "seconds_left",
    "tokens",
    "tokens_per_second",
)
Advance = Callable[[int, int, float], None]  # (step, steps, tokens per second)


class PackedDataset(torch.utils.data.Dataset):
    """Non-overlapping windows of ``length`` tokens; a shorter one at the end is left out.

    Args:
        tokens: an array, or ``tenfold.train.tokens.Tokens``.
        seed: shuffles the windows; None keeps the order of the text.
        masked: a tokenizer, and the probability with which tokens are masked: then only masked tokens have labels. The mask of a
            window depends on ``seed`` and its position only.
    """

    def __init__(self, tokens, length: int, seed: int | None = None, masked: tuple[Any, float] | None = None):
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}: give more text")
        self.tokens, self.length, self.seed = tokens, length, seed or 0
        generator = torch.Generator().manual_seed(self.seed)
        self.order = torch.arange(len(self)) if seed is None else torch.randperm(len(self), generator=generator)
        self.collator = masked and DataCollatorForLanguageModeling(masked[0], mlm_probability=masked[1])

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def ids(self, index: int) -> torch.Tensor:
        """Return the tokens of a window, none masked."""
        begin = int(self.order[index]) * self.length
        return torch.from_numpy(self.tokens[begin : begin + self.length].astype(np.int64))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids(index)
        if not self.collator:
            return {"input_ids": ids, "labels": ids}
        self.collator.generator = torch.Generator().manual_seed(self.seed * len(self) + int(self.order[index]))
        masked, labels = self.collator.torch_mask_tokens(ids[None].clone())
        return {"input_ids": masked[0], "labels": labels[0]}


class DivergenceGuardTrainer(Trainer):
    """Trainer that stops with an error if loss or weights are not finite or the loss diverges, before that is saved.

    Args:
        log: the file for the log, a JSON line with step, loss, learning rate, tokens and time left whenever Trainer logs.
        advance: called as ``advance(step, steps, tokens_per_second)`` after every step.
        tokens_per_step: of all processes.
    """

    model: Any  # transformers leaves open what these are
    train_dataset: Any
    lr_scheduler: Any
    MARGIN = 2.0  # nats by which a mean loss may exceed the best one
    GOOD_MARGIN = 1.0  # nats by which the loss of a good checkpoint may exceed it
    STEPS = 50  # over which losses are averaged
    MIN_FRACTION = 10  # at the end of a shorter run, a mean over 1 / MIN_FRACTION of its steps is enough
    UNIT = "windows"

    def __init__(
        self, *args, log: Path | None = None, advance: Advance | None = None, tokens_per_step: float = 0.0, **kwargs
    ):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            keep_output_dtype(self.accelerator.state.fsdp_plugin)
        self.model_accepts_loss_kwargs = False  # some models accept them, but ignore them in a part of the loss
        self.log_file, self.tokens_per_step = log, tokens_per_step
        self.best = math.inf
        self.first_step = 0  # losses before it are of a model that has been compressed since
        self.last_step: float = math.inf  # at which the run stops, without changing its schedule
        self.begin()
        self.remove_callback(PrinterCallback)
        self.add_callback(EveryStep(self, advance))

    def train(self, checkpoint: Path | None = None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Train, from ``checkpoint`` on if there is one; a finished run is loaded and not trained by one more step."""
        resume = None if checkpoint is None else str(checkpoint)
        with silent(), disk_full_errors(str(self.args.output_dir)):
            if checkpoint is not None:
                check_checkpoint(checkpoint, self.is_fsdp_enabled)
                state = TrainerState.load_from_json(str(checkpoint / STATE))
                if (best := state.best_model_checkpoint) and best != resume and Path(best).is_dir():
                    check_hashes(Path(best))
                if state.global_step >= state.max_steps:
                    self.state = state
                    self._load_from_checkpoint(str(checkpoint))
                    if self.args.load_best_model_at_end:
                        self._load_best_model()
                    return None
            return super().train(resume_from_checkpoint=resume)

    def train_and_unwrap(self, checkpoint: Path | None):
        """Train, and return the model as it was before Trainer wrapped it: whole in every process, in evaluation mode."""
        shell = UnshardedShell(self.model) if self.is_fsdp_enabled else None
        self.train(checkpoint)
        if shell is not None:
            shell.fill()
        return unwrap_model(self).eval()

    def curve(self, key: str = "loss") -> list[list[Any]]:
        """Return ``[step, value]`` for every logged value of ``key``."""
        return [[row["step"], row[key]] for row in self.state.log_history if key in row]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:  # an ordinary model folder, beside the shards
            self._save(output_dir, state_dict=full_state_dict(self))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir):
        """Save the last files before the state, which marks a checkpoint as complete, and the hashes of all."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_hashes(Path(output_dir))

    def begin(self) -> None:
        """Start the clock of this call, which may resume a run."""
        self.begun, self.begun_at = time.perf_counter(), self.state.global_step

    def tokens_per_second(self) -> float:
        """Return the tokens per second since ``begin``."""
        steps, seconds = self.state.global_step - self.begun_at, time.perf_counter() - self.begun
        return steps * self.tokens_per_step / seconds

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, also to the file, which the history of a resumed run replaces; check the loss, and weights that are saved next."""
        if "train_loss" not in logs:  # the summary
            state, speed = self.state, self.tokens_per_second()
            logs |= {"tokens": round(state.global_step * self.tokens_per_step), "tokens_per_second": round(speed, 1)}
            if speed:
                logs["seconds_left"] = round((state.max_steps - state.global_step) * self.tokens_per_step / speed)
        super().log(logs, *args, **kwargs)
        if self.log_file is not None and self.is_world_process_zero():
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            rows = [row for row in self.state.log_history if "train_loss" not in row]
            lines = [json.dumps({key: row[key] for key in LOGGED if key in row}) for row in rows]
            self.log_file.write_text("".join(f"{line}\n" for line in lines))
        if "loss" in logs:
            self.check_losses()
            if self.control.should_save or self.control.should_training_stop:
                self.check_weights()

    def check_losses(self) -> None:
        """Check the logged losses, which are means over all processes, so that these stop together."""
        losses: list[float] = []  # of single steps, of which some are only known by their mean
        new = 0
        for step, loss in self._losses():
            new = step - self.first_step - len(losses)
            losses += [loss] * new
        step = self.state.global_step
        if not losses:
            return
        if not math.isfinite(losses[-1]):
            self._stop(f"the loss is {losses[-1]} at step {step} ({self._locate(step - 1, new)})")
        means = torch.tensor(losses).unfold(0, min(self.STEPS, len(losses)), 1).mean(-1)
        self.best = min(self.initial_best(losses[0]), means.min().item())
        enough = self.STEPS
        if step >= self.state.max_steps:  # a short run that has diverged by its end is no result
            enough = min(enough, len(losses), max(1, step // self.MIN_FRACTION))
        mean = math.fsum(losses[-enough:]) / enough
        if len(losses) >= enough and mean > self.divergence_limit():
            above = mean - self.best
            self._stop(f"the loss has run away to {mean:.2f} at step {step}, {above:.2f} over the best mean before it")

    def initial_best(self, loss: float) -> float:
        """Return what later means are compared with, given the ``loss`` of the first step."""
        return loss

    def divergence_limit(self) -> float:
        """Return the mean loss above which a run has diverged."""
        return self.best + self.MARGIN

    def good_limit(self) -> float:
        """Return the loss up to which a checkpoint is a good one."""
        return self.best + self.GOOD_MARGIN

    def check_weights(self) -> None:
        """Check the weights before they are saved: a finite loss may have a gradient that is not."""
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        wrong = torch.stack([~part.detach().isfinite().all() for part in parts]).any()
        found: Any = self.accelerator.gather(wrong[None].int().to(self.args.device))
        if found.any():
            step = self.state.global_step
            self._stop(f"weights are NaN or infinite after step {step} ({self._locate(step - 1)})")

    def _losses(self) -> list[list[Any]]:
        return [[step, loss] for step, loss in self.curve() if step > self.first_step]

    def _locate(self, step: int, steps: int = 1) -> str:
        """Describe which examples ``steps`` steps saw, of which ``step`` is the last one."""
        size, total = step_size(self.args), len(self.train_dataset)
        epoch, last = divmod(step, -(-total // size))
        return (
            f"{self.UNIT} {max(0, last + 1 - steps) * size} to {min(total, (last + 1) * size)} of epoch {epoch + 1}, in the "
            f"order of seed {self.args.seed}; learning rate {self.args.learning_rate:g}"
        )

    def _stop(self, problem: str) -> None:
        """Raise ValueError with the ``problem`` and the last checkpoint whose logged loss was good."""
        found, place = complete_checkpoints(Path(str(self.args.output_dir))), "there is no checkpoint yet"
        for path in found:
            loss = next((loss for step, loss in reversed(self._losses()) if step <= step_of(path)), -math.inf)
            if loss <= self.good_limit():
                later = "" if path == found[0] else " (delete later ones to resume from it)"
                place = f"the last good checkpoint is {path}{later}"
                break
            place = "the loss was not good at any checkpoint, so start again"
        raise ValueError(f"{problem}; {place}; lower the learning rate")


class EveryStep(TrainerCallback):
    """Report every step to ``advance``, and have the loss logged, and thereby checked, before saving and at the end."""

    def __init__(self, trainer: DivergenceGuardTrainer, advance: Advance | None):
        self.trainer, self.advance = trainer, advance

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if self.advance is not None and state.is_world_process_zero:
            self.advance(state.global_step, state.max_steps, self.trainer.tokens_per_second())
        if state.global_step >= self.trainer.last_step:
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save or control.should_training_stop


def processes_started() -> int:
    """Return the number of processes that torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def split_step(batch: int, accumulate: int, unit: str = "windows") -> tuple[int, int]:
    """Return ``(batch, accumulate)`` of each process, such that together they see the same windows a step as one.

    Raises:
        ValueError: neither is a multiple of the number of processes.
    """
    processes = processes_started()
    if accumulate % processes == 0:
        return batch, accumulate // processes
    if batch % processes == 0:
        return batch // processes, accumulate
    raise ValueError(
        f"{processes} processes can't share {accumulate} batches of {batch} {unit} evenly; make the number of batches, the "
        f"batch size or, in healing, the {unit} of --tokens-per-step a multiple of {processes}"
    )


def step_size(arguments: TrainingArguments) -> int:
    """Return the windows, or examples, in one step of all processes."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def training_arguments(folder: Path, learning_rate: float, batch: int, **more: Any) -> TrainingArguments:
    """Return Trainer's arguments with this package's defaults, overridden by ``more``; on the CPU without an accelerator."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": not torch.accelerator.is_available(),
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch,
        "max_grad_norm": 1.0,
        "ddp_find_unused_parameters": True,  # inactive guides, layers after the last one in the loss
        "save_total_limit": 1,
        "report_to": ["tensorboard"] if find_spec("tensorboard") else "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "logging_first_step": True,  # later losses are compared with it
        "log_level": "error",
        "logging_nan_inf_filter": False,  # else Trainer logs other losses for those that are not finite
    }
    arguments = TrainingArguments(**(defaults | more))
    arguments._n_gpu = min(1, arguments.n_gpu)  # else Trainer wraps the model in nn.DataParallel over all GPUs
    return arguments


def unwrap_model(trainer: Trainer):
    """Return the trained model as it was before Trainer: with its own ``forward``, not autocast, and its cache on."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)
    model.config.use_cache = True
    return model
