"""LoRA by peft on compressed models, whose layers peft does not know by itself."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.sites import FACTORIZED, find_sites


def lora_config(model: PreTrainedModel, roles: list[str] | None = None, **settings: Any) -> LoraConfig:
    """Return peft's configuration of LoRA on the matrices of the blocks of ``model``, compressed or not.

    A dense matrix gets one low-rank part. A compressed one gets one for each of its factors that is a matrix, or a stack of
    matrices; where it is only narrower, that is one, too. peft's ``all-linear`` would leave compressed matrices out.

    Args:
        roles: of the matrices, for instance ``["attn.q", "attn.v"]``; all of the blocks unless given.
        settings: of ``LoraConfig``.

    Raises:
        ValueError: no matrix has these roles.
    """
    modules, parameters = [], []
    for site in find_sites(model):
        if site.layer is None or (roles is not None and site.role not in roles):
            continue
        layer = model.get_submodule(site.path)
        if isinstance(layer, FACTORIZED):
            own = layer.named_parameters(recurse=False)
            parameters += [f"{site.path}.{name}" for name, factor in own if factor.ndim in (2, 3)]
        else:
            modules.append(site.path)
            settings.setdefault("fan_in_fan_out", isinstance(layer, Conv1D))
    if not modules and not parameters:
        raise ValueError(f"no matrix of the blocks has one of the roles {', '.join(roles or [])}; name others")
    return LoraConfig(target_modules=modules, target_parameters=parameters or None, **settings)
