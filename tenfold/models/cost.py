"""Cost of a model: parameters with and without the head, and FLOPs per token, counted without allocating anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tenfold.models.auto import meta_model
from tenfold.models.plan import make_plan
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.sites import Site, find_sites, is_tied, module_at
from tenfold.models.surgery import install_empty
from tenfold.nn import FactorizedEmbedding, FactorizedLinear, TiedHead

ROWS = (1, 1024)  # rows a call at which FLOPs are stated: decoding one token, reading a prompt


def count(model: PreTrainedModel) -> dict[str, int]:
    """Count parameters, each tensor once: in total, without the output matrix, and those that are trained."""
    parameters, head = list(model.parameters()), model.get_output_embeddings()
    total = sum(p.numel() for p in parameters)
    own = 0 if head is None or is_tied(model) else sum(p.numel() for n, p in head.named_parameters() if n != "bias")
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {"total": total, "without_head": total - own, "trainable": trained}


def site_flops(site: Site, module: torch.nn.Module | None, rows: int) -> int:
    """Count the FLOPs of one site for ``rows`` tokens; a look-up is free in a dense table and a contraction in a factorised one.

    ``module`` is None for an expert whose matrices are fused with others'.
    """
    if isinstance(module, FactorizedLinear | TiedHead):
        return round(site.calls * module.structure.flops(rows))
    if isinstance(module, FactorizedEmbedding):
        return module.structure.lookup_flops(rows)
    return 0 if site.role == "embed" else round(site.calls * 2 * rows * site.shape[0] * site.shape[1])


def price(model: PreTrainedModel) -> dict[str, Any]:
    """Return the parameters, the FLOPs per token at 1 and at 1,024 rows a call, and the sites, of a model on any device."""
    sites = []
    for site in find_sites(model):
        module = module_at(model, site.path)
        structure = getattr(module, "structure", None)
        size = site.shape[0] * site.shape[1] if module is None else sum(p.numel() for p in module.parameters())
        sites.append(
            {
                "path": site.path,
                "role": site.role,
                "structure": structure.to_json() if structure is not None else {"kind": "dense"},
                "shape": list(site.shape),
                "parameters": size,
                "flops": {str(rows): site_flops(site, module, rows) // rows for rows in ROWS},
            }
        )
    per_token = {str(rows): sum(site["flops"][str(rows)] for site in sites) for rows in ROWS}
    return {"parameters": count(model), "flops_per_token": per_token, "sites": sites}


def inspect(model: str | Path | PreTrainedModel, recipe: Recipe | str | dict | None = None) -> dict[str, Any]:
    """Return the cost of a model after ``recipe``, counted on the meta device; ``dense`` is the model before.

    Args:
        model: a folder, a name on a hub, a known name such as ``gpt2``, or a model, which stays as it is.
        recipe: a name, a file, a mapping, or None for the model as it is.

    Raises:
        FileNotFoundError: there is no such model, or the hub can't be reached.
    """
    counted, applied = meta_model(model), None if recipe is None else load_recipe(recipe)
    dense = price(counted)
    for step in applied.stage_recipes() if applied is not None else ():
        if step.squeeze is not None:
            raise ValueError(
                f"recipe {step.name} cuts the bonds that lose least: what it costs is known when that is done"
            )
        install_empty(counted, make_plan(counted, step))
    result = price(counted)
    result["parameters"]["dense"] = dense["parameters"]["total"]
    result["flops_per_token_dense"] = dense["flops_per_token"]
    name = model.name_or_path if isinstance(model, PreTrainedModel) else str(model)
    return {"model": name, "recipe": applied and applied.name} | result
