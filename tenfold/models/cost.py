"""What a model costs: parameters with and without the head, FLOPs per token; counted, nothing allocated."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, PreTrainedModel

from tenfold.models.checkpoint_format import folded_config, stored_plan
from tenfold.models.gguf import is_gguf, read_gguf_config
from tenfold.models.plan import Plan, make_plan
from tenfold.models.recipe import Recipe
from tenfold.models.sites import Site, find_sites, is_tied, module_at
from tenfold.models.surgery import install_empty
from tenfold.nn import FactorizedEmbedding, FactorizedLinear, TiedHead

ROWS = (1, 1024)  # rows a call at which FLOPs are stated: decoding one token, reading a prompt


def known_models() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((resources.files("tenfold") / "models" / "model_presets.yaml").read_text())


def meta_model(name: str) -> PreTrainedModel:
    """The model of a known name, a folder or a hub name, on the meta device; folded if its configuration says so.

    Raises:
        ValueError: the name is not known here and can't be looked up.
    """
    known = known_models()
    if name in known and not Path(name).exists():
        spec = dict(known[name])
        kind, config = spec.pop("class"), AutoConfig.for_model(**spec)
    else:
        config = read_config(name)
        kind = (config.architectures or ["AutoModel"])[0]
    with torch.device("meta"):
        model = getattr(transformers, kind)
        model = model.from_config(config) if hasattr(model, "from_config") else model(config)
    folded = folded_config(config)
    if folded is not None:
        install_empty(model, stored_plan(model, folded))
    return model


def read_config(name: str) -> Any:
    if is_gguf(name):
        return read_gguf_config(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json; give a model folder")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as reason:
        known = ", ".join(known_models())
        raise FileNotFoundError(
            f"there is no model {name!r}: no folder, not one of {known}, and {_first(reason)}"
        ) from None


def _first(reason: Exception) -> str:
    return str(reason).split("\n")[0].rstrip(".") or type(reason).__name__


def count(model: PreTrainedModel) -> dict[str, int]:
    """Parameters, each tensor once: in total, without the output matrix, and those that are trained."""
    parameters, head = list(model.parameters()), model.get_output_embeddings()
    total = sum(p.numel() for p in parameters)
    own = 0 if head is None or is_tied(model) else sum(p.numel() for n, p in head.named_parameters() if n != "bias")
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {"total": total, "without_head": total - own, "trainable": trained}


def site_flops(site: Site, module: torch.nn.Module | None, rows: int) -> int:
    """FLOPs of one site for ``rows`` tokens: a look-up in a dense table is free, in a folded one it is a contraction.

    ``module`` is None for an expert whose matrices are fused with others'.
    """
    if isinstance(module, FactorizedLinear | TiedHead):
        return round(site.calls * module.structure.flops(rows))
    if isinstance(module, FactorizedEmbedding):
        return module.structure.lookup_flops(rows)
    return 0 if site.role == "embed" else round(site.calls * 2 * rows * site.shape[0] * site.shape[1])


def price(model: PreTrainedModel) -> dict[str, Any]:
    """Parameters, FLOPs per token at 1 and at 1,024 rows a call, and the sites, of a model on any device."""
    sites = []
    for site in find_sites(model):
        module = module_at(model, site.path)
        structure = getattr(module, "structure", None)
        sites.append(
            {
                "path": site.path,
                "role": site.role,
                "structure": structure.to_json() if structure is not None else {"kind": "dense"},
                "shape": list(site.shape),
                "parameters": site.shape[0] * site.shape[1]
                if module is None
                else sum(p.numel() for p in module.parameters()),
                "flops": {str(rows): site_flops(site, module, rows) // rows for rows in ROWS},
            }
        )
    per_token = {str(rows): sum(site["flops"][str(rows)] for site in sites) for rows in ROWS}
    return {"parameters": count(model), "flops_per_token": per_token, "sites": sites}


def inspect(name: str, recipe: Recipe | None = None) -> dict[str, Any]:
    """What a recipe makes of a model: counts only, on the meta device. ``dense`` is the model before."""
    model = meta_model(name)
    dense = price(model)
    for step in recipe.steps() if recipe is not None else ():
        if step.squeeze is not None:
            raise ValueError(
                f"recipe {step.name} cuts the bonds that lose least: what it costs is known when that is done"
            )
        install_empty(model, make_plan(model, step))
    result = price(model)
    result["parameters"]["dense"] = dense["parameters"]["total"]
    result["flops_per_token_dense"] = dense["flops_per_token"]
    return {"model": name, "recipe": recipe.name if recipe else None} | result


def plan_of(name: str, recipe: Recipe) -> Plan:
    return make_plan(meta_model(name), recipe)
