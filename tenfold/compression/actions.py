"""Choice of the actions that carry out the rules of a recipe.

To add an action, write a subclass of ``tenfold.compression.block.Action`` and a line in ``make_actions``.
``CRITERIA`` holds the criteria of pruning, ``FITS`` the approximations of single matrices; ``tenfold.baselines`` adds to both.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from tenfold.compression.block import Action
from tenfold.compression.fit_actions import FactorizeExperts, FactorizeSite, FactorizeStack
from tenfold.compression.head_pruning import PruneHeads
from tenfold.compression.pruning_criteria import LossCriterion
from tenfold.compression.structured_pruning import PruneMlp, PruningCriterion
from tenfold.models.attention_layout import heads_of
from tenfold.models.recipe import Rule
from tenfold.models.sites import Site

CRITERIA: dict[str, Callable[[], PruningCriterion]] = {"loss": LossCriterion}
FITS: dict[str, Callable[[Site, Rule], Action]] = {"loss": FactorizeSite}


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
            roles = _group(sites, lambda site: site.path if site.expert is None else site.role)
            return [
                FactorizeExperts(some, rule) if some[0].expert is not None else FactorizeSite(some[0], rule)
                for some in roles
            ]
        experts = _group(sites, lambda site: site.expert)
        return [FactorizeStack(some, rule) if len(some) > 1 else FactorizeSite(some[0], rule) for some in experts]
    if taken := sorted({site.role for site in block if rule.matches(site) and site not in sites}):
        raise ValueError(
            f"prune: {rule.prune} needs all its matrices, but another rule before it takes {', '.join(taken)} of layer "
            f"{sites[0].layer}; take that rule out, or limit both to different layers"
        )
    criterion = _look_up(CRITERIA, rule)()
    if rule.prune == "mlp":
        return [PruneMlp(some, criterion) for some in _group(sites, lambda site: site.expert)]
    inside = [site.path for site in sites if site.role != "attn.out"]
    heads = heads_of(model, model.get_submodule(inside[0].rpartition(".")[0]))
    if heads is None or not any(site.role == "attn.out" for site in sites):
        raise ValueError(
            f"{', '.join(inside)}: the heads of this attention are not known; fold its matrices one by one"
        )
    return [PruneHeads(sites, heads, criterion)]


def _look_up(table: dict[str, Callable], rule: Rule) -> Callable:
    if rule.criterion not in table:
        raise ValueError(
            f"the rule for {rule.prune or rule.role or rule.path} names criterion {rule.criterion}, which is not for this; "
            f"there are {', '.join(table)}"
        )
    return table[rule.criterion]


def _group(sites: list[Site], key: Callable[[Site], int | str | None]) -> list[list[Site]]:
    """Return ``sites`` grouped by ``key``, in the order in which the groups begin."""
    groups: dict[int | str | None, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return list(groups.values())


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
