"""The loss of a batch in distillation, which takes the place of the student's ``forward`` while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from tenfold.models.distillation_config import Heal
from tenfold.train.chunked_head import ChunkedHead
from tenfold.train.chunked_loss import sum_chunks
from tenfold.train.fsdp import is_sharded
from tenfold.train.losses import (
    CROSS_ENTROPY,
    DIVERGENCES,
    IGNORED,
    STATES,
    cross_entropy,
    log_probabilities,
    upcast,
)
from tenfold.train.teacher import pair_layers


class Distillation:
    """``sum_k weight_k loss_k``, each loss a mean over positions; see ``tenfold.train.losses``.

    Logits of student and teacher are computed ``settings.chunk`` positions at a time, so that the memory that they take does not
    depend on the batch.

    Args:
        student: is trained.
        teacher: None where its predictions are cached, or no loss needs them.
        settings: the losses and their weights, the layers, the temperature, the chunk.
        causal: position ``t`` predicts token ``t + 1``; in a masked language model it predicts token ``t``.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, settings: Heal, causal: bool = True):
        self.student, self.teacher = ChunkedHead(student), teacher and ChunkedHead(teacher)
        self.settings, self.causal, self.verified = settings, causal, False
        self.row_losses = {name: weight for name, weight in settings.losses.items() if name not in STATES}
        self.state_losses = {name: weight for name, weight in settings.losses.items() if name in STATES}
        if self.state_losses and teacher is not None:
            self.layers = pair_layers(settings.layers, student, teacher)

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        log_probabilities: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> dict[str, Tensor] | ModelOutput:
        """Return ``{"loss": ..}`` of a batch ``(batch, length)``; positions whose label is ``IGNORED`` have no target.

        In evaluation, without gradients, return the student's own output.

        Args:
            log_probabilities: the teacher's cached predictions ``(batch, length, classes)``.
            ids: the tokens of the classes; one class more stands for all others.
        """
        if not torch.is_grad_enabled():
            return type(self.student.model).forward(self.student.model, input_ids=input_ids, labels=labels)
        self._verify(input_ids)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if self.state_losses:
            inputs["output_hidden_states"] = True
        if "attention" in self.state_losses:
            inputs["output_attentions"] = True
            self.student.model.eval()  # otherwise dropout acts on the attention probabilities
        states, out = self.student.compute_states(**inputs)
        predicted, teacher_out = log_probabilities, None
        if self.teacher is not None:
            with torch.no_grad():
                predicted, teacher_out = self.teacher.compute_states(**inputs)
        loss = states.new_zeros((), dtype=upcast(states[..., :0]).dtype)
        if self.row_losses:
            loss = loss + self._row_loss(states, predicted, ids, labels, mask)
        if (router_loss := self.student.router_loss(states, out, attention_mask)) is not None:
            loss = loss + router_loss
        for name, weight in self.state_losses.items():
            loss = loss + weight * STATES[name](out, teacher_out, self.layers, mask)
        return {"loss": loss}

    def _verify(self, input_ids: Tensor) -> None:
        if not self.verified:
            for head in filter(None, (self.student, self.teacher)):
                head.verify(input_ids, self.settings.chunk)
                if self.settings.compile:
                    head.compile()
            self.verified = True

    def _row_loss(self, states: Any, predicted, ids, labels: Tensor, mask: Tensor) -> Tensor:
        """Return the weighted losses of positions, each a mean over them, computed in chunks."""
        if self.causal:
            labels, mask = labels[:, 1:], mask[:, 1:]
            states, predicted, ids = (value if value is None else value[:, :-1] for value in (states, predicted, ids))
        labelled = (labels != IGNORED) & mask
        rows = labelled if self.causal or self.settings.positions == "masked" else mask
        states, predicted, ids = (value if value is None else value[rows] for value in (states, predicted, ids))
        targets = torch.where(labelled, labels, IGNORED)[rows]
        counts = torch.stack([(labelled if name == CROSS_ENTROPY else rows).sum() for name in self.row_losses])

        def loss(states: Tensor, chunk: slice) -> Tensor:
            rest = (value if value is None else value[chunk] for value in (predicted, ids, targets))
            sums = self._sum_losses(states, *rest)
            return (sums * sums.new_tensor(list(self.row_losses.values())) / counts.clamp(min=1)).sum()

        model = self.student.model
        return sum_chunks(loss, states, list(model.parameters()), self.settings.chunk, recompute=is_sharded(model))

    def _sum_losses(self, states: Tensor, predicted: Any, ids: Any, targets: Any) -> Tensor:
        """Return the sum of every loss ``(losses,)`` over the positions of a chunk."""
        logits, temperature = self.student.compute_logits(states), self.settings.temperature
        log_p = log_q = logits  # without a divergence
        if self.row_losses.keys() & DIVERGENCES:
            log_q = log_probabilities(logits, temperature, None if ids is None else ids.long())
            with torch.no_grad():
                if self.teacher is not None:
                    log_p = log_probabilities(self.teacher.compute_logits(predicted), temperature)
                else:  # normalised again: cached predictions are rounded
                    log_p = torch.log_softmax(upcast(predicted), -1)
        rows = (
            cross_entropy(logits, targets)
            if name == CROSS_ENTROPY
            else temperature**2 * DIVERGENCES[name](log_p, log_q)
            for name in self.row_losses
        )
        return torch.stack([row.sum() for row in rows])
