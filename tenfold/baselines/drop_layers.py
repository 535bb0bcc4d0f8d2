"""Layer dropping: the blocks that change the hidden states least go, and nothing compensates for them.

The result is an ordinary, shorter checkpoint.

Reference: ShortGPT, arXiv 2403.03853.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tenfold.compression.activations import Activations, group_by_block
from tenfold.compression.block_influence import cosine_distance
from tenfold.compression.calibration import Calibration
from tenfold.models.recipe import Recipe
from tenfold.models.sites import count_parameters, find_sites

TOLERANCE = 1e-3  # of the budget: half of the layers may stay at keep 0.5 although the last norm stays, too


def drop_layers(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Remove the blocks of least influence from ``model``, in place, until the budget is met.

    Returns:
        ``influence`` of every block of the original model, and which were ``dropped``.

    Raises:
        ValueError: see ``list_blocks``, ``count_excess`` and ``drop_one_by_one``.
    """
    paths = list_blocks(model)
    excess = count_excess(model, recipe, paths)
    influence = measure_influence(model, paths, text)
    dropped = drop_one_by_one(model, paths, excess, lambda left: min(left, key=influence.__getitem__))
    return {"influence": influence, "dropped": dropped}


def list_blocks(model: PreTrainedModel) -> list[str]:
    """Return the paths of the blocks of ``model`` in the order in which they run.

    Raises:
        ValueError: they are not in one list.
    """
    paths = list(group_by_block(find_sites(model)))
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) != 1 or len(model.get_submodule(next(iter(parents)))) != len(paths):
        raise ValueError(
            f"the blocks of this {model.config.model_type} are no single list; drop layers of another model"
        )
    return paths


def count_excess(model: PreTrainedModel, recipe: Recipe, paths: Sequence[str]) -> float:
    """Return how many parameters of the blocks ``paths`` must go to meet the budget of ``recipe`` within a thousandth.

    Raises:
        ValueError: there is no budget, or it leaves no block.
    """
    if recipe.budget is None:
        raise ValueError(f"nothing says how many layers recipe {recipe.name} shall leave; give it a budget, or --keep")
    sizes = [_size(model.get_submodule(path)) for path in paths]
    base = sum(sizes) if recipe.budget.of == "sites" else count_parameters(model, recipe.budget.of)
    excess = (1 - recipe.budget.keep - TOLERANCE) * base
    if excess > sum(sizes) - min(sizes):
        raise ValueError(
            f"keep {recipe.budget.keep} of the {recipe.budget.of} leaves none of {len(sizes)} layers; keep at least "
            f"{1 - (sum(sizes) - sum(sizes) / len(sizes)) / base:.2f}"
        )
    return excess


def drop_one_by_one(
    model: PreTrainedModel, paths: Sequence[str], excess: float, choose: Callable[[list[str]], str]
) -> list[str]:
    """Remove blocks from ``model``, in place, until ``excess`` parameters are gone.

    Args:
        paths: of all blocks.
        choose: receives the paths of the remaining blocks, in order, and returns the one to remove. The model is whole until the
            last one is chosen.

    Returns:
        The paths of the removed blocks, in the order in which they were chosen.

    Raises:
        ValueError: the last block would have to go, too.
    """
    left, dropped = list(paths), list[str]()
    while excess > 0:
        if len(left) == 1:
            raise ValueError(f"{excess:,.0f} parameters of {left[0]}, the last block, would have to go, too; keep more")
        dropped.append(choose(left))
        left.remove(dropped[-1])
        excess -= _size(model.get_submodule(dropped[-1]))
    remove_blocks(model, sorted(int(path.rpartition(".")[2]) for path in dropped))
    return dropped


@torch.no_grad()
def measure_influence(model: PreTrainedModel, paths: Sequence[str], text: Calibration) -> dict[str, float]:
    """Return ``{path of a block: 1 - mean cosine of its input and its output}``."""
    training = model.training
    activations, found = Activations(model.eval(), list(paths), text.batches), {}
    for number, path in enumerate(paths):
        before = [activations.states(k)[0] for k in range(len(text.batches))]
        activations.advance(number)
        after = [activations.states(k)[0] for k in range(len(text.batches))]
        parts = zip(before, after, activations.masks, strict=True)
        distance = sum(cosine_distance(x.cpu(), y.cpu(), mask) for x, y, mask in parts)
        found[path] = distance / max(1, activations.num_tokens)
        if not math.isfinite(found[path]):
            raise ValueError(f"{path} returns NaN or Inf; mend its weights, or try --dtype float32 or other text")
    model.train(training)
    return found


def remove_blocks(model: PreTrainedModel, numbers: Sequence[int]) -> None:
    """Remove blocks from ``model``, and their entries from every list of its configuration that has one per layer."""
    path = next(iter(group_by_block(find_sites(model)))).rpartition(".")[0]
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
