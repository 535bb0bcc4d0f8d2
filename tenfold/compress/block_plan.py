"""What a recipe asks for, block by block."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from tenfold.compress.actions import Action, actions_for
from tenfold.compress.activations import blocks_of
from tenfold.models.recipe import Recipe
from tenfold.models.sites import Site, find_sites


@dataclass
class BlockPlan:
    """What is to be done in one block."""

    path: str
    sites: list[Site]
    actions: list[Action]


def plan_work(model: PreTrainedModel, recipe: Recipe) -> list[BlockPlan]:
    """The actions of every block; of several rules the first that matches a site wins.

    Raises:
        ValueError: a rule matches nothing in the blocks.
    """
    blocks, used, works = blocks_of(find_sites(model)), set(), []
    for path, sites in blocks.items():
        matched: dict[int, list[Site]] = {}
        for site in sites:
            number = next((k for k, rule in enumerate(recipe.replace) if rule.matches(site)), None)
            if number is not None:
                matched.setdefault(number, []).append(site)
        used |= matched.keys()
        actions = [a for k, found in matched.items() for a in actions_for(model, recipe.replace[k], found, sites)]
        # what experts read comes first, so that one pass tells what all of them make of it
        actions.sort(
            key=lambda action: all(site.expert is not None and site.role == "mlp.out" for site in action.sites)
        )
        works.append(BlockPlan(path, sites, actions))
    for k, rule in enumerate(recipe.replace):
        if k not in used:
            raise ValueError(
                f"no matrix in the blocks of this {model.config.model_type} matches role {rule.role or rule.narrow}"
            )
    return works
