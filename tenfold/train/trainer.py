"""What all training has in common: windows of tokens, Trainer's arguments, and who watches over a run."""

from __future__ import annotations

import json
import math
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainerState, TrainingArguments

from tenfold.train.checkpoints import STATE, check_checkpoint, step_of, whole_checkpoints
from tenfold.train.fsdp import losses_as_they_are, whole_state


class PackedDataset(torch.utils.data.Dataset):
    """A token stream cut into windows of ``length`` that do not overlap; the last, shorter one is left out.

    Args:
        tokens: what a slice takes token numbers from: an array, or :class:`tenfold.train.tokens.Tokens`.
        seed: of the order of the windows; the order of the text unless given.
        masked: a tokenizer, and the share of tokens to hide: then the labels are those, and others are left out. What is hidden
            in a window depends on ``seed`` and its number only.
    """

    def __init__(self, tokens, length: int, seed: int | None = None, masked: tuple[Any, float] | None = None):
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}: give more text")
        self.tokens, self.length, self.seed = tokens, length, seed or 0
        order = torch.Generator().manual_seed(self.seed)
        self.order = torch.arange(len(self)) if seed is None else torch.randperm(len(self), generator=order)
        self.hide = masked and DataCollatorForLanguageModeling(masked[0], mlm_probability=masked[1])

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def ids(self, index: int) -> torch.Tensor:
        """The tokens of a window, none hidden."""
        place = int(self.order[index])
        return torch.from_numpy(self.tokens[place * self.length : (place + 1) * self.length].astype(np.int64))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        place, ids = int(self.order[index]), self.ids(index)
        if not self.hide:
            return {"input_ids": ids, "labels": ids}
        self.hide.generator = torch.Generator().manual_seed(self.seed * len(self) + place)
        hidden, labels = self.hide.torch_mask_tokens(ids[None].clone())
        return {"input_ids": hidden[0], "labels": labels[0]}


