"""Pre-training with a teacher: the loss includes a divergence from another model of the same vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tenfold.models.config import Train
from tenfold.models.distillation_config import Heal
from tenfold.models.recipe import Recipe
from tenfold.train.distillation import Distillation
from tenfold.train.model_factory import vocabulary_size
from tenfold.train.teacher import check_teacher, check_vocabulary, load_teacher

LOSSES = {"cross_entropy": 0.5, "kl": 0.5}


def load_recipe_teacher(recipe: Recipe, tokenizer) -> PreTrainedModel | None:
    """Load the teacher that ``recipe`` names, if it names one.

    Raises:
        ValueError: its vocabulary is not the run's.
    """
    name = recipe.train.teacher
    if name is None:
        return None
    teacher = load_teacher(name, torch.device("cpu")).requires_grad_(False)
    check_vocabulary(teacher, name, tokenizer)
    size = teacher.config.get_text_config().vocab_size
    if (own := vocabulary_size(recipe, tokenizer)) != size:
        way_out = (
            "take a teacher of its size" if recipe.origin else "train on the teacher's own tokens (--data DIR/tokens)"
        )
        raise ValueError(f"teacher {name} predicts {size:,} tokens and the model {own:,}; {way_out}")
    return teacher


class DistilledForward(Distillation):
    """The losses of ``settings`` in training, and the model's own loss in evaluation."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, settings: Train):
        check_teacher(student, teacher, ())
        losses, temperature = settings.losses or LOSSES, settings.temperature
        super().__init__(student, teacher, Heal(losses=losses, temperature=temperature, compile=settings.compile))

    def __call__(self, input_ids: Tensor, labels: Tensor, **rest) -> dict[str, Tensor] | ModelOutput:
        student = self.student.model
        if not student.training:
            return type(student).forward(student, input_ids=input_ids, labels=labels)
        self.teacher.model.to(input_ids.device)
        return super().__call__(input_ids, labels)
