"""Layer dropping: the blocks that change the hidden states least go, and nothing compensates for them.

The result is an ordinary, shorter checkpoint.

Reference: ShortGPT, arXiv 2403.03853.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tenfold.compression.activations import Activations
from tenfold.compression.calibration import Calibration
from tenfold.compression.fisher import FisherPass
from tenfold.models.depth import remove_blocks
from tenfold.models.recipe import Recipe
from tenfold.models.sites import count_parameters, find_sites, group_by_block

TOLERANCE = 1e-3  # of the budget: half of the layers may stay at keep 0.5 although the last norm stays, too


def drop_layers(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Remove the blocks of least influence from ``model``, in place, until the budget is met.

    Returns:
        ``influence`` of every block of the original model, and which were ``dropped``.

    Raises:
        ValueError: see ``count_excess`` and ``drop_one_by_one``.
    """
    paths, excess = count_excess(model, recipe)
    influence = measure_influence(model, paths, text)
    dropped = drop_one_by_one(model, paths, excess, lambda left: min(left, key=influence.__getitem__))
    return {"influence": influence, "dropped": dropped}


def count_excess(model: PreTrainedModel, recipe: Recipe) -> tuple[list[str], float]:
    """Return the paths of the blocks, and how many of their parameters must go to meet the budget within a thousandth.

    Raises:
        ValueError: the blocks are not in one list, there is no budget, or it leaves no block.
    """
    paths = list(group_by_block(find_sites(model)))
    parents: list[Any] = [model.get_submodule(path) for path in {path.rpartition(".")[0] for path in paths}]
    if len(parents) != 1 or len(parents[0]) != len(paths):
        raise ValueError(
            f"the blocks of this {model.config.model_type} are no single list; drop layers of another model"
        )
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
    return paths, excess


def drop_one_by_one(
    model: PreTrainedModel, paths: Sequence[str], excess: float, choose: Callable[[list[str]], str]
) -> list[str]:
    """Remove blocks from ``model``, in place, until ``excess`` parameters are gone; return their paths in the order of removal.

    Args:
        paths: of all blocks.
        choose: receives the paths of the remaining blocks, in order, and returns the one to remove. The model is whole until the
            last one is chosen.

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


def measure_influence(model: PreTrainedModel, paths: Sequence[str], text: Calibration) -> dict[str, float]:
    """Return ``{path of a block: influence}``; see ``tenfold.compression.fisher.FisherPass.forward``."""
    training = model.training
    fisher_pass, found = FisherPass(Activations(model.eval(), list(paths), text.batches)), {}
    for number, path in enumerate(paths):
        found[path] = fisher_pass.forward(number, [])
        fisher_pass.release(number)
    model.train(training)
    return found


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