class DivergenceGuardTrainer(Trainer):
    """Trainer that stops where the loss is no number or runs away, before that is saved, and says where."""

    AWAY = 2.0  # nats above the best mean of so many steps, or the first loss, that count as running away:
    STEPS = 50
    ENDS = 10  # of a shorter run the last one of so many parts is enough
    NEAR = 1.0  # nats above it at which a checkpoint is still a good one

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            losses_as_they_are(self.accelerator.state.fsdp_plugin)
        self.losses: list[torch.Tensor] = []
        self.steps: list[int] = []  # that they are of
        self.recent: list[float] = []
        self.best = math.inf
        self.since = 0  # the step behind which losses are compared: a model that was folded there is another

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As Trainer's; what is finished is loaded, and not trained on by one more step, as Trainer would.

        Raises:
            ValueError: the checkpoint is damaged; or parameters are shared out among processes, and were not when it was written,
                or the reverse.
        """
        if resume_from_checkpoint:
            check_checkpoint(Path(resume_from_checkpoint), self.is_fsdp_enabled)
        file = resume_from_checkpoint and Path(resume_from_checkpoint) / STATE
        if file and (state := TrainerState.load_from_json(str(file))).global_step >= state.max_steps:
            self.state = state
            self._load_from_checkpoint(resume_from_checkpoint)
            if self.args.load_best_model_at_end:
                self._load_best_model()
            return None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        parts = self.current_gradient_accumulation_steps  # the last step of a pass may have fewer
        self.losses.append(loss.detach() * parts)  # of a micro-batch: its share of the step's loss
        self.steps.append(self.state.global_step)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; parameters that lie in parts are written as one model folder, too, beside the parts."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=whole_state(self))
        else:
            super().save_model(output_dir, _internal_call)

    def check(self) -> None:
        """Look at the losses since the last time, in all processes at those of all, so that they stop together.

        Raises:
            ValueError: one is NaN or infinite, or they run away.
        """
        every = self.accelerator.gather(torch.stack(self.losses)).view(self.args.world_size, -1) if self.losses else []
        values, self.losses = [sum(some) / len(some) for some in zip(*map(torch.Tensor.tolist, every), strict=True)], []
        steps, self.steps = self.steps, []
        each = self.args.gradient_accumulation_steps
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss is {value} at step {step + 1} ({self._where(step)}); {self._good()}; lower the learning rate"
                )
        if values and self.best == math.inf:
            first = values[: steps.count(steps[0])]
            self.best = self.at_first(sum(first) / len(first))
        self.recent = (self.recent + values)[-self.STEPS * each :]
        enough, ends = self.STEPS * each, self.control.should_training_stop
        if ends:  # of a short run less is enough, and what has run away by then is no result
            enough = min(enough, len(self.recent), max(1, self.state.max_steps // self.ENDS) * each)
        mean = sum(self.recent[-enough:]) / max(1, enough)
        if len(self.recent) >= enough > 0:
            if mean > self.away():
                raise ValueError(
                    f"the loss has run away to {mean:.2f} at step {self.state.global_step}, {mean - self.best:.2f} over the best "
                    f"mean before it; {self._good()}; lower the learning rate"
                )
            self.best = min(self.best, mean)

    def at_first(self, loss: float) -> float:
        """What losses may be, by the ``loss`` of the first step."""
        return loss

    def away(self) -> float:
        """The mean loss above which a run has run away."""
        return self.best + self.AWAY

    def near(self) -> float:
        """The loss up to which a checkpoint is a good one."""
        return self.best + self.NEAR

    def remember(self) -> None:
        """Take up the losses of a run that goes on, of which the means are known that were logged, and that of the first step."""
        known: list[float] = []
        for row in self.state.log_history:
            if "loss" in row and row["step"] > self.since:
                known += [row["loss"]] * (row["step"] - self.since - len(known))
        if known:
            means = torch.tensor(known).unfold(0, min(self.STEPS, len(known)), 1).mean(-1)
            self.best = min(self.at_first(known[0]), means.min().item())
        each = self.args.gradient_accumulation_steps
        self.recent = [loss for loss in known[-self.STEPS :] for _ in range(each)]

    def _where(self, step: int) -> str:
        windows = step_size(self.args)
        return f"windows {step * windows} to {(step + 1) * windows}, in the order of seed {self.args.seed}"

    def check_weights(self) -> None:
        """Look at the weights before they are saved: a finite loss may have a gradient that is not.

        Raises:
            ValueError: one is NaN or infinite, in any process.
        """
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        wrong = torch.stack([~part.detach().isfinite().all() for part in parts]).any()
        if self.accelerator.gather(wrong[None].int().to(self.args.device)).any():
            raise ValueError(
                f"weights are NaN or infinite after step {self.state.global_step}; {self._good()}; lower the learning rate"
            )

    def _good(self) -> str:
        """Which checkpoint can be gone on from: the last one at which the loss was good."""
        kept = whole_checkpoints(Path(self.args.output_dir))
        if not kept:
            return "there is no checkpoint yet"
        good = next((path for path in kept if self._loss_at(step_of(path)) <= self.near()), None)
        if good is None:
            return "the loss was not good at any checkpoint that is kept, so begin anew"
        behind = " (delete those behind it to go on from there)" if good != kept[0] else ""
        return f"the last good checkpoint is {good}{behind}"

    def _loss_at(self, step: int) -> float:
        """The last mean that was logged by ``step``; none yet is as good as the first loss."""
        known = [row["loss"] for row in self.state.log_history if "loss" in row and self.since < row["step"] <= step]
        return known[-1] if known else -math.inf


class DivergenceGuard(TrainerCallback):
    """Let a :class:`DivergenceGuardTrainer` look at its losses before it logs or saves, and at its weights before it saves.

    The loss of every checkpoint is logged with it, by which it is known to be a good one.
    """

    def __init__(self, trainer: DivergenceGuardTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.remember()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save
        if control.should_log or control.should_save or control.should_training_stop:
            self.trainer.check()
        if control.should_save:
            self.trainer.check_weights()


class Progress(TrainerCallback):
    """Tells ``advance(step, steps)`` after every optimizer step, or ``advance(step, steps, tokens a second)``."""

    def __init__(self, advance, tokens_a_step: float | None = None):
        self.advance, self.tokens = advance, tokens_a_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.first = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        steps, seconds = state.global_step - self.first, time.perf_counter() - self.begun
        speed = [] if self.tokens is None else [steps * self.tokens / seconds]
        self.advance(state.global_step, state.max_steps, *speed)


class Log(TrainerCallback):
    """A JSON line in ``file`` whenever Trainer logs: step, loss, learning rate, seconds left; tokens where a step's are known.

    What an interrupted run logged behind its last checkpoint is cut off when it goes on.
    """

    def __init__(self, file: Path, tokens_a_step: float | None = None):
        self.file, self.tokens = file, tokens_a_step

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        old = self.file.read_text().splitlines() if self.file.is_file() else []
        kept = [line for line in old if _step(line) <= state.global_step]
        self.file.write_text("".join(f"{line}\n" for line in kept))
        self.begun, self.first = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_loss" in logs:  # the summary at the end
            return
        seconds, steps = time.perf_counter() - self.begun, state.global_step - self.first
        row = {"step": state.global_step}
        row |= {
            key: logs[key] for key in ("loss", "eval_loss", "eval_score", "learning_rate", "grad_norm") if key in logs
        }
        if steps:
            row["seconds_left"] = round((state.max_steps - state.global_step) * seconds / steps)
        if self.tokens is not None:
            row["tokens"] = round(state.global_step * self.tokens)
            row["tokens_per_second"] = round(steps * self.tokens / seconds, 1)
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line


def shared_out(batch: int, accumulate: int, processes: int | None = None) -> tuple[int, int]:
    """``(batch, accumulate)`` of each of several processes, so that all of them together see the same windows a step.

    Raises:
        ValueError: neither divides by the number of processes.
    """
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if accumulate % processes == 0:
        return batch, accumulate // processes
    if batch % processes == 0:
        return batch // processes, accumulate
    raise ValueError(
        f"{processes} processes can't share {accumulate} batches of {batch} windows evenly; make one of them a multiple of it"
    )


def step_size(arguments: TrainingArguments) -> int:
    """Windows, or examples, in one step of all processes."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def training_arguments(folder: Path, learning_rate: float, batch: int, **more: Any) -> TrainingArguments:
    """Trainer's arguments with this package's defaults; ``more`` wins. Without an accelerator the CPU is used."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": not torch.accelerator.is_available(),
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch,
        "max_grad_norm": 1.0,
        "ddp_find_unused_parameters": True,  # guides that are gone, layers above the last one that a loss looks at
        "save_total_limit": 1,
        "report_to": ["tensorboard"] if find_spec("tensorboard") else "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "logging_first_step": True,  # what later losses are compared with
        "log_level": "error",
    }
    arguments = TrainingArguments(**(defaults | more))
    arguments._n_gpu = min(
        1, arguments.n_gpu
    )  # a process is one device: Trainer would take all GPUs for nn.DataParallel
    return arguments


def unwrapped(trainer: Trainer):
    """The trained model as it was before Trainer: its own ``forward``, not one in bfloat16, and its cache on."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)
    model.config.use_cache = True
    return model
