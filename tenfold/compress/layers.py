"""Dropping layers: the blocks that change least of what passes through them go, and nothing makes up for them.

What is left is an ordinary, shorter checkpoint.

Reference: ShortGPT, arXiv 2403.03853.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tenfold.compress.calibration import Calibration
from tenfold.compress.influence import cosine_distance
from tenfold.compress.streams import Streams, blocks_of
from tenfold.models.recipe import Recipe
from tenfold.models.sites import find_sites, share_of

NEAR = 1e-3  # of the budget: half of the layers may be left at keep 0.5 although the last norm stays, too


def drop_layers(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Take the blocks of least influence out of ``model``, in place, until the budget is kept.

    Returns:
        ``influence`` of every block of the original model, and which were ``dropped``.

    Raises:
        ValueError: there is no budget, it leaves no block, or the blocks are no single list.
    """
    if recipe.budget is None:
        raise ValueError(f"nothing says how many layers recipe {recipe.name} shall leave; give it a budget, or --keep")
    paths = list(blocks_of(find_sites(model)))
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) != 1 or len(model.get_submodule(next(iter(parents)))) != len(paths):
        raise ValueError(
            f"the blocks of this {model.config.model_type} are no single list; drop layers of another model"
        )
    influence = influences(model, paths, text)
    inside = sum(_size(model.get_submodule(path)) for path in paths)
    base = inside if recipe.budget.of == "sites" else share_of(model, recipe.budget.of)
    excess, dropped = (1 - recipe.budget.keep - NEAR) * base, []
    for path in sorted(paths, key=lambda path: influence[path]):
        if excess > 0:
            dropped.append(path)
            excess -= _size(model.get_submodule(path))
    if len(dropped) == len(paths) or excess > 0:
        raise ValueError(
            f"keep {recipe.budget.keep} of the {recipe.budget.of} leaves none of {len(paths)} layers; keep at least "
            f"{1 - (inside - inside / len(paths)) / base:.2f}"
        )
    remove(model, sorted(int(path.rpartition(".")[2]) for path in dropped))
    return {"influence": influence, "dropped": dropped}


@torch.no_grad()
def influences(model: PreTrainedModel, paths: Sequence[str], text: Calibration) -> dict[str, float]:
    """``{path of a block: 1 - mean cosine of what goes in and what comes out}``."""
    was = model.training
    streams, found = Streams(model.eval(), list(paths), text.batches), {}
    tokens = max(1, sum(int(kept.sum()) for kept in streams.kept))
    for number, path in enumerate(paths):
        before = [streams.states(k)[0] for k in range(len(text.batches))]
        streams.advance(number)
        after = [streams.states(k)[0] for k in range(len(text.batches))]
        parts = zip(before, after, streams.kept, strict=True)
        found[path] = sum(cosine_distance(x.cpu(), y.cpu(), kept) for x, y, kept in parts) / tokens
        if not math.isfinite(found[path]):
            raise ValueError(f"{path} returns NaN or Inf; mend its weights, or try --dtype float32 or other text")
    model.train(was)
    return found


def remove(model: PreTrainedModel, numbers: Sequence[int]) -> None:
    """Take blocks out of ``model``, and their entries out of every list of its configuration that has one per layer."""
    path = next(iter(blocks_of(find_sites(model)))).rpartition(".")[0]
    blocks, config = model.get_submodule(path), model.config.get_text_config()
    count = len(blocks)
    if getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"in this {config.model_type} every {config.decoder_sparse_step}th block has experts, which no configuration says of "
            "other blocks; fold it instead of dropping layers"
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


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
