"""Pre-training with a teacher: what another model of the same vocabulary expects at every position, beside the text itself."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tenfold.models.config import Train
from tenfold.models.distillation_config import Heal
from tenfold.models.recipe import Recipe
from tenfold.train.distillation import Distillation
from tenfold.train.model_factory import vocabulary_of
from tenfold.train.teacher import check_teacher, check_vocabulary, load_teacher

LOSSES = {"cross_entropy": 0.5, "kl": 0.5}


def check_named(recipe: Recipe) -> None:
    """Refuse a recipe that learns from a teacher, or says how, and names none.

    Raises:
        ValueError: it is so.
    """
    train = recipe.train
    if train is not None and train.teacher is None and (train.losses is not None or train.temperature != 1):
        raise ValueError(
            f"recipe {recipe.name!r} learns from a teacher, a trained model with the same tokenizer: name it (--teacher DIR, "
            "or teacher in the train section), or leave losses and temperature out"
        )


def teacher_of(recipe: Recipe, tokenizer) -> PreTrainedModel | None:
    """The model that ``recipe`` names as teacher, None where it names none.

    Raises:
        ValueError: its tokens are not those of the run.
    """
    settings = recipe.train
    if settings.teacher is None:
        return None
    teacher = load_teacher(settings.teacher, torch.device("cpu")).requires_grad_(False)
    check_vocabulary(teacher, settings.teacher, tokenizer)
    size = teacher.config.get_text_config().vocab_size
    if (own := vocabulary_of(recipe, tokenizer)) != size:
        way_out = (
            "take a teacher of its size" if recipe.origin else "train on the teacher's own tokens (--data DIR/tokens)"
        )
        raise ValueError(f"teacher {settings.teacher} predicts {size:,} tokens and the model {own:,}; {way_out}")
    return teacher


class DistilledForward(Distillation):
    """The losses of ``settings`` in training, and in evaluation the text's own."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, settings: Train):
        check_teacher(student, teacher, ())
        losses, heat = settings.losses or LOSSES, settings.temperature
        super().__init__(student, teacher, Heal(losses=losses, temperature=heat, compile=settings.compile))

    def __call__(self, input_ids: Tensor, labels: Tensor, **rest) -> dict[str, Tensor] | ModelOutput:
        """``{"loss": ..}`` of a batch ``(batch, length)``."""
        student = self.student.model
        if not student.training:
            return type(student).forward(student, input_ids=input_ids, labels=labels)
        self.teacher.model.to(input_ids.device)
        return super().__call__(input_ids, labels)
