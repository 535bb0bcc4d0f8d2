"""The loss of a batch in healing: what the student's ``forward`` is while it is trained."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.distillation_config import Heal
from tenfold.train.chunked_head import ChunkedHead
from tenfold.train.chunked_loss import summed
from tenfold.train.fsdp import is_sharded
from tenfold.train.losses import IGNORED, LOGITS, STATES, WITHOUT_TEACHER, LossInputs, log_probabilities, wide
from tenfold.train.teacher import layer_map


class Distillation:
    """``sum_k weight_k loss_k``, every loss a mean over positions; see :mod:`tenfold.train.losses`.

    Logits are computed ``settings.chunk`` positions at a time, of student and teacher: whatever the batch, no more of them are
    ever held.

    Args:
        student: is trained.
        teacher: None where its answers are stored, or no loss asks for them.
        settings: the losses and their weights, the layers, the temperature, the chunk.
        causal: whether position ``t`` predicts token ``t + 1``; a masked language model predicts token ``t``.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, settings: Heal, causal: bool = True):
        self.student, self.teacher = ChunkedHead(student), teacher and ChunkedHead(teacher)
        self.settings, self.causal, self.checked = settings, causal, False
        self.of_rows = {name: weight for name, weight in settings.losses.items() if name in LOGITS}
        self.of_states = {name: weight for name, weight in settings.losses.items() if name in STATES}
        self.diverging = bool(self.of_rows.keys() - WITHOUT_TEACHER)
        if self.of_states:
            self.layers = layer_map(settings.layers, student, teacher)

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        log_probabilities: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``{"loss": ..}`` of a batch ``(batch, length)``; labels that are ``IGNORED`` are nothing to predict.

        Args:
            log_probabilities: the stored answers ``(batch, length, classes)``.
            ids: the tokens that they are for; one class more is the rest.
        """
        self._check(input_ids)
        given = {"input_ids": input_ids}
        if attention_mask is not None:
            given["attention_mask"] = attention_mask
        there = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        inside = {"output_hidden_states": True} if self.of_states else {}
        if "attention" in self.of_states:
            inside["output_attentions"] = True
            self.student.model.eval()  # dropout would be among the probabilities
        states, out = self.student.run(**given, **inside)
        wanted, seen = log_probabilities, None
        if self.teacher is not None:
            with torch.no_grad():
                wanted, seen = self.teacher.run(**given, **inside)
        loss = states.new_zeros((), dtype=wide(states[..., :0]).dtype)
        if self.of_rows:
            loss = loss + self._rows(states, wanted, ids, labels, there)
        if (balance := self.student.balance(states, out, attention_mask)) is not None:
            loss = loss + balance
        for name, weight in self.of_states.items():
            loss = loss + weight * STATES[name](out, seen, self.layers, there)
        return {"loss": loss}

    def _check(self, input_ids: Tensor) -> None:
        if not self.checked:
            for model in (self.student, self.teacher):
                if model is not None:
                    model.check(input_ids, self.settings.chunk)
                    if self.settings.compile:
                        model.trace()
            self.checked = True

    def _rows(self, states: Tensor, wanted: Tensor | None, ids: Tensor | None, labels: Tensor, there: Tensor) -> Tensor:
        """The losses of positions, chunk by chunk, each a mean over them."""
        if self.causal:
            labels, there = labels[:, 1:], there[:, 1:]
            states, wanted, ids = (None if value is None else value[:, :-1] for value in (states, wanted, ids))
        labelled = (labels != IGNORED) & there
        kept = labelled if self.causal or self.settings.positions == "masked" else there
        states, wanted, ids = (None if value is None else value[kept] for value in (states, wanted, ids))
        targets = torch.where(labelled, labels, IGNORED)[kept]
        counts = torch.stack([(labelled if name == "cross_entropy" else kept).sum() for name in self.of_rows])

        def run(states: Tensor, rows: slice) -> Tensor:
            rest = (None if value is None else value[rows] for value in (wanted, ids, targets))
            sums = self._chunk(states, *rest)
            return (sums * sums.new_tensor(list(self.of_rows.values())) / counts.clamp(min=1)).sum()

        model = self.student.model
        return summed(run, states, list(model.parameters()), self.settings.chunk, again=is_sharded(model))

    def _chunk(self, states: Tensor, wanted: Tensor | None, ids: Tensor | None, targets: Tensor) -> Tensor:
        """The sum of every loss ``(losses,)`` over the positions of a chunk."""
        heat, student, teacher = self.settings.temperature, None, None
        logits = self.student.logits(states)
        if self.diverging:
            student = log_probabilities(logits, heat, None if ids is None else ids.long())
            with torch.no_grad():  # stored answers are rounded, and add up to one again
                made = None if self.teacher is None else self.teacher.logits(wanted)
                teacher = torch.log_softmax(wide(wanted), -1) if made is None else log_probabilities(made, heat)
        rows = LossInputs(logits, targets, student, teacher, heat)
        return torch.stack([LOGITS[name](rows).sum() for name in self.of_rows])
