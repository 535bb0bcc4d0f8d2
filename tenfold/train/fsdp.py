"""Parameters sharded over several processes (FSDP2 under accelerate), and the unsharded model that they make up."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

COMPILED = "_orig_mod."  # the prefix that torch.compile adds to names


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def full_state_dict(trainer: Trainer) -> dict[str, Tensor]:
    """Gather the trained model's state on the first process; a collective call."""
    state: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model)
    return {key.removeprefix(COMPILED): value for key, value in state.items()}


def keep_output_dtype(plugin) -> None:
    """Stop accelerate's FSDP plugin from rounding a model's outputs to bfloat16, which leaves the loss three digits."""
    if plugin.fsdp_version != 2:
        raise ValueError(
            "parameters are sharded by FSDP's second version only; give accelerate launch --fsdp_version 2"
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


class UnshardedShell:
    """Copy of ``model`` without parameter values, made before it is sharded, which changes modules and classes in place.

    ``fill`` turns ``model`` back into what it was, with its current parameters: in every process, on the CPU.
    """

    def __init__(self, model: nn.Module):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
        forward = model.__dict__.get("forward")  # may hold a teacher, and is not copied
        self.model, self.twin = model, copy.deepcopy(model, empty | {id(forward): forward})

    @torch.no_grad()
    def fill(self) -> None:
        """Gather the parameters and restore the model; a collective call."""
        for name, parameter in self.twin.named_parameters():
            value = unshard(self.model.get_parameter(name)).detach().cpu()
            torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))
        for module in self.twin.modules():
            buffers = module._buffers.items()
            module._buffers.update({name: value if value is None else value.cpu() for name, value in buffers})
        self.model.__class__, self.model.__dict__ = self.twin.__class__, self.twin.__dict__


def unshard(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a whole, and any other one as it is; a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
