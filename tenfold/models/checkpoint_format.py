"""Format of a checkpoint: what ``config.json`` says about a compressed model, and the plan that this makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictStr, ValidationError, model_validator
from transformers import PreTrainedModel

from tenfold.models.config import StrictModel
from tenfold.models.experts import unpack
from tenfold.models.plan import Plan, SitePlan
from tenfold.models.quantization_config import VERSION, TenfoldConfig, get_tenfold_config
from tenfold.models.sites import FACTORIZED, Site, is_tied, resolve, shape_of
from tenfold.structure import Structure
from tenfold.structure.base import FactorSpec

LARGEST_SIZE, LARGEST_FACTOR, MOST_PARTS = 2**31, 2**40, 64
RESTORE = "restore the config.json that was saved with these weights"


def _check_version(version: Any) -> int:
    if type(version) is not int or version < 1:
        raise ValueError(f"format version {version!r} is none; {RESTORE}")
    if version > VERSION:
        raise ValueError(
            f"the checkpoint has format version {version}, this tenfold reads up to {VERSION}; install a newer tenfold"
        )
    return version


def _check_sizes(value: Any) -> None:
    """Raise ValueError unless ``value`` is built of sizes, names and short lists."""
    if isinstance(value, dict | list):
        inner = list(value.values()) if isinstance(value, dict) else value
        if isinstance(value, list) and len(value) > MOST_PARTS:
            raise ValueError(f"{len(value)} parts are more than {MOST_PARTS}")
        for one in inner:
            _check_sizes(one)
    elif type(value) is int and not 0 <= value < LARGEST_SIZE:
        raise ValueError(f"size {value} is not from 0 to {LARGEST_SIZE - 1}")
    elif type(value) not in (int, bool, str):
        raise ValueError(f"{value!r} is no size")


def _read_structure(value: Any) -> FactorSpec:
    try:
        _check_sizes(value)
        structure = FactorSpec.from_json(value)
        largest = max(map(math.prod, structure.factor_shapes().values()))
    except ValueError as reason:
        raise ValueError(f"{reason}; {RESTORE}") from None
    except Exception:  # sizes of other types fail in as many ways as there are structures
        raise ValueError(f"{value!r:.200} is no structure; {RESTORE}") from None
    if largest > LARGEST_FACTOR:
        raise ValueError(f"{structure} has a factor of {largest} numbers; {RESTORE}")
    return structure


class SiteFormat(StrictModel):
    """What ``config.json`` says about one site; see ``tenfold.models.plan.SitePlan``."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    structure: Annotated[Any, BeforeValidator(_read_structure)]
    bias: StrictBool
    shared: dict[StrictStr, Annotated[StrictStr, Field(pattern=r"^[^.]+$")]] = {}
    frozen: tuple[StrictStr, ...] = ()
    mask: float = Field(0.0, ge=0, lt=1, strict=True)

    @model_validator(mode="after")
    def _check_names(self) -> SiteFormat:
        known = self.structure.factor_shapes().keys()
        if wrong := sorted({*self.shared, *self.frozen} - known - {"bias"} | {*self.shared} - known):
            raise ValueError(f"{self.structure} has no factor {wrong[0]!r}; {RESTORE}")
        return self


class CheckpointFormat(StrictModel):
    """``quantization_config`` of a compressed model, checked."""

    format_version: Annotated[int, BeforeValidator(_check_version)]
    sites: dict[StrictStr, SiteFormat]
    untied: StrictBool
    recipe: StrictStr

    @model_validator(mode="after")
    def _check_shared(self) -> CheckpointFormat:
        first: dict[str, tuple[int, ...]] = {}
        for path, site in self.sites.items():
            for name, key in site.shared.items():
                shape = site.structure.factor_shapes()[name]
                if first.setdefault(key, shape) != shape:
                    raise ValueError(f"{path} shares {key} of shape {shape}, others of {first[key]}; {RESTORE}")
        return self


def read_format(config: TenfoldConfig) -> CheckpointFormat:
    """Return what ``config`` says, checked.

    Raises:
        ValueError: the format is newer than this tenfold, a structure is not known, or a value is of another type; the site is
            named.
    """
    fields = {key: getattr(config, key) for key in CheckpointFormat.model_fields}
    try:
        return CheckpointFormat.model_validate(fields)
    except ValidationError as reason:
        error = reason.errors(include_url=False)[0]
    where, words = [str(part) for part in error["loc"]], error["msg"]
    if words.startswith("Value error, "):
        words = words.removeprefix("Value error, ")
    else:
        words = f"{'.'.join(where[2:] or where) or 'sites'}: {words.lower()}, not {error['input']!r:.80}; {RESTORE}"
    raise ValueError(f"site {where[1]} of the checkpoint: {words}" if len(where) > 1 else words)


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
        ValueError: as ``read_format``.
    """
    stored, entries = read_format(config), {}
    unpack(model)
    for name, site in stored.sites.items():
        path = resolve(model, name)
        if path is not None:
            structure = site.structure
            dense = shape_of(model.get_submodule(path))
            if any(ours > theirs for ours, theirs in zip(structure.shape, dense, strict=True)):
                raise ValueError(
                    f"site {name} of the checkpoint: {structure} is larger than its matrix {dense}; {RESTORE}"
                )
            place = Site(path, "", None, structure.shape, site.bias)
            given = {"shared": site.shared, "frozen": site.frozen, "mask": site.mask}
            entries[path] = SitePlan(place, structure, site.bias, **given)
    return Plan(entries, stored.untied, stored.recipe)


def read_structures(config: TenfoldConfig) -> dict[str, Structure]:
    """Return ``{path: structure}`` of a checkpoint; raises as ``read_format``."""
    return {path: site.structure for path, site in read_format(config).sites.items()}


def check_plain(config: Any, name: str | Path) -> None:
    """Raise ValueError for a model that another tool has quantised, whose stored tensors are not its matrices.

    GGUF is no such model, since it is dequantised when it is read.
    """
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not found or get_tenfold_config(config) is not None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = getattr(method, "value", method)
    if method != "gguf":
        raise ValueError(
            f"{name} is quantised ({method or 'its config.json does not say how'}); take the model that it was made of, and "
            "quantise the result"
        )
