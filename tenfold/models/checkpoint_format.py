"""The format of a checkpoint: what ``config.json`` says about a folded model, and the plan that this makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tenfold.models.experts import unpack
from tenfold.models.hf_quantizer import METHOD, VERSION, FoldedConfig
from tenfold.models.plan import Plan, SitePlan
from tenfold.models.sites import FOLDED, Site, is_tied, resolve
from tenfold.nn.registry import family
from tenfold.structure import Structure


def describe(model: PreTrainedModel, recipe: str = "") -> FoldedConfig:
    """What a checkpoint of ``model`` has to say, read off its layers."""
    sites = {path: _site(module) for path, module in model.named_modules() if isinstance(module, FOLDED)}
    return FoldedConfig(sites, model.get_output_embeddings() is not None and not is_tied(model), recipe)


def _site(layer) -> dict[str, Any]:
    site = {"structure": layer.structure.to_json(), "bias": getattr(layer, "bias", None) is not None}
    more = {"shared": layer.shared, "frozen": list(layer.frozen), "mask": layer.mask}
    return site | {key: value for key, value in more.items() if value}


def stored_plan(model: PreTrainedModel, config: FoldedConfig) -> Plan:
    """The plan of a checkpoint on ``model``, whose experts it takes apart; sites that a head swap has removed are skipped.

    Raises:
        ValueError: the format is newer than this tenfold, or a structure is not known; the site is named.
    """
    found, entries = structures(config), {}
    unpack(model)
    for stored, structure in found.items():
        path, spec = resolve(model, stored), config.sites[stored]
        if path is not None:
            site = Site(path, "", None, structure.shape, spec["bias"])
            shared, frozen = spec.get("shared", {}), tuple(spec.get("frozen", ()))
            mask = spec.get("mask", 0.0)
            entries[path] = SitePlan(site, structure, spec["bias"], shared=shared, frozen=frozen, mask=mask)
    return Plan(entries, config.untied, config.recipe)


def check_plain(config: Any, name: str | Path) -> None:
    """Refuse a model whose weights another tool has quantised: read as they are stored, they are other matrices.

    Raises:
        ValueError: the configuration names a quantisation other than a folding, or GGUF, which is dequantised when it is read.
    """
    found = getattr(config, "quantization_config", None)
    if not found or folded_config(config) is not None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = getattr(method, "value", method)
    if method != "gguf":
        raise ValueError(
            f"{name} is quantised ({method or 'its config.json does not say how'}); take the model that it was made of, and "
            "quantise the result"
        )


def structures(config: FoldedConfig) -> dict[str, Structure]:
    """``{path: structure}`` of a checkpoint; raises as :func:`stored_plan`."""
    if config.format_version > VERSION:
        raise ValueError(
            f"the checkpoint has format version {config.format_version}, this tenfold reads up to {VERSION}; install a "
            "newer tenfold"
        )
    return {path: _structure(path, spec) for path, spec in config.sites.items()}


def _structure(path: str, spec: dict[str, Any]) -> Structure:
    try:
        return family(spec["structure"].get("kind")).from_json(spec["structure"])
    except ValueError as reason:
        raise ValueError(f"site {path} of the checkpoint: {reason}") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"site {path} of the checkpoint: {spec.get('structure')} is no structure; restore the config.json that was "
            "saved with these weights"
        ) from None


def folded_config(config: Any) -> FoldedConfig | None:
    """The folding that a model's configuration describes, None for a dense one."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == METHOD:
        return FoldedConfig(**found)
    return found if isinstance(found, FoldedConfig) else None
