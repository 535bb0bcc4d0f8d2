"""Choice of the actions that carry out the rules of a recipe.

To add an action, write a subclass of ``tenfold.compression.block.Action`` and a line in ``make_actions``.
``CRITERIA`` holds the criteria of pruning, ``FITS`` the approximations of single matrices; ``tenfold.baselines`` adds to both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tenfold.compression.block import Action
from tenfold.compression.fit_actions import FactorizeExperts, FactorizeSite, FactorizeStack
from tenfold.compression.group_pruning import PruneGroups
from tenfold.compression.head_pruning import PruneHeads
from tenfold.compression.pruning_criteria import LossCriterion
from tenfold.compression.structured_pruning import PruneMlp, PruningCriterion
from tenfold.models.attention_layout import heads_of
from tenfold.models.recipe import Recipe, Rule
from tenfold.models.sites import Site, find_sites, group_by_block
from tenfold.models.stock import stock_head_counts

CRITERIA: dict[str, Callable[[], PruningCriterion]] = {"loss": LossCriterion}
FITS: dict[str, Callable[[Site, Rule], Action]] = {"loss": FactorizeSite}


@dataclass
class BlockPlan:
    """Actions in one block."""

    path: str
    sites: list[Site]
    actions: list[Action]


def plan_blocks(model: PreTrainedModel, recipe: Recipe) -> list[BlockPlan]:
    """Return the actions of every block; the first rule that matches a site wins.

    Raises:
        ValueError: a rule matches nothing in the blocks.
    """
    used, plans = set(), []
    for path, sites in group_by_block(find_sites(model)).items():
        matched = _group(sites, lambda site: next((k for k, r in enumerate(recipe.replace) if r.matches(site)), None))
        used |= matched.keys()
        rules = [(recipe.replace[k], found) for k, found in matched.items() if k is not None]
        actions = [action for rule, found in rules for action in make_actions(model, rule, found, sites)]
        # what experts read comes first, so that one pass collects the inputs of all their output matrices
        actions.sort(key=lambda one: all(site.expert is not None and site.role == "mlp.out" for site in one.sites))
        plans.append(BlockPlan(path, sites, actions))
    for k, rule in enumerate(recipe.replace):
        if k not in used and rule.prune != "embedding":  # outside of the blocks
            raise ValueError(
                f"no matrix in the blocks of this {model.config.model_type} matches role {rule.role or rule.prune}"
            )
    return plans


def make_actions(model: PreTrainedModel, rule: Rule, sites: list[Site], block: list[Site]) -> list[Action]:
    """Return the actions of ``rule`` for the ``sites`` that it gets of one ``block``.

    Raises:
        ValueError: the rule prunes heads that are not known, or names a method for something else.
    """
    if rule.prune is None:
        _check_supported(rule)
        if rule.share is None:
            fit = _look_up(FITS, rule)
            return [fit(site, rule) for site in sites]
        if rule.share.across == "experts":
            roles = _group(sites, lambda site: site.path if site.expert is None else site.role).values()
            return [
                FactorizeExperts(some, rule) if some[0].expert is not None else FactorizeSite(some[0], rule)
                for some in roles
            ]
        stacks = _group(sites, lambda site: site.expert).values()
        return [FactorizeStack(some, rule) if len(some) > 1 else FactorizeSite(some[0], rule) for some in stacks]
    if taken := sorted({site.role for site in block if rule.matches(site) and site not in sites}):
        raise ValueError(
            f"prune: {rule.prune} needs all its matrices, but another rule before it takes {', '.join(taken)} of layer "
            f"{sites[0].layer}; take that rule out, or limit both to different layers"
        )
    criterion = _look_up(CRITERIA, rule)()
    if rule.prune == "mlp":
        return [PruneMlp(some, criterion) for some in _group(sites, lambda site: site.expert).values()]
    inside = [site.path for site in sites if site.role != "attn.out"]
    heads = heads_of(model, model.get_submodule(inside[0].rpartition(".")[0]))
    if heads is None or not any(site.role == "attn.out" for site in sites):
        raise ValueError(
            f"{', '.join(inside)}: the heads of this attention are not known; factorise its matrices one by one"
        )
    if rule.prune == "heads":
        return [PruneGroups(sites, heads)] if len(stock_head_counts(model)) > 1 else []
    return [PruneHeads(sites, heads, criterion)]


def _look_up(table: dict[str, Callable], rule: Rule) -> Callable:
    if rule.criterion not in table:
        raise ValueError(
            f"the rule for {rule.prune or rule.role or rule.path} names criterion {rule.criterion}, which is not for this; "
            f"there are {', '.join(table)}"
        )
    return table[rule.criterion]


def _group(sites: list[Site], key: Callable[[Site], int | str | None]) -> dict[Any, list[Site]]:
    """Return ``sites`` by their ``key``, in the order in which the keys first occur."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return groups


def _check_supported(rule: Rule) -> None:
    """Raise ValueError for fields of a rule that are not supported with activations."""
    fields = {"split": rule.split > 1, "adapter": rule.adapter_rank, "freeze": rule.freeze}
    fields["share across layers"] = rule.share is not None and rule.share.across in ("layers", "all")
    fields["a mask"] = rule.share is not None and rule.share.grad_dropout
    if wrong := [name for name, value in fields.items() if value]:
        raise ValueError(
            f"the rule for role {rule.role} asks for {', '.join(wrong)}, which is not done with a calibration text; drop it, "
            "or compress without --calibrate"
        )
