"""Compression: a model and a recipe in, a smaller model and a report out.

``TRANSFORMS`` holds the transforms of a whole model that run before the rules of a recipe, by the name that ``transform`` gives.
To add one, write a function ``(model, recipe, text) -> report`` and put it there; add its name to ``WEIGHTS_ONLY`` if it accepts
None for the text. ``tenfold.baselines`` registers all that ship.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tenfold.compression.blockwise import BlockwiseCompression
from tenfold.compression.budget import budget_total
from tenfold.compression.calibration import Calibration, check_text, mean_loss, settings_of
from tenfold.compression.progress import Progress, no_progress
from tenfold.compression.resume_state import ResumeState
from tenfold.compression.truncate_ranks import truncate_ranks
from tenfold.compression.weight_source import Weights
from tenfold.models.auto import read_config
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.cost import price
from tenfold.models.distributed import is_main_process
from tenfold.models.loading import from_pretrained
from tenfold.models.plan import Plan, check_rules, make_plan
from tenfold.models.recipe import Recipe, Rule, check_keep, load_recipe, parse_recipe
from tenfold.models.sites import find_sites
from tenfold.models.surgery import replace, unpack_experts, untie
from tenfold.structure import Structure

BLOCK = ["attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "mlp.in", "mlp.gate", "mlp.out"]
TRANSFORMS: dict[str, Callable[[PreTrainedModel, Recipe, Any], dict[str, Any]]] = {}
WEIGHTS_ONLY: set[str] = set()


def compress(
    model: Any,
    recipe: Recipe | str | dict = "recommended",
    source: str = "weights",
    progress: Progress = no_progress,
    text: Calibration | None = None,
    announce: Callable[[list[dict]], None] = lambda choices: None,
    weights: Weights | None = None,
    state: ResumeState | None = None,
    keep: float | None = None,
    of: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Compress ``model`` by ``recipe``, without data or guided by a calibration text.

    Args:
        model: a model, compressed in place, or its folder or hub name.
        recipe: a recipe, its name, its file or its mapping; ``recipe_for`` makes one from a share to keep.
        source: ``weights`` or ``noise``.
        progress: wraps the list of groups of sites, or of blocks; see ``tenfold.compression.progress``.
        text: result of ``tenfold.compression.calibration.load_calibration``; with it the matrices of the blocks are fitted to
            activations, whatever the ``start`` of the recipe, and the budget is allocated by sensitivity.
        announce: is called with what was chosen for every item of the blocks, before it is carried out.
        weights: source of the weights of a block, if ``model`` does not hold them; see ``tenfold.checkpoint_jobs``.
        state: what an earlier run has reached, and this one will.
        keep: the share of the parameters that stays, instead of that of the recipe's budget.
        of: what ``keep`` is a share of, likewise: ``model``, ``without_head``, ``blocks``, ``sites``, ``flops`` or ``bytes``.

    Returns:
        The compressed model, and a report: costs before and after, what every site became, seconds.

    Raises:
        ValueError: another tool has quantised the model, the recipe needs activations and there is no ``text``, or planning or
            fitting fails.

    Warns:
        UserWarning: the calibration text has fewer tokens than twice the inputs of the widest matrix.
    """
    if isinstance(model, str | Path):
        check_plain(read_config(model), model)
        model = from_pretrained(model)
    check_plain(model.config, "the model")
    recipe = with_keep(recipe, keep, of)
    if recipe.stages:
        raise ValueError(
            f"recipe {recipe.name} has stages; tenfold compress MODEL -o DIR --recipe .. runs them, from disk to disk"
        )
    if text is None and (recipe.calibrate or recipe.transform not in {None, *WEIGHTS_ONLY}):
        raise ValueError(f"recipe {recipe.name} goes by activations: give a calibration text (--calibrate FILE)")
    if source == "weights" or text is not None:
        check_rules(recipe)
    unpack_experts(model)
    begun, dense, more = time.perf_counter(), price(model), dict[str, Any]()
    errors: Mapping[str, float | None] = {}
    if recipe.squeeze is not None:
        errors = truncate_ranks(model, recipe.squeeze, recipe.name)
    elif text is None:
        more = _transform_model(model, recipe, None) if recipe.transform else {}
        if recipe.replace or not recipe.transform:
            errors = replace(model, make_plan(model, recipe), source, progress)
    else:
        errors, more = _compress_by_text(model, recipe, text, progress, announce, weights, state)
    report = more | {"recipe": recipe.model_dump(exclude_defaults=True)}
    report |= _describe_result(model, dense, errors)
    return model, report | {"seconds": round(time.perf_counter() - begun, 2)}


