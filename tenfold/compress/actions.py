"""What can be done to the matrices of a block: each action prices what a site, or several together, could become, and
carries the choice out.

Add an action by writing a class with ``curves`` and ``apply`` and a line in :func:`actions_for`, a way to choose what stays
by a line in ``CRITERIA``, a way to fill single matrices by a line in ``FITS``; :mod:`tenfold.baselines` adds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from transformers import PreTrainedModel

from tenfold.compress.allocate import TradeoffCurve
from tenfold.compress.block import Block
from tenfold.compress.fit_actions import Fold, FoldExperts, FoldTogether
from tenfold.compress.head_pruning import NarrowHeads
from tenfold.compress.structured_pruning import ByLoss, NarrowMlp, PruningCriterion
from tenfold.models.attention_layout import heads_of
from tenfold.models.recipe import Rule
from tenfold.models.sites import Site


class Action(Protocol):
    """One item, or several, of a block."""

    sites: list[Site]

    def curves(self, block: Block) -> list[TradeoffCurve]:
        """What its items could become, judged by the original model."""
        ...

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        """Carry out the options that were chosen, by the names of the curves."""
        ...


CRITERIA: dict[str, Callable[[], PruningCriterion]] = {"loss": ByLoss}
FITS: dict[str, Callable[[Site, Rule], Action]] = {"loss": Fold}


def actions_for(model: PreTrainedModel, rule: Rule, sites: list[Site], block: list[Site]) -> list[Action]:
    """What ``rule`` asks for in one block, of whose sites it gets ``sites``.

    Raises:
        ValueError: the rule narrows heads that are not known, or names a method that is for something else.
    """
    if rule.narrow is None:
        _check_plain(rule)
        if rule.share is None:
            return [_by_method(FITS, rule)(site, rule) for site in sites]
        if rule.share.across == "experts":
            return _across_experts(sites, rule)
        return [FoldTogether(some, rule) if len(some) > 1 else Fold(some[0], rule) for some in _by_expert(sites)]
    _check_whole(rule, sites, block)
    chooser = _by_method(CRITERIA, rule)()
    if rule.narrow == "mlp":
        return [NarrowMlp(some, chooser) for some in _by_expert(sites)]
    inside = [site.path for site in sites if site.role != "attn.out"]
    heads = heads_of(model, model.get_submodule(inside[0].rpartition(".")[0]))
    if heads is None or not any(site.role == "attn.out" for site in sites):
        raise ValueError(
            f"{', '.join(inside)}: the heads of this attention are not known; fold its matrices one by one"
        )
    return [NarrowHeads(sites, heads, chooser)]


def _by_method(ways: dict[str, Callable], rule: Rule) -> Callable:
    if rule.method not in ways:
        raise ValueError(
            f"the rule for {rule.narrow or rule.role or rule.path} names method {rule.method}, which is not for this; there are "
            f"{', '.join(ways)}"
        )
    return ways[rule.method]


def _by_expert(sites: list[Site]) -> list[list[Site]]:
    """Those of one expert together; without experts all."""
    found: dict[int | None, list[Site]] = {}
    for site in sites:
        found.setdefault(site.expert, []).append(site)
    return list(found.values())


def _across_experts(sites: list[Site], rule: Rule) -> list[Action]:
    """Every role of the experts in one action; what is in no expert by itself."""
    roles: dict[str, list[Site]] = {}
    for site in sites:
        roles.setdefault(site.path if site.expert is None else site.role, []).append(site)
    return [FoldExperts(some, rule) if some[0].expert is not None else Fold(some[0], rule) for some in roles.values()]


def _check_plain(rule: Rule) -> None:
    """Raise ValueError for what a rule may say but activations do not guide."""
    layers = rule.share is not None and rule.share.across in ("layers", "all")
    said = {"split": rule.split > 1, "adapter": rule.adapter, "freeze": rule.freeze, "share across layers": layers}
    said["a mask"] = rule.share is not None and rule.share.mask
    if wrong := [name for name, value in said.items() if value]:
        raise ValueError(
            f"the rule for role {rule.role} asks for {', '.join(wrong)}, which is not done with a calibration text; drop it, "
            "or compress without --calibrate"
        )


def _check_whole(rule: Rule, sites: list[Site], block: list[Site]) -> None:
    """Raise ValueError where a rule that narrows does not have every matrix that it needs."""
    if taken := sorted({site.role for site in block if rule.matches(site) and site not in sites}):
        raise ValueError(
            f"narrow: {rule.narrow} needs all its matrices, but another rule before it takes {', '.join(taken)} of layer "
            f"{sites[0].layer}; take that rule out, or limit both to different layers"
        )
