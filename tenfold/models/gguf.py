"""GGUF files as models: transformers turns their quantised blocks into ordinary matrices."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL


def is_gguf(name: str | Path) -> bool:
    """Tell whether ``name`` is the path of a GGUF file."""
    return Path(name).suffix.lower() == ".gguf"


def is_path(name: str | Path) -> bool:
    """Tell whether ``name`` can only be a path: a hub's names have one separator at most, and no folder before it."""
    text = str(name)
    inside = text.count("/") > 1 or (Path(text).parent.name != "" and Path(text).parent.is_dir())
    return Path(text).exists() or text.startswith((".", "/", "~")) or inside


def resolve_gguf(name: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """Return what ``from_pretrained`` takes for ``name``: a folder and ``gguf_file`` for a GGUF file, else ``name`` alone.

    Raises:
        FileNotFoundError: there is no such GGUF file.
        ImportError: the package gguf is not installed.
    """
    if not is_gguf(name):
        return name, {}
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name}; check the path (now in {Path.cwd()})")
    if find_spec("gguf") is None:
        raise ImportError(f"reading {name} needs the package gguf: pip install gguf")
    return str(path.parent), {"gguf_file": str(path)}


def read_gguf_config(name: str | Path) -> Any:
    """Read the configuration in a GGUF file, whose class is the causal language model of its type.

    Raises:
        ValueError: transformers can't read the file.
    """
    folder, where = resolve_gguf(name)
    try:
        config = AutoConfig.from_pretrained(folder, **where)
    except Exception as reason:  # damaged files fail in many ways
        words = " ".join(str(reason).split()).rstrip(".") or type(reason).__name__
        raise ValueError(
            f"transformers can't read {name} ({words}); copy the file again, or give a model folder"
        ) from None
    if config.model_type not in CAUSAL:
        raise ValueError(
            f"{name} holds a model of type {config.model_type}, and only causal language models are read from GGUF; "
            "give a model folder"
        )
    config.architectures = [CAUSAL[config.model_type]]
    return config
