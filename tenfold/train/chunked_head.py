"""Logits of a few positions at a time: those of a whole batch are the largest tensor of training, and never needed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.models.sites import base_model

TOLERANCE = 1e-2  # relative to the largest logit; bfloat16 rounds by 0.8%


class ChunkedHead:
    """A model in two parts: the hidden states in front of its output head, and the logits of some of them.

    The head is the model's own ``forward`` in which the base model returns the given states, so that soft caps, scales,
    transforms and biases apply. ``verify`` compares with the logits of the whole model; where they differ, ``whole`` is set
    and the logits themselves take the place of the states.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.base = model, base_model(model)
        self.whole = self.base is model
        self.output_class: Any = None
        self.compiled: Callable[..., Any] | None = None

    def compute_states(self, **inputs) -> tuple[Tensor, Any]:
        """Return states ``(batch, length, width)`` and the whole output for the model's inputs."""
        if self.whole:
            out = (self._forward if self.compiled is None else self.compiled)(**inputs, use_cache=False)
            return out.logits, out
        out = (self.base if self.compiled is None else self.compiled)(**inputs, use_cache=False)
        self.output_class = type(out)
        return out.last_hidden_state, out

    def compute_logits(self, states: Tensor) -> Tensor:
        """Return the logits ``(n, vocabulary)`` of ``states (n, width)``."""
        if self.whole:
            return states
        return self._run_head(states[None]).logits[0]

    def router_loss(self, states: Tensor, out: Any, attention_mask: Tensor | None) -> Tensor | None:
        """Return the weighted load-balancing loss of a mixture of experts, or None where the model adds none."""
        weight = getattr(self.model, "router_aux_loss_coef", None)
        if weight is None or not getattr(self.model.config, "output_router_logits", False):
            return None
        if not self.whole:
            out = self._run_head(states[:, :1], attention_mask, router_logits=out.router_logits)
        loss = getattr(out, "aux_loss", None)
        return None if loss is None else weight * loss

    def _run_head(self, states: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        """Run the model's forward with the base model's output replaced by ``states (batch, length, width)``."""
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        with replace_forward(self.base, self.output_class(last_hidden_state=states, **more)):
            return self._forward(input_ids=ids, **given, use_cache=False)

    def compile(self) -> None:
        """Compile what computes the states; the head, whose number of positions varies, stays eager."""
        self.compiled = torch.compile(self._forward if self.whole else self.base)

    @torch.no_grad()
    def verify(self, ids: Tensor, limit: int) -> None:
        """Compare with the model's own logits on the first ``limit`` tokens of the first sequence of ``ids``."""
        training, ids = self.model.training, ids[:1, :limit]
        self.model.eval()
        expected = self._forward(input_ids=ids, use_cache=False).logits[0]
        for base in (self.base, self.model.get_decoder()):  # OPT's head calls the decoder inside its base model
            self.base, self.whole = base, base is self.model
            if self._agrees(ids, expected):
                break
        else:
            self.whole = True
        self.model.train(training)

    def _agrees(self, ids: Tensor, expected: Tensor) -> bool:
        try:  # in reverse order: the logits of a state must not depend on its position
            logits = self.compute_logits(self.compute_states(input_ids=ids)[0][0].flip(0)).flip(0)
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        return logits.shape == expected.shape and bool(
            (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
        )

    def _forward(self, **inputs) -> Any:
        """Run the forward of the class: the instance's is replaced during distillation."""
        return type(self.model).forward(self.model, **inputs)


@contextmanager
def replace_forward(module: nn.Module, output: Any) -> Iterator[None]:
    """Let calls of ``module`` return ``output`` within the context."""
    before = module.__dict__.get("forward")
    module.forward = lambda *arguments, **keywords: output  # an instance attribute hides the method of the class
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
