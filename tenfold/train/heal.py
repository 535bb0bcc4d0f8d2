"""Healing: a folded model learns the distributions of the model that it came from (distillation)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from tenfold.evaluate.text import documents, token_stream
from tenfold.models.recipe import Heal
from tenfold.train.trainer import Progress, Windows, training_arguments, unwrapped


def heal(
    model,
    teacher,
    tokenizer,
    files: Sequence[str | Path],
    settings: Heal | None = None,
    window: int | None = None,
    seed: int = 0,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train ``model``, in place, to predict what ``teacher`` predicts on ``files``.

    The loss of a token is ``distill * T^2 KL(teacher / T || model / T) + (1 - distill) * cross entropy``.

    Args:
        settings: steps or epochs, tokens a step, learning rate and schedule, the weight and temperature of the loss.
        window: tokens that the model sees at once; its context, 1,024 at most, unless given.

    Returns:
        ``steps``, ``tokens``, ``seconds`` and ``curve`` (step, loss).
    """
    settings = settings or Heal()
    window = window or min(getattr(model.config, "max_position_embeddings", None) or 1024, 1024)
    windows = Windows(token_stream(documents(files, tokenizer), tokenizer), window)
    batch = max(1, settings.tokens_per_step // window)
    length = {"max_steps": settings.steps} if settings.steps else {"num_train_epochs": settings.epochs or 1.0}
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            Path(folder),
            settings.learning_rate,
            batch,
            lr_scheduler_type=settings.schedule,
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            adam_beta2=0.95,
            save_strategy="no",
            logging_steps=max(1, (settings.steps or 200) // 20),
            seed=seed,
            **length,
        )
        trainer = _Distiller(model=model, args=arguments, train_dataset=windows, teacher=teacher, settings=settings)
        trainer.remove_callback(PrinterCallback)
        if advance is not None:
            trainer.add_callback(Progress(advance))
        begun = time.perf_counter()
        trainer.train()
    unwrapped(trainer).eval()
    steps = trainer.state.global_step
    return {
        "steps": steps,
        "tokens": steps * batch * window,
        "seconds": round(time.perf_counter() - begun, 1),
        "curve": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
    }


class _Distiller(Trainer):
    """Trainer with the loss of :func:`heal`."""

    def __init__(self, *args, teacher, settings: Heal, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.settings = teacher.to(self.args.device).eval().requires_grad_(False), settings
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ids = inputs["input_ids"]
        outputs = model(input_ids=ids, use_cache=False)
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids, use_cache=False).logits
        loss = distillation_loss(outputs.logits[:, :-1], wanted[:, :-1], ids[:, 1:], self.settings)
        return (loss, outputs) if return_outputs else loss


def distillation_loss(logits: Tensor, wanted: Tensor, targets: Tensor, settings: Heal) -> Tensor:
    """The loss of :func:`heal` for ``logits`` and ``wanted`` ``(batch, length, vocabulary)``, the mean over tokens."""
    hot = settings.temperature
    flat, goal = logits.float().flatten(0, 1), wanted.float().flatten(0, 1)
    loss = logits.new_zeros((), dtype=torch.float32)
    if settings.distill > 0:
        student, teacher = (torch.log_softmax(values / hot, -1) for values in (flat, goal))
        loss = (
            settings.distill
            * hot**2
            * torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        )
    if settings.distill < 1:
        loss = loss + (1 - settings.distill) * torch.nn.functional.cross_entropy(flat, targets.flatten())
    return loss
