"""Matrices of a model: their places, their roles, and their layout in the modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.architectures import ARCHITECTURES, ROLES
from tenfold.models.experts import active_ratio, expert_of, fused_sites, is_fused
from tenfold.nn import FactorizedEmbedding, FactorizedLinear, TiedHead

LINEAR = (nn.Linear, Conv1D, FactorizedLinear)
FACTORIZED = (FactorizedLinear, FactorizedEmbedding)


@dataclass(frozen=True)
class Site:
    """Matrix of a model.

    Args:
        path: of its module, from the top of the model.
        role: one of ``architectures.ROLES``.
        layer: the number of its block, None for embeddings and heads; an encoder and a decoder both count from 0.
        shape: ``(out, in)``; a Conv1D is seen like a Linear, an embedding is ``(vocabulary, width)``.
        bias: whether its module has a bias.
        calls: the calls of the module in one forward pass; for an expert the ratio of the tokens that it gets.
        interleaved: whether it holds several matrices with alternating rows, so that it can't be split.
    """

    path: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    bias: bool
    calls: float = 1
    interleaved: bool = False

    @property
    def expert(self) -> int | None:
        """Return the number of its expert, None outside of experts."""
        return expert_of(self.path)


def shape_of(module: Any) -> tuple[int, int]:
    """Return ``(out, in)`` of a linear layer or an embedding; a Conv1D is transposed."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def weight_of(module: Any) -> Tensor:
    """Return ``W (out, in)`` of a linear layer or an embedding, dense or factorised."""
    if isinstance(module, (*FACTORIZED, TiedHead)):
        return module.dense()
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module of a site, None where it is part of fused experts."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def base_path(model: PreTrainedModel) -> str:
    """Return the path of the base model with a dot, empty where ``model`` is the base model itself."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def base_model(model: PreTrainedModel) -> nn.Module:
    """Return the base model, ``model`` itself where it is one."""
    return model.get_submodule(base_path(model).rstrip("."))


class PathPatterns:
    """Patterns of module paths, ``*`` a number, by what each stands for."""

    def __init__(self, paths: Mapping[str, str | tuple[str, ...]], prefix: str):
        self.patterns = [
            (re.compile(re.escape(prefix + path).replace(r"\*", r"(\d+)") + "$"), name)
            for name, found in paths.items()
            for path in ([found] if isinstance(found, str) else found)
        ]

    def match(self, path: str) -> tuple[int | None, str | None]:
        """Return the first number in ``path`` and the name of its pattern, None for what there is not."""
        for pattern, name in self.patterns:
            if found := pattern.match(path):
                return (int(found[1]) if found.groups() else None), name
        return None, None


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Find every matrix of ``model`` that a rule may name, in the model's order, embedding and head included.

    Raises:
        ValueError: the architecture has no table; the message lists the linear layers that were found.
    """
    if model.config.model_type not in ARCHITECTURES:
        raise ValueError(_describe_unknown(model))
    table = ARCHITECTURES[model.config.model_type]
    patterns, calls = PathPatterns(table.paths, base_path(model)), table.calls(model.config)
    outer = {id(model.get_input_embeddings()): "embed", id(model.get_output_embeddings()): "head"}
    sites = []
    for path, module in model.named_modules():
        if is_fused(module):
            for inner, shape in fused_sites(path, module):
                layer, role = patterns.match(inner)
                if role is not None:
                    sites.append(Site(inner, role, layer, shape, False, active_ratio(model.config)))
        elif id(module) in outer or isinstance(module, LINEAR):
            layer, role = (None, outer[id(module)]) if id(module) in outer else patterns.match(path)
            if role is not None:
                runs = (1 if layer is None else calls) * (1 if expert_of(path) is None else active_ratio(model.config))
                bias = getattr(module, "bias", None) is not None
                sites.append(Site(path, role, layer, shape_of(module), bias, runs, role in table.interleaved))
    return sites


