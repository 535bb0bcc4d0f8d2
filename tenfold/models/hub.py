"""Checkpoints: the hook that lets plain ``from_pretrained`` rebuild folded layers, the guard, saving.

``config.json`` keeps its ``model_type`` and says in ``quantization_config`` which sites have which structures.
Importing this module registers the hook with transformers. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tenfold.models.plan import Entry, Plan
from tenfold.models.replace import install_empty
from tenfold.models.sites import Site, base_path, resolve
from tenfold.structure import Structure

METHOD, VERSION = "tenfold", 1


@register_quantization_config(METHOD)
class FoldedConfig(QuantizationConfigMixin):
    """What ``config.json`` holds: per site its structure, sharing and bias; unknown keys are kept out."""

    def __init__(self, sites: dict | None = None, untied: bool = False, recipe: str = "", **more):
        self.quant_method = METHOD
        self.format_version = more.get("format_version", VERSION)
        self.sites, self.untied, self.recipe = sites or {}, untied, recipe


@register_quantizer(METHOD)
class FoldedLoader(HfQuantizer):
    """Puts empty factorized layers into the model before its weights are read, then steps aside."""

    requires_calibration = False

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized:
            raise ValueError("this configuration describes a folded checkpoint; fold a dense model with tenfold.compress")
        if self.quantization_config.format_version > VERSION:
            raise ValueError(
                f"the checkpoint has format version {self.quantization_config.format_version}, this tenfold reads up to "
                f"{VERSION}; install a newer tenfold"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        install_empty(model, plan_from_json(model, self.quantization_config), "meta", kwargs.get("dtype"))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        """The model is an ordinary one from here on: it trains, casts and saves like any other."""
        model.is_quantized = False
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                module.config._is_quantized = False
        for name in ("hf_quantizer", "quantization_method"):  # save_pretrained would discard a caller's state_dict
            if hasattr(model, name):
                delattr(model, name)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def plan_to_config(plan: Plan, model: PreTrainedModel) -> FoldedConfig:
    """The plan as it is stored. Paths are those of the model that was folded."""
    sites = {
        path: {
            "role": entry.site.role,
            "structure": entry.structure.to_json(),
            "bias": entry.bias,
            "calls": entry.site.calls,
            **({"shared": entry.shared} if entry.shared else {}),
            **({"frozen": list(entry.frozen)} if entry.frozen else {}),
        }
        for path, entry in plan.entries.items()
    }
    return FoldedConfig(sites=sites, untied=plan.untie, recipe=plan.recipe)


def plan_from_json(model: PreTrainedModel, config: FoldedConfig) -> Plan:
    """The plan of a checkpoint on ``model``; sites that a head swap has removed are skipped."""
    entries = {}
    for stored, spec in config.sites.items():
        path = resolve(model, stored)
        if path is None:
            continue
        try:
            structure = Structure.from_json(spec["structure"])
        except (ValueError, KeyError) as reason:
            raise ValueError(f"site {stored} of the checkpoint: {reason}") from None
        site = Site(path, spec["role"], None, structure.shape, spec["bias"], spec.get("calls", 1))
        entries[path] = Entry(site, structure, spec["bias"], shared=spec.get("shared", {}), frozen=tuple(spec.get("frozen", ())))
    return Plan(entries, config.untied, config.recipe)


def folded_config(config: Any) -> FoldedConfig | None:
    """The folding that a model's configuration describes, None for a dense one."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict):
        found = FoldedConfig(**found) if found.get("quant_method") == METHOD else None
    return found if isinstance(found, FoldedConfig) else None


def from_pretrained(name: str | Path, kind: Any = AutoModelForCausalLM, **kwargs) -> PreTrainedModel:
    """``kind.from_pretrained(name)`` that refuses what the plain loader would load wrongly.

    Args:
        name: a folder, or a name on a hub.
        kind: an Auto class or a model class.

    Raises:
        FileNotFoundError: the folder, or a shard in it, is missing.
        ValueError: a factor has another shape than its structure, or tensors are missing or left over.
    """
    folder = Path(name)
    if folder.exists() or str(name).startswith((".", "/", "~")):
        check_folder(folder)
    model, report = kind.from_pretrained(name, output_loading_info=True, **kwargs)
    missing = sorted(report["missing_keys"])
    unexpected = sorted(report["unexpected_keys"])
    if folded_config(model.config) is not None and (missing or report["mismatched_keys"]):
        raise ValueError(
            f"{name} lacks {missing[:4] or sorted(report['mismatched_keys'])[:4]} for its structures and has {unexpected[:4]} "
            "left over; the checkpoint and its config.json do not belong together: save it again from the model"
        )
    return model


def check_folder(folder: Path) -> None:
    """Compare the headers of the safetensors files with the structures in ``config.json``."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a folder that save_pretrained wrote")
    stored = json.loads((folder / "config.json").read_text()).get("quantization_config")
    shapes = stored_shapes(folder)
    if not stored or stored.get("quant_method") != METHOD:
        return
    known = {field.name for field in fields(Plan)}
    assert known
    for path, spec in stored["sites"].items():
        structure = Structure.from_json(spec["structure"])
        for factor, shape in {**structure.factor_shapes(), **structure.index_shapes()}.items():
            key = f"{path}.{factor}"
            if factor not in spec.get("shared", {}) and shapes.get(key, shape) != shape:
                raise ValueError(
                    f"{key} in {folder} has shape {shapes[key]}, but config.json says {structure}, which needs {shape}; "
                    "restore the config.json that was saved with these weights"
                )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder, from the headers alone; a missing shard is an error."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    shapes = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks the weights {name}; copy that file there too")
        with safe_open(folder / name, "pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """``folder`` if a result may be written there: new, empty, or ``overwrite``."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
        raise FileExistsError(f"{path} is there already and not empty; choose another folder or add --overwrite")
    return path


def config_of(name: str) -> Any:
    return AutoConfig.from_pretrained(name)


def logical_bytes(model: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in {id(p): p for p in model.parameters()}.values())


def base_of(model: PreTrainedModel) -> torch.nn.Module:
    return model.get_submodule(base_path(model).rstrip("."))
