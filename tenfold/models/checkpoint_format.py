"""Format of a checkpoint: what ``config.json`` says about a compressed model, and the plan that this makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tenfold.models.experts import unpack
from tenfold.models.plan import Plan, SitePlan
from tenfold.models.quantization_config import VERSION, TenfoldConfig, get_tenfold_config
from tenfold.models.sites import FACTORIZED, Site, is_tied, resolve
from tenfold.structure import Structure
from tenfold.structure.base import FactorSpec


def describe(model: PreTrainedModel, recipe: str = "") -> TenfoldConfig:
    """Return the configuration of a checkpoint of ``model``, as its layers are now."""
    sites = {}
    for path, layer in model.named_modules():
        if isinstance(layer, FACTORIZED):
            more = {"shared": layer.shared, "frozen": list(layer.frozen), "mask": layer.mask}
            sites[path] = {"structure": layer.structure.to_json(), "bias": getattr(layer, "bias", None) is not None}
            sites[path] |= {key: value for key, value in more.items() if value}
    return TenfoldConfig(sites, model.get_output_embeddings() is not None and not is_tied(model), recipe)


def read_plan(model: PreTrainedModel, config: TenfoldConfig) -> Plan:
    """Return the plan of a checkpoint for ``model``, and unpack its experts; sites that a head swap has removed are skipped.

    Raises:
        ValueError: the format is newer than this tenfold, or a structure is not known; the site is named.
    """
    structures, entries = read_structures(config), {}
    unpack(model)
    for stored, structure in structures.items():
        path, spec = resolve(model, stored), config.sites[stored]
        if path is not None:
            entries[path] = SitePlan(
                Site(path, "", None, structure.shape, spec["bias"]),
                structure,
                spec["bias"],
                shared=spec.get("shared", {}),
                frozen=tuple(spec.get("frozen", ())),
                mask=spec.get("mask", 0.0),
            )
    return Plan(entries, config.untied, config.recipe)


def read_structures(config: TenfoldConfig) -> dict[str, Structure]:
    """Return ``{path: structure}`` of a checkpoint; raises as ``read_plan``."""
    if config.format_version > VERSION:
        raise ValueError(
            f"the checkpoint has format version {config.format_version}, this tenfold reads up to {VERSION}; install a "
            "newer tenfold"
        )
    structures = {}
    for path, spec in config.sites.items():
        try:
            structures[path] = FactorSpec.from_json(spec["structure"])
        except ValueError as reason:
            raise ValueError(f"site {path} of the checkpoint: {reason}") from None
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"site {path} of the checkpoint: {spec.get('structure')} is no structure; restore the config.json that was "
                "saved with these weights"
            ) from None
    return structures


def check_plain(config: Any, name: str | Path) -> None:
    """Raise ValueError for a model that another tool has quantised, whose stored tensors are not its matrices.

    GGUF is no such model, since it is dequantised when it is read.
    """
    found = getattr(config, "quantization_config", None)
    if not found or get_tenfold_config(config) is not None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = getattr(method, "value", method)
    if method != "gguf":
        raise ValueError(
            f"{name} is quantised ({method or 'its config.json does not say how'}); take the model that it was made of, and "
            "quantise the result"
        )