def group_by_block(sites: list[Site]) -> dict[str, list[Site]]:
    """Return ``{path of a block: its sites}`` in the order of the model."""
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        if site.layer is not None:
            block = re.match(rf"(.*?\.|){site.layer}(?=\.)", site.path)
            assert block is not None
            blocks.setdefault(block[0], []).append(site)
    return blocks


def head_path(model: PreTrainedModel) -> str | None:
    """Return the path of the output head, None where there is none."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def is_tied(model: PreTrainedModel) -> bool:
    """Tell whether the output head has no matrix of its own.

    The tied keys of this model count, not its configuration: that of T5 says "tied" even where a checkpoint has a head of its
    own.
    """
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or isinstance(head, TiedHead):
        return head is not None
    name, ties = f"{head_path(model)}.weight", model.all_tied_weights_keys
    return name in {*ties, *ties.values()} or getattr(head, "weight", 0) is getattr(embed, "weight", 1)


def forget_tie(model: PreTrainedModel, name: str) -> None:
    """Remove the parameter ``name`` from what transformers ties, in this model and in the models inside it."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and isinstance(module._tied_weights_keys, dict):
            own = name.removeprefix(f"{path}.") if path else name
            module._tied_weights_keys = {k: v for k, v in module._tied_weights_keys.items() if own not in (k, v)}
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if name not in (k, v)}


def _describe_unknown(model: PreTrainedModel) -> str:
    kind, prefix = model.config.model_type, base_path(model)
    seen = {
        re.sub(r"\b\d+\b", "*", path.removeprefix(prefix)): shape_of(module)
        for path, module in model.named_modules()
        if isinstance(module, LINEAR)
    }
    layers = ", ".join(f"{path} {shape[0]}x{shape[1]}" for path, shape in list(seen.items())[:24])
    near = get_close_matches(kind, ARCHITECTURES, 1)
    hint = f" (is it like {near[0]!r}?)" if near else ""
    return (
        f"there is no role table for model_type {kind!r}{hint}; its linear layers (out x in) are {layers}; write one, "
        f'with the roles {", ".join(ROLES)}: tenfold.models.architectures.ARCHITECTURES["{kind}"] = '
        f'Architecture({{"mlp.in": "{next(iter(seen), "layers.*.up")}", ...}})'
    )


def count_parameters(model: PreTrainedModel, of: str) -> int:
    """Count the parameters of a part of ``model``, each tensor once; see ``part_of``."""
    return sum(parameter.numel() for parameter in part_of(model, of).values())


def part_of(model: PreTrainedModel, of: str) -> dict[str, nn.Parameter]:
    """Return ``{name: parameter}`` of a part of ``model``, each tensor once.

    Args:
        of: ``model``; ``without_head``: without an output matrix of its own; ``blocks``: without its embeddings (of tokens,
            positions and types) and its output head.

    Raises:
        ValueError: ``of`` is ``flops`` or ``bytes``, which are no parts of the parameters.
    """
    if of in ("flops", "bytes"):
        raise ValueError(
            f"a budget of {of} is for rules that a calibration text guides (--calibrate FILE); here take model, "
            "without_head or blocks"
        )
    sites, outer = find_sites(model), []
    if of == "without_head" and not is_tied(model):
        outer = [model.get_submodule(site.path) for site in sites if site.role == "head"]
    elif of == "blocks":
        outer = [model.get_submodule(site.path) for site in sites if site.role in ("embed", "head")]
        outer += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(p) for module in outer for name, p in module.named_parameters() if of == "blocks" or name != "bias"}
    return {name: p for name, p in model.named_parameters() if id(p) not in left_out}


def resolve(model: PreTrainedModel, path: str) -> str | None:
    """Return the path of a checkpoint's site in ``model``: a causal model has ``transformer.h.0``, its base model ``h.0``."""
    prefix = model.base_model_prefix + "."
    candidates = (path, path.removeprefix(prefix), prefix + path)
    return next((candidate for candidate in candidates if module_at(model, candidate) is not None), None)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
