"""Stock shapes: a compressed model whose matrices are only smaller, and alike in every block, is an ordinary model.

Its plain configuration says smaller numbers, and every program that runs the original runs it. ``find_stock_form`` finds that
configuration; whether it holds is checked by building the model that it describes and comparing every tensor.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.architectures import ARCHITECTURES
from tenfold.models.attention_layout import heads_of
from tenfold.models.experts import unpack
from tenfold.models.sites import FACTORIZED, Site, find_sites

WIDTHS = {  # the keys of a configuration that say how many hidden units each kind of MLP has
    "mlp": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "experts": ("moe_intermediate_size", "intermediate_size"),
    "shared expert": ("shared_expert_intermediate_size",),
}
FACTOR = ".matrix"  # of a dense structure, a weight elsewhere


@dataclass(frozen=True)
class StockForm:
    """Plain configuration of a compressed model, and the plain names of its tensors.

    Args:
        model: of that configuration, on the meta device, with its experts unpacked.
        config: the same configuration.
        transposed: names of tensors that are stored ``(in, out)``.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    transposed: frozenset[str]

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the compressed model under the names, and in the layout, of the plain one."""
        plain = {}
        for name, value in tensors.items():
            name = _plain_name(name)
            plain[name] = value.T.contiguous() if name in self.transposed else value
        return plain

    def published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the compressed model under the names, and in the layout, of a plain checkpoint."""
        table, renamed = ARCHITECTURES[self.config.model_type].stored, {}
        for name, value in self.rename(tensors).items():
            for pattern, other in table:
                name = re.sub(pattern, other, name)
            renamed[name] = value
        return renamed


def mlp_kind(site: Site) -> str:
    """Return which of ``WIDTHS`` a site of an MLP has."""
    if site.expert is not None:
        return "experts"
    return "shared expert" if "shared_expert" in site.path else "mlp"


def stock_config(model: PreTrainedModel, sizes: Mapping[str, int]) -> PretrainedConfig:
    """Return the plain configuration of ``model`` with these numbers of hidden units and of groups of ``heads``.

    Args:
        sizes: by the kinds of ``WIDTHS`` and ``heads``; what is not named stays.
    """
    config: Any = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    text = config.get_text_config()
    for kind, keys in WIDTHS.items():
        known = [key for key in keys if hasattr(text, key)] if kind in sizes else []
        for key in known[:1] if kind == "experts" else known:
            setattr(text, key, sizes[kind])
    heads = _heads(model)
    if heads is not None and sizes.get("heads", heads.groups) != heads.groups:
        text.num_attention_heads = sizes["heads"] * heads.each
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = sizes["heads"]
        text.head_dim = heads.size
    return config


def find_stock_form(model: PreTrainedModel) -> StockForm | None:
    """Return the plain form of a compressed ``model``, None where its shapes are none that a configuration can say."""
    layers = [module for module in model.modules() if isinstance(module, FACTORIZED)]
    if not hasattr(model.config, "quantization_config") or any(
        layer.structure.kind != "dense" or layer.shared for layer in layers
    ):
        return None
    sizes: dict[str, set[int]] = {}
    heads = _heads(model)
    for site in find_sites(model):
        if site.role == "mlp.out":
            sizes.setdefault(mlp_kind(site), set()).add(site.shape[1])
        if site.role == "attn.out" and heads is not None:
            sizes.setdefault("heads", set()).add(site.shape[1] // (heads.each * heads.size))
    if any(len(found) > 1 for found in sizes.values()):
        return None
    try:
        config = stock_config(model, {kind: min(found) for kind, found in sizes.items()})
        with init_empty_weights(include_buffers=False):
            small = type(model)(config)
    except (StrictDataclassError, ValueError):
        return None
    unpack(small)
    transposed = {f"{path}.weight" for path, module in small.named_modules() if isinstance(module, Conv1D)}
    factors = {_plain_name(name) for name in model.state_dict() if name.endswith(FACTOR)}
    form = StockForm(small, config, frozenset(transposed & factors))
    wanted, tied = small.state_dict(), small.all_tied_weights_keys
    meta = {name: torch.empty(value.shape, device="meta") for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in form.rename(meta).items()}
    same = {name: value.shape for name, value in wanted.items() if name in found or name not in tied}
    return form if found == same else None


def stock_head_counts(model: PreTrainedModel) -> list[int]:
    """Return the numbers of groups of heads that a configuration of this model can say, the present one last."""
    heads = _heads(model)
    if heads is None:
        return []
    inner = next(site.shape[1] for site in find_sites(model) if site.role == "attn.out")
    return [k for k in range(1, heads.groups) if _has_heads(model, k, k * inner // heads.groups)] + [heads.groups]


def _has_heads(model: PreTrainedModel, groups: int, inner: int) -> bool:
    """Return whether the configuration of so many groups of heads makes an attention that is ``inner`` wide."""
    try:
        config = stock_config(model, {"heads": groups})
        config.validate()
        with torch.device("meta"):
            small = type(model)(config)
    except (StrictDataclassError, ValueError):
        return False
    return next(site.shape[1] for site in find_sites(small) if site.role == "attn.out") == inner


def _plain_name(name: str) -> str:
    return f"{name.removesuffix(FACTOR)}.weight" if name.endswith(FACTOR) else name


def _heads(model: PreTrainedModel):
    out = next((site for site in find_sites(model) if site.role == "attn.q"), None)
    return None if out is None else heads_of(model, model.get_submodule(out.path.rpartition(".")[0]))