def _describe_result(model, dense: dict[str, Any], errors: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the costs before and after, and what every changed site became."""
    after = price(model)
    before = {site["path"]: site for site in dense["sites"]}
    before |= {site["path"]: site for site in after["sites"] if site["path"] not in before}  # blocks that moved up
    return {
        "parameters": after["parameters"] | {"dense": dense["parameters"]["total"]},
        "parameters_dense": dense["parameters"],
        "flops_per_token": after["flops_per_token"],
        "flops_per_token_dense": dense["flops_per_token"],
        "sites": [
            {
                "path": site["path"],
                "structure": site["structure"],
                "before": before[site["path"]]["parameters"],
                "after": site["parameters"],
                "error": errors.get(site["path"]),
            }
            for site in after["sites"]
            if site["structure"]["kind"] != "dense" or site["shape"] != before[site["path"]]["shape"]
        ],
    }


def _compress_by_text(
    model, recipe: Recipe, text: Calibration, progress, announce, weights: Weights | None, state: ResumeState | None
) -> tuple[Mapping[str, float | None], dict[str, Any]]:
    """Compress the blocks by activations, and what is outside of them (embeddings, a head) without data."""
    sites = find_sites(model)
    inside = [site for site in sites if site.layer is not None]
    widest = max((site.shape[1] for site in inside), default=0)
    if text.tokens < 2 * widest and is_main_process():
        damping = settings_of(recipe).damping
        warnings.warn(
            f"the calibration text has {text.tokens:,} tokens and the widest matrix reads {widest:,} values: {2 * widest:,} "
            f"tokens are needed at least; damping of {damping} of the mean variance stands in for the rest; give more text or "
            "more samples",
            stacklevel=3,
        )
    for rule in recipe.replace:
        if not rule.prune and len({site.layer is None for site in sites if rule.matches(site)}) > 1:
            raise ValueError(
                f"the rule for role {rule.role or rule.path} names matrices inside and outside of the blocks; with a "
                "calibration text these are done in two ways, so write two rules"
            )
    report = _transform_model(model, recipe, text)
    report["calibration"] = text.source | {"tokens": text.tokens, "widest": widest}
    outer = [rule for rule in recipe.replace if not rule.prune and not any(rule.matches(site) for site in inside)]
    errors: Mapping[str, float | None] = {}
    if outer:
        budget, total = recipe.budget, budget_total(model, recipe.budget) if recipe.budget else 0
        errors = replace(model, _plan_outside(model, recipe, outer))
        if budget is not None and budget.of != "sites":  # the same of the model as it is now
            keep = budget.keep * total / budget_total(model, budget)
            if keep >= 1:
                raise ValueError(
                    f"keep {budget.keep} of the {budget.of} is reached outside of the blocks already; keep less, or take the "
                    "rules for the blocks out"
                )
            budget = budget.model_copy(update={"keep": keep})
        inner = [rule for rule in recipe.replace if rule not in outer]
        recipe = recipe.model_copy(update={"replace": inner, "budget": budget})
    if recipe.replace:
        report |= BlockwiseCompression(model, recipe, text, progress, weights, state).run(announce)
    return errors, report


def _transform_model(model, recipe: Recipe, text: Calibration | None) -> dict[str, Any]:
    """Apply the transform of the recipe and untie the head if the recipe says so; return the report."""
    if recipe.untie:
        untie(model)
    if recipe.transform is None:
        return {}
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(f"{name} holds NaN or Inf; mend it first")
    if text is not None and not recipe.replace:  # otherwise the text is checked with the blocks
        training = model.training
        check_text(text, mean_loss(model.eval(), text.batches, lambda k, row, inputs: model(**inputs).logits))
        model.train(training)
    return TRANSFORMS[recipe.transform](model, recipe, text)


def _plan_outside(model, recipe: Recipe, rules: list[Rule]) -> Plan:
    sites = find_sites(model)
    for rule in (rule for rule in rules if any(rule.matches(site) for site in sites)):
        if rule.keep is None and any(Structure.family(spec["kind"]).is_open(spec) for spec in rule.structures):
            raise ValueError(
                f"the rule for role {rule.role or rule.path} is outside of the blocks, where activations do not say how much to "
                "keep; give it a keep or a size of its own"
            )
    return make_plan(model, recipe.model_copy(update={"replace": rules, "budget": None}))


def with_keep(recipe, keep: float | None, of: str | None = None, align: int | None = None) -> Recipe:
    """Return ``recipe`` (a name, a file or a mapping) with the budget ``keep``, unless that is None.

    Args:
        of: what ``keep`` is a share of; default: as in the recipe's own budget, else the ``model``.
        align: what MLP widths are multiples of, where shapes are stock.
    """
    recipe = load_recipe(recipe)
    if align is not None and (recipe.budget is None or recipe.budget.shapes != "stock"):
        raise ValueError(
            f"align {align} is for stock shapes, and recipe {recipe.name} has free ones; leave it out, or take --shapes stock"
        )
    if keep is None and of is None and align is None:
        return recipe
    if recipe.stages:
        raise ValueError(
            f"recipe {recipe.name} has stages, each with sizes of its own; leave --keep out, or write them there"
        )
    budget = recipe.budget.model_dump() if recipe.budget else {"of": "model"}
    budget |= ({} if keep is None else {"keep": check_keep(keep)}) | ({"of": of} if of else {})
    budget |= {} if align is None else {"align": align}
    budget = parse_recipe({"budget": budget}, "the budget").budget
    return recipe.model_copy(update={"budget": budget})


def recipe_for(structure: str | dict, keep: float, of: str = "model", roles: list[str] | None = None) -> Recipe:
    """Return the recipe of one structure for every matrix of the blocks, at one share of parameters.

    Args:
        structure: a kind, or a mapping with its fields.
        keep: the share that stays, ``of`` the whole ``model`` or of the replaced ``sites``.
        roles: of the matrices; those of the blocks unless given.
    """
    spec = {"kind": structure} if isinstance(structure, str) else structure
    rule = {"role": roles or BLOCK, "structure": spec}
    return load_recipe({"name": f"{spec['kind']}-{keep:g}", "replace": [rule], "budget": {"keep": keep, "of": of}})
