"""Parameters that lie in parts on several processes (FSDP2 under accelerate), and the whole model that they are."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

COMPILED = "_orig_mod."  # what torch.compile puts in front of names


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """The trained model's state, collected from all processes, which have to call it together; the first one gets it."""
    state = trainer.accelerator.get_state_dict(trainer.model)
    return {key.removeprefix(COMPILED): value for key, value in state.items()}


def losses_as_they_are(plugin) -> None:
    """Of accelerate: it would round what a model returns to bfloat16, the loss, too, which then has three digits.

    Raises:
        ValueError: it is FSDP's first version, which lays parameters end to end.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            "parameters are shared out by FSDP's second version only; give accelerate launch --fsdp_version 2"
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


class UnshardedShell:
    """What ``model`` is before its parameters are shared out, without their numbers.

    Sharding is done in place, to modules and classes. :meth:`fill` makes ``model`` what it was, with the numbers that its parts
    have now: in every process, on the processor.
    """

    def __init__(self, model: nn.Module):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
        own = model.__dict__.get("forward")  # of this very model, with a teacher, maybe
        self.model, self.twin = model, copy.deepcopy(model, empty | {id(own): own})

    @torch.no_grad()
    def fill(self) -> None:
        """All processes have to call it together."""
        for name, parameter in self.twin.named_parameters():
            value = self.model.get_parameter(name)
            value = value.full_tensor() if isinstance(value, DTensor) else value
            torch.utils.swap_tensors(parameter, nn.Parameter(value.detach().cpu(), parameter.requires_grad))
        for module in self.twin.modules():
            module._buffers.update(
                {name: value if value is None else value.cpu() for name, value in module._buffers.items()}
            )
        self.model.__class__, self.model.__dict__ = self.twin.__class__, self.twin.__dict__
