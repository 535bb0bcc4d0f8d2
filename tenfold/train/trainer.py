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
from tenfold.train.checkpoints import STATE, check_checkpoint, complete_checkpoints, step_of
from tenfold.train.fsdp import UnshardedShell, full_state_dict, keep_output_dtype

LOGGED = ("loss", "eval_loss", "eval_score", "learning_rate", "grad_norm")
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
        log: the file for ``RunLog``.
        advance: called as ``advance(step, steps, tokens_per_second)`` after every step.
        tokens_per_step: of all processes.
    """

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
        self.losses: list[torch.Tensor] = []
        self.steps: list[int] = []  # the steps of the losses
        self.recent: list[float] = []
        self.best = math.inf
        self.first_step = 0  # losses before it are of a model that has been compressed since
        self.remove_callback(PrinterCallback)
        self.add_callback(DivergenceGuard(self))
        self.add_callback(RunLog(log, advance, tokens_per_step))

    def train(self, checkpoint: Path | None = None):
        """Train, from ``checkpoint`` on if there is one; a finished run is loaded and not trained by one more step.

        Raises:
            ValueError: the checkpoint is damaged, or is of a run that shards parameters where this one does not, or the reverse.
            OSError: there is no room on the disk.
        """
        resume = None if checkpoint is None else str(checkpoint)
        with silent(), disk_full_errors(self.args.output_dir):
            if checkpoint is not None:
                check_checkpoint(checkpoint, self.is_fsdp_enabled)
                state = TrainerState.load_from_json(str(checkpoint / STATE))
                if state.global_step >= state.max_steps:
                    self.state = state
                    self._load_from_checkpoint(resume)
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

    def curve(self, key: str = "loss") -> list[list[float]]:
        """Return ``[step, value]`` for every logged value of ``key``."""
        return [[row["step"], row[key]] for row in self.state.log_history if key in row]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        # Trainer divides by the number of micro-batches, of which the last step of an epoch may have fewer
        self.losses.append(loss.detach() * self.current_gradient_accumulation_steps)
        self.steps.append(self.state.global_step)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:  # an ordinary model folder, beside the shards
            self._save(output_dir, state_dict=full_state_dict(self))
        else:
            super().save_model(output_dir, _internal_call)

    def check_losses(self) -> None:
        """Check the losses of all processes since the last call, so that they stop together.

        Raises:
            ValueError: one is NaN or infinite, or they diverge.
        """
        every = self.accelerator.gather(torch.stack(self.losses)).view(self.args.world_size, -1) if self.losses else []
        values = [sum(some) / len(some) for some in zip(*map(torch.Tensor.tolist, every), strict=True)]
        steps, self.losses, self.steps = self.steps, [], []
        micro_batches = self.args.gradient_accumulation_steps
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                self._stop(f"the loss is {value} at step {step + 1} ({self._locate(step)})")
        if values and self.best == math.inf:
            first = values[: steps.count(steps[0])]
            self.best = self.initial_best(sum(first) / len(first))
        self.recent = (self.recent + values)[-self.STEPS * micro_batches :]
        enough = self.STEPS * micro_batches
        if self.control.should_training_stop:  # a short run that has diverged by its end is no result
            enough = min(enough, len(self.recent), max(1, self.state.max_steps // self.MIN_FRACTION) * micro_batches)
        mean = sum(self.recent[-enough:]) / max(1, enough)
        if len(self.recent) >= enough > 0:
            if mean > self.divergence_limit():
                step, above = self.state.global_step, mean - self.best
                self._stop(
                    f"the loss has run away to {mean:.2f} at step {step}, {above:.2f} over the best mean before it"
                )
            self.best = min(self.best, mean)

    def initial_best(self, loss: float) -> float:
        """Return what later means are compared with, given the ``loss`` of the first step."""
        return loss

    def divergence_limit(self) -> float:
        """Return the mean loss above which a run has diverged."""
        return self.best + self.MARGIN

    def good_limit(self) -> float:
        """Return the loss up to which a checkpoint is a good one."""
        return self.best + self.GOOD_MARGIN

    def restore_losses(self) -> None:
        """Restore the losses of a resumed run from its log, which has means of several steps."""
        known: list[float] = []
        for row in self.state.log_history:
            if "loss" in row and row["step"] > self.first_step:
                known += [row["loss"]] * (row["step"] - self.first_step - len(known))
        if known:
            means = torch.tensor(known).unfold(0, min(self.STEPS, len(known)), 1).mean(-1)
            self.best = min(self.initial_best(known[0]), means.min().item())
        micro_batches = self.args.gradient_accumulation_steps
        self.recent = [loss for loss in known[-self.STEPS :] for _ in range(micro_batches)]

    def check_weights(self) -> None:
        """Check the weights before they are saved: a finite loss may have a gradient that is not.

        Raises:
            ValueError: one is NaN or infinite, in any process.
        """
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        wrong = torch.stack([~part.detach().isfinite().all() for part in parts]).any()
        if self.accelerator.gather(wrong[None].int().to(self.args.device)).any():
            step = self.state.global_step
            self._stop(f"weights are NaN or infinite after step {step} ({self._locate(step - 1)})")

    def _stop(self, problem: str) -> None:
        raise ValueError(f"{problem}; {self._last_good()}; lower the learning rate")

    def _locate(self, step: int) -> str:
        """Describe which examples a step saw."""
        size, total = step_size(self.args), len(self.train_dataset)
        epoch, step = divmod(step, -(-total // size))
        return (
            f"{self.UNIT} {step * size} to {min(total, (step + 1) * size)} of epoch {epoch + 1}, in the order of seed "
            f"{self.args.seed}; learning rate {self.args.learning_rate:g}"
        )

    def _last_good(self) -> str:
        """Describe the last checkpoint at which the loss was good."""
        found = complete_checkpoints(Path(self.args.output_dir))
        if not found:
            return "there is no checkpoint yet"
        good = next((path for path in found if self._loss_at(step_of(path)) <= self.good_limit()), None)
        if good is None:
            return "the loss was not good at any checkpoint, so start again"
        later = " (delete later ones to resume from it)" if good != found[0] else ""
        return f"the last good checkpoint is {good}{later}"

    def _loss_at(self, step: int) -> float:
        """Return the last loss that was logged by ``step``; without one the checkpoint counts as good."""
        history = self.state.log_history
        known = [row["loss"] for row in history if "loss" in row and self.first_step < row["step"] <= step]
        return known[-1] if known else -math.inf


class DivergenceGuard(TrainerCallback):
    """Check losses before logging and saving, and weights before saving and at the end; log a loss for every checkpoint."""

    def __init__(self, trainer: DivergenceGuardTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_losses()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save
        if control.should_log or control.should_save or control.should_training_stop:
            self.trainer.check_losses()
        if control.should_save or control.should_training_stop:
            self.trainer.check_weights()


class RunLog(TrainerCallback):
    """Report every step to ``advance``, and append a JSON line to ``file`` whenever Trainer logs.

    A line has the step, loss, learning rate, seconds left and tokens. When an interrupted run resumes, lines after its last
    checkpoint are removed.
    """

    def __init__(self, file: Path | None, advance: Advance | None, tokens_per_step: float):
        self.file, self.advance, self.tokens_per_step = file, advance, tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.first = time.perf_counter(), state.global_step
        if self.file is None or not state.is_world_process_zero:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        old = self.file.read_text().splitlines() if self.file.is_file() else []
        lines = [line for line in old if _logged_step(line) <= state.global_step]
        self.file.write_text("".join(f"{line}\n" for line in lines))

    def on_step_end(self, args, state, control, **kwargs):
        if self.advance is not None and state.is_world_process_zero:
            steps, seconds = self._elapsed(state)
            self.advance(state.global_step, state.max_steps, steps * self.tokens_per_step / seconds)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if (
            self.file is None or not state.is_world_process_zero or not logs or "train_loss" in logs
        ):  # the final summary
            return
        steps, seconds = self._elapsed(state)
        row = {"step": state.global_step} | {key: logs[key] for key in LOGGED if key in logs}
        if steps:
            row["seconds_left"] = round((state.max_steps - state.global_step) * seconds / steps)
        row["tokens"] = round(state.global_step * self.tokens_per_step)
        row["tokens_per_second"] = round(steps * self.tokens_per_step / seconds, 1)
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def _elapsed(self, state) -> tuple[int, float]:
        return state.global_step - self.first, time.perf_counter() - self.begun


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line that was cut off


def processes_started() -> int:
    """Return the number of processes that torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def split_step(batch: int, accumulate: int, processes: int | None = None) -> tuple[int, int]:
    """Return ``(batch, accumulate)`` of each process, such that together they see the same windows a step as one.

    Raises:
        ValueError: neither is a multiple of the number of processes.
    """
    processes = processes or processes_started()
    if accumulate % processes == 0:
        return batch, accumulate // processes
    if batch % processes == 0:
        return batch // processes, accumulate
    raise ValueError(
        f"{processes} processes can't share {accumulate} batches of {batch} windows evenly; make one of them a multiple of it"
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
