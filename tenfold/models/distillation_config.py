"""Schema of the healing section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tenfold.models.config import Optimization, Schedule
from tenfold.models.suggestions import check_name

LOSSES = ("cross_entropy", "kl", "reverse_kl", "jensen_shannon", "hidden", "attention", "embedding")
DIVERGENCES = {"kl", "reverse_kl", "jensen_shannon"}


class Heal(Optimization):
    """Distillation after compression; see ``tenfold.train.heal``.

    Args:
        tokens_per_step: of all processes together.
        batch_size: windows at once; by default all of a step, on a CPU 1,024 tokens.
        losses: the weight of each; see ``tenfold.train.losses``.
        layers: pairs of a student's and a teacher's layer for ``hidden`` and ``attention``, from 0; by default those of equal
            relative depth.
        positions: of a masked language model, where divergences are computed: ``all``, or the ``masked`` ones.
        chunk: positions whose logits are in memory at once.
    """

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    tokens_per_step: int = Field(4096, ge=1)
    batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(3.0e-4, gt=0)
    schedule: Schedule = "cosine"
    warmup: float = Field(0.05, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    losses: dict[str, float] = Field({"kl": 1.0}, min_length=1)
    layers: list[tuple[int, int]] | None = Field(None, min_length=1)
    positions: Literal["all", "masked"] = "all"
    chunk: int = Field(1024, ge=1)

    @field_validator("losses")
    @classmethod
    def _check_losses(cls, value):
        for name, weight in value.items():
            check_name(name, LOSSES, "loss")
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"the weight of {name} is {weight}, but must be above 0; leave out a loss that does not count"
                )
        return value

    @model_validator(mode="after")
    def _check_conflicts(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"a healing has steps ({self.steps}) or epochs ({self.epochs:g}); leave one of them out")
        if self.temperature != 1 and not DIVERGENCES & self.losses.keys():
            raise ValueError(
                f"temperature {self.temperature:g} is of {', '.join(sorted(DIVERGENCES))}, and the losses are "
                f"{', '.join(self.losses)}; leave it out"
            )
        return self
