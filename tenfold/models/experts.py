"""Mixtures of experts: every matrix of an expert as a site of its own.

transformers fuses all experts of a layer in ``gate_up_proj (experts, 2 units, width)`` and ``down_proj (experts, width, units)``.
Unpacking makes ``each.E.gate``, ``each.E.up`` and ``each.E.down`` of them; ``pack`` fuses them again once they are dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tenfold.nn import Expert, Experts

PARTS = ("gate", "up", "down")


def is_fused(module: Any) -> bool:
    """Tell whether ``module`` holds all its experts in fused tensors that can be unpacked.

    Not those with biases, transposed ones, or those whose gate and up rows alternate (gpt_oss).
    """
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and hasattr(module, "act_fn")):
        return False
    plain = not any(getattr(module, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm"))
    return plain and gate_up.ndim == 3 and gate_up.shape[1:] == (2 * down.shape[2], down.shape[1])


def fused_sites(path: str, module: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield ``(path, (out, in))`` of every matrix that the fused experts at ``path`` have once they are unpacked."""
    count, width, units = module.down_proj.shape
    for number in range(count):
        for part in PARTS:
            yield f"{path}.each.{number}.{part}", ((width, units) if part == "down" else (units, width))


def expert_of(path: str) -> int | None:
    """Return the number of the expert of the site ``path``, None outside of experts."""
    found = re.search(r"\.each\.(\d+)\.", path)
    return int(found[1]) if found else None


def active_ratio(config) -> float:
    """Return the ratio of the experts that a token is sent to."""
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", 1)
    return getattr(config, "num_experts_per_tok", count) / count


@torch.no_grad()
def unpack(model: nn.Module) -> bool:
    """Unpack the fused experts of ``model``, in place; return whether there were any."""
    fused: list[tuple[str, Any]] = [(path, module) for path, module in model.named_modules() if is_fused(module)]
    for path, module in fused:
        (count, width, units), like = module.down_proj.shape, module.down_proj
        experts = [Expert(width, units, module.act_fn, "meta", like.dtype) for _ in range(count)]
        for number, expert in enumerate(experts):
            gate, up = module.gate_up_proj[number].chunk(2)
            for part, matrix in zip(PARTS, (gate, up, module.down_proj[number]), strict=True):
                weight = nn.Parameter(matrix.detach().clone(), requires_grad=like.requires_grad)
                getattr(expert, part).weight = weight
        model.set_submodule(path, Experts(experts).train(module.training))
    return bool(fused)


@torch.no_grad()
def pack(experts: Experts, fused: Any) -> nn.Module:
    """Return the module ``fused`` of the architecture with the matrices of ``experts``; pruned hidden units are zero."""
    units, like = fused.down_proj.shape[2], _dense(experts.each[0].get_submodule("down"))
    gate_up, back = (torch.zeros(p.shape).to(like) for p in (fused.gate_up_proj, fused.down_proj))
    for number, expert in enumerate(experts.each):
        gate, up, down = (_dense(getattr(expert, part)) for part in PARTS)
        kept = len(gate)
        gate_up[number, :kept], gate_up[number, units : units + kept], back[number, :, :kept] = gate, up, down
    fused.gate_up_proj, fused.down_proj = nn.Parameter(gate_up), nn.Parameter(back)
    return fused.train(experts.training)


def _dense(module: Any) -> torch.Tensor:
    return module.weight if isinstance(module, nn.Linear) else module.dense()
