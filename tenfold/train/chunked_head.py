"""Logits of a few positions at a time: those of a whole batch are the largest tensor of the training, and never needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.models.sites import base_model

AGREEMENT = 1e-2  # of the logits from states with the model's own, as a share of the largest; bfloat16 rounds to 0.8%


class ChunkedHead:
    """A model in two parts: the states in front of its output head, and the logits of some of them.

    The head is the model's own ``forward`` with the states put in the place of its base model's: whatever it does there, soft
    caps, scales, transforms, biases, is done. :meth:`check` holds that against the logits of the whole model; where they
    differ, ``whole`` is set, and the states are the logits.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.base = model, base_model(model)
        self.whole = self.base is model
        self.form: Any = None
        self.traced: Callable[..., Any] | None = None

    def run(self, **inputs) -> tuple[Tensor, Any]:
        """States ``(batch, length, width)`` and all of the output; keywords as for the model."""
        if self.whole:
            out = (self._forward if self.traced is None else self.traced)(**inputs, use_cache=False)
            return out.logits, out
        out = (self.base if self.traced is None else self.traced)(**inputs, use_cache=False)
        self.form = type(out)
        return out.last_hidden_state, out

    def logits(self, states: Tensor) -> Tensor:
        """``states (n, width) -> logits (n, vocabulary)``"""
        if self.whole:
            return states
        nothing = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        with answering(self.base, self.form(last_hidden_state=states[None])):
            return self._forward(input_ids=nothing, use_cache=False).logits[0]

    def balance(self, states: Tensor, out: Any, attention_mask: Tensor | None) -> Tensor | None:
        """What a mixture of experts adds to its loss, so that all experts are asked; None where it is not to."""
        weight = getattr(self.model, "router_aux_loss_coef", None)
        if weight is None or not getattr(self.model.config, "output_router_logits", False):
            return None
        if not self.whole:
            first = states[:, :1]
            with answering(self.base, self.form(last_hidden_state=first, router_logits=out.router_logits)):
                ids = torch.zeros(first.shape[:2], dtype=torch.long, device=states.device)
                out = self._forward(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        loss = getattr(out, "aux_loss", None)
        return None if loss is None else weight * loss

    def trace(self) -> None:
        """From now on what makes the states is compiled; the head, which sees numbers of positions that change, is not."""
        self.traced = torch.compile(self._forward if self.whole else self.base)

    @torch.no_grad()
    def check(self, ids: Tensor, most: int) -> None:
        """Compare with the model's own logits, on the first ``most`` tokens of the first sequence of ``ids``."""
        training, some = self.model.training, ids[:1, :most]
        self.model.eval()
        own = self._forward(input_ids=some, use_cache=False).logits[0]
        for base in (self.base, self.model.get_decoder()):  # OPT's head asks the decoder inside its base model
            self.base, self.whole = base, base is self.model
            if self._agrees(some, own):
                break
        else:
            self.whole = True
        self.model.train(training)

    def _agrees(self, some: Tensor, own: Tensor) -> bool:
        try:
            made = self.logits(self.run(input_ids=some)[0][0].flip(0)).flip(0)  # no position may know where it is
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        return made.shape == own.shape and bool((made - own).abs().max() <= AGREEMENT * own.abs().max())

    def _forward(self, **inputs) -> Any:
        """The method of the class: the instance's is another while the model is healed."""
        return type(self.model).forward(self.model, **inputs)


@contextmanager
def answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Calls of ``module`` return ``answer``."""
    before = module.__dict__.get("forward")
    module.forward = lambda *arguments, **keywords: answer  # hides the method of the class
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
