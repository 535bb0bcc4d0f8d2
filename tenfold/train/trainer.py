"""What pre-training and healing have in common: windows of tokens, and Trainer's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments


class Windows(torch.utils.data.Dataset):
    """A token stream cut into windows of ``length`` that do not overlap; the last, shorter one is left out."""

    def __init__(self, tokens: np.ndarray, length: int):
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}: give more text")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index * self.length :][: self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Progress(TrainerCallback):
    """Tells ``advance(step, steps)`` after every optimizer step."""

    def __init__(self, advance):
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(state.global_step, state.max_steps)


def training_arguments(folder: Path, learning_rate: float, batch: int, **more: Any) -> TrainingArguments:
    """Trainer's arguments with this package's defaults; ``more`` wins. Without an accelerator the CPU is used."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": True,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch,
        "max_grad_norm": 1.0,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "log_level": "error",
    }
    return TrainingArguments(**(defaults | more))


def unwrapped(trainer: Trainer):
    """The trained model as it was before Trainer: its own ``forward``, not one in bfloat16, and its cache on."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)
    model.config.use_cache = True
    return model
