"""The matrices of a model: where they are, what they are for, and how they are laid out in their module."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.roles import ARCHITECTURES
from tenfold.nn import FactorizedEmbedding, FactorizedLinear, TiedHead

LINEAR = (nn.Linear, Conv1D, FactorizedLinear)


@dataclass(frozen=True)
class Site:
    """One matrix of a model.

    Args:
        path: its module, from the top of the model.
        role: what it is for; see ``roles.ROLES``.
        layer: the number of its block, None for embeddings and heads.
        shape: ``(out, in)``; a Conv1D is seen like a Linear, an embedding is ``(vocabulary, width)``.
        bias: whether its module has a bias.
        calls: how often the module runs in one forward pass.
    """

    path: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    bias: bool
    calls: int = 1


def shape_of(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer or an embedding; the one place that knows that Conv1D is transposed."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def weight_of(module: nn.Module) -> Tensor:
    """``W (out, in)`` of a linear layer or an embedding, dense or folded."""
    if isinstance(module, FactorizedLinear | FactorizedEmbedding):
        return module.dense()
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def base_path(model: PreTrainedModel) -> str:
    """The path of the base model with a dot, empty where ``model`` is the base model itself."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Every matrix of ``model`` that a rule may name, in the model's order, embedding and head included.

    Raises:
        ValueError: the architecture has no table; the message lists the linear layers that were found.
    """
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(_unknown(model))
    table, prefix = ARCHITECTURES[kind], base_path(model)
    patterns = [
        (re.compile(re.escape(prefix + path).replace(r"\*", r"(\d+)") + "$"), role)
        for role, paths in table.paths.items()
        for path in ([paths] if isinstance(paths, str) else paths)
    ]
    calls, sites = table.calls(model.config), []
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is embed:
            sites.append(Site(path, "embed", None, shape_of(module), False))
        elif module is head:
            sites.append(Site(path, "head", None, shape_of(module), getattr(module, "bias", None) is not None))
        elif isinstance(module, LINEAR) and (found := _match(patterns, path)):
            layer, role = found
            runs = 1 if layer is None else calls
            sites.append(Site(path, role, layer, shape_of(module), getattr(module, "bias", None) is not None, runs))
    return sites


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head has no matrix of its own."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    return isinstance(head, TiedHead) or (head is not None and getattr(head, "weight", 0) is getattr(embed, "weight", 1)) or (
        head is not None and bool(model.config.tie_word_embeddings) and not isinstance(head, FactorizedLinear)
    )


def _match(patterns, path: str) -> tuple[int | None, str] | None:
    for pattern, role in patterns:
        if found := pattern.match(path):
            return (int(found[1]) if found.groups() else None), role
    return None


def _unknown(model: PreTrainedModel) -> str:
    prefix = base_path(model)
    seen = {
        re.sub(r"\d+", "*", path.removeprefix(prefix)): tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, LINEAR)
    }
    layers = ", ".join(f"{path} {shape}" for path, shape in list(seen.items())[:24])
    near = get_close_matches(model.config.model_type, ARCHITECTURES, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"there is no role table for model_type {model.config.model_type!r}{hint}; its linear layers are: {layers}; register one "
        f'with tenfold.models.roles.ARCHITECTURES["{model.config.model_type}"] = Architecture({{"mlp.in": "<path with *>", ...}})'
    )


def resolve(model: PreTrainedModel, path: str) -> str | None:
    """The path of a checkpoint's site in ``model``: a causal model says ``transformer.h.0``, its base model ``h.0``."""
    prefix = model.base_model_prefix + "."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
