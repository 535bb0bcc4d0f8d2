"""Configurations by name, and the models that they describe before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from tenfold.models.checkpoint_format import read_format, read_plan
from tenfold.models.gguf import is_gguf, is_path, read_gguf_config
from tenfold.models.quantization_config import get_tenfold_config
from tenfold.models.surgery import install_empty

MODULE_COUNTS, MOST_MODULES = ("num_hidden_layers", "num_decoder_layers", "num_local_experts", "num_experts"), 2000


@contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Turn all that a damaged folder makes libraries raise into one sentence with its name."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ImportError, NotImplementedError):
        raise
    except Exception as reason:
        words = " ".join(str(reason).split()).rstrip(".")[:500]
        if "trust_remote_code" in words:
            words = (
                f"{name} is of an architecture that transformers knows only by code that comes with the model, and tenfold "
                "runs no such code; give a model of an architecture that transformers has itself"
            )
        elif type(reason) not in (ValueError, FileNotFoundError, FileExistsError, PermissionError):
            words = (
                f"its config.json or its weights can't be read ({type(reason).__name__}: {words}); copy its files again"
            )
        kind = type(reason) if isinstance(reason, OSError) and type(reason) is not OSError else ValueError
        raise kind(words if str(name) in words else f"{name}: {words}") from None


def read_config(name: str | Path, trusted: bool = False) -> Any:
    """Read the configuration of a folder, a GGUF file or a name on a hub, and check what concerns tenfold.

    Args:
        trusted: run code that comes with the model.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is damaged, or runs code of its own.
    """
    if is_gguf(name):
        return read_gguf_config(name)
    if not (folder := Path(name)).is_dir():
        if is_path(name):
            raise FileNotFoundError(
                f"there is no model {str(name)!r}: no such folder; check the path (now in {Path.cwd()})"
            )
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
        except (OSError, ValueError) as reason:
            first = str(reason).split("\n")[0].rstrip(".") or type(reason).__name__
            raise FileNotFoundError(
                f"there is no model {str(name)!r}: no folder, not one of {', '.join(read_presets())}, and {first}"
            ) from None
    elif not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json; give a model folder")
    else:
        with naming(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    with naming(f"{folder / 'config.json'}"):
        _check_config(config)
    return config


def _check_config(config: Any) -> None:
    kinds, stored = config.architectures, getattr(config, "quantization_config", None)
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(f"architectures is {kinds!r:.80}; it must be a list of names")
    if stored is not None and not isinstance(stored, dict):
        raise ValueError(f"quantization_config is {stored!r:.80}; it must be a mapping")
    if (stored := get_tenfold_config(config)) is not None:
        read_format(stored)
    for key in MODULE_COUNTS:  # building a million modules takes minutes
        if isinstance(count := getattr(config.get_text_config(), key, 0), int) and count > MOST_MODULES:
            raise ValueError(
                f"{key} is {count:,}, more than {MOST_MODULES:,}; restore the config.json of these weights"
            )


def model_class(config: Any, default: Any = AutoModelForCausalLM) -> Any:
    """Return the class of transformers that ``config`` names.

    Raises:
        ValueError: transformers has no such model.
    """
    if not config.architectures:
        return default
    found = getattr(transformers, config.architectures[0], None)
    if not (isinstance(found, type) and issubclass(found, (PreTrainedModel, _BaseAutoModelClass))):
        raise ValueError(f"its config.json names {config.architectures[0]!r:.80}, and transformers has no such model")
    return found


def build_model(config: Any, default: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Build the model of ``config`` without reading weights, compressed if it says so."""
    kind = model_class(config, default)
    model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    if (stored := get_tenfold_config(config)) is not None:
        install_empty(model, read_plan(model, stored))
    return model


def read_presets() -> dict[str, dict[str, Any]]:
    """Return the configurations that are known by name."""
    return yaml.safe_load((resources.files("tenfold") / "models" / "model_presets.yaml").read_text())
