"""Removal of whole blocks: the model is an ordinary, shorter one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tenfold.models.sites import find_sites, group_by_block


def block_list(model: PreTrainedModel) -> str | None:
    """Return the path of the list that holds every block of ``model``, None where the blocks are in no single list."""
    paths = list(group_by_block(find_sites(model)))
    parents = {path.rpartition(".")[0] for path in paths}
    blocks: Any = model.get_submodule(next(iter(parents)))
    return parents.pop() if len(parents) == 1 and len(blocks) == len(paths) else None


def remove_blocks(model: PreTrainedModel, numbers: Sequence[int]) -> None:
    """Remove blocks from ``model``, and their entries from every list of its configuration that has one per layer."""
    path = next(iter(group_by_block(find_sites(model)))).rpartition(".")[0]
    blocks: Any = model.get_submodule(path)
    config, count = model.config.get_text_config(), len(blocks)
    if getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"in this {config.model_type} every {config.decoder_sparse_step}th block has experts, which no configuration says of "
            "other blocks; factorise it instead of dropping layers"
        )
    left = [k for k in range(count) if k not in numbers]
    model.set_submodule(path, nn.ModuleList(blocks[k] for k in left))
    for number, k in enumerate(left):
        for module in blocks[k].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count and key not in ("architectures", "mlp_only_layers"):
            setattr(config, key, [value[k] for k in left])
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [number for number, k in enumerate(left) if k in config.mlp_only_layers]
    config.num_hidden_layers = len(left)
