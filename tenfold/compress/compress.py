"""The compressor: a model and a recipe in, a folded model and a table of what happened out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tenfold.models.cost import price
from tenfold.models.hub import from_pretrained
from tenfold.models.plan import make_plan
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.replace import replace
from tenfold.models.sites import find_sites

BLOCK = ["attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "mlp.in", "mlp.gate", "mlp.out"]


def compress(
    model: Any,
    recipe: Recipe | str | dict,
    source: str = "weights",
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Any, dict[str, Any]]:
    """Fold ``model`` as ``recipe`` says, without data.

    Args:
        model: a model, folded in place, or the folder or hub name of one.
        recipe: a recipe, its name, its file or its mapping; :func:`recipe_for` makes one from a share to keep.
        source: ``weights`` or ``noise``.
        progress: wraps the list of groups of sites.

    Returns:
        The folded model, and a report: prices before and after, per site the relative error, seconds.
    """
    if isinstance(model, str | Path):
        model = from_pretrained(model)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    begun, dense = time.perf_counter(), price(model)
    plan = make_plan(model, recipe)
    changes = replace(model, plan, source, progress)
    folded = price(model)
    return model, {
        "recipe": recipe.model_dump(exclude_defaults=True),
        "parameters": folded["parameters"] | {"dense": dense["parameters"]["total"]},
        "parameters_dense": dense["parameters"],
        "flops_per_token": folded["flops_per_token"],
        "flops_per_token_dense": dense["flops_per_token"],
        "sites": [
            {"path": c.path, "structure": c.structure.to_json(), "before": c.before, "after": c.after, "error": c.error}
            for c in changes
        ],
        "seconds": round(time.perf_counter() - begun, 2),
    }


def recipe_for(
    structure: str | dict, keep: float, of: str = "model", roles: list[str] | None = None, model=None
) -> Recipe:
    """One structure for every matrix of the blocks, at one share of parameters.

    Args:
        structure: a kind, or a mapping with its fields.
        keep: the share that stays, ``of`` the whole ``model`` or of the replaced ``sites``.
        roles: which matrices; all of the blocks unless given, as far as ``model`` has them.
    """
    spec = {"kind": structure} if isinstance(structure, str) else structure
    present = BLOCK if model is None else _present(model, BLOCK)
    rule = {"role": roles or present, "structure": spec}
    return load_recipe({"name": f"{spec['kind']}-{keep:g}", "replace": [rule], "budget": {"keep": keep, "of": of}})


def _present(model, roles: list[str]) -> list[str]:
    here = {site.role for site in find_sites(model)}
    return [role for role in roles if role in here]
