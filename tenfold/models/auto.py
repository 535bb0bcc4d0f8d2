"""Models, configurations and tokenizers by name: a folder, a GGUF file, a name on a hub, or a known configuration."""

from __future__ import annotations

from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tenfold.models.checkpoint_format import read_plan
from tenfold.models.gguf import is_gguf, is_path, read_gguf_config, resolve_gguf
from tenfold.models.loading import from_pretrained, silent
from tenfold.models.quantization_config import get_tenfold_config
from tenfold.models.surgery import install_empty


def read_config(name: str | Path) -> Any:
    """Read the configuration of a folder, a GGUF file or a name on a hub.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: transformers knows it only by code that comes with it, which is not run.
    """
    if is_gguf(name):
        return read_gguf_config(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json; give a model folder")
    if is_path(name) and not Path(name).exists():
        raise FileNotFoundError(
            f"there is no model {str(name)!r}: no such folder; check the path (now in {Path.cwd()})"
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as reason:
        if "trust_remote_code" in str(reason):
            raise ValueError(
                f"{name} is of an architecture that transformers knows only by code that comes with the model, and tenfold runs "
                "no such code; give a model of an architecture that transformers has itself"
            ) from None
        first = str(reason).split("\n")[0].rstrip(".") or type(reason).__name__
        raise FileNotFoundError(
            f"there is no model {str(name)!r}: no folder, not one of {', '.join(_read_presets())}, and {first}"
        ) from None


def unwrap(model: Any) -> PreTrainedModel:
    """Return the model of transformers that ``torch.compile`` or ``DataParallel`` has wrapped.

    Raises:
        ValueError: it is no such model, or peft has put an adapter on it.
    """
    if isinstance(model, nn.Module):
        model = extract_model_from_parallel(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    kind, plain = type(model).__name__, isinstance(model, PreTrainedModel)
    if plain and not any(hasattr(module, "base_layer") for module in model.modules()):
        return model
    if plain or hasattr(model, "peft_config"):
        raise ValueError(
            f"peft has put an adapter on this {kind}; merge it (model.merge_and_unload()), or give model.get_base_model()"
        )
    raise ValueError(f"a {kind} is no model of transformers; give one, or the name of its folder")


def model_class(config: Any, default: Any = AutoModelForCausalLM) -> Any:
    """Return the class of transformers that ``config`` names."""
    return getattr(transformers, (config.architectures or [""])[0], default)


def build_model(config: Any, default: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Build the model of ``config`` without reading weights."""
    kind = model_class(config, default)
    return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def meta_model(name: str | Path | PreTrainedModel) -> PreTrainedModel:
    """Build a model on the meta device, compressed if its configuration says so.

    Args:
        name: a known name, a folder, a name on a hub, or a model.

    Raises:
        FileNotFoundError: the name is neither known here nor found.
    """
    presets = _read_presets()
    if isinstance(name, PreTrainedModel):
        config = deepcopy(name.config)
        config.architectures = [type(name).__name__]
    elif name in presets and not Path(name).exists():
        preset = dict(presets[str(name)])
        architectures = [preset.pop("class")]
        config = AutoConfig.for_model(**preset, architectures=architectures)
    else:
        config = read_config(name)
    with torch.device("meta"):
        model = build_model(config, AutoModel)
    stored = get_tenfold_config(config)
    if stored is not None:
        install_empty(model, read_plan(model, stored))
    return model


def load_model(name: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a model of the class that its configuration names."""
    with silent():
        return from_pretrained(name, model_class(read_config(name)), dtype=dtype)


def load_tokenizer(name: str | Path):
    """Load the tokenizer of a folder, a GGUF file or a hub name, None if it has none.

    Where there are no files of one, transformers makes one for some kinds of models; it knows special tokens at best, and the
    boundary of words.
    """
    place, where = resolve_gguf(name)
    try:
        found = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **where)
    except (OSError, ValueError):
        return None
    return found if len(found.get_vocab().keys() - set(found.all_special_tokens)) > 1 else None


def _read_presets() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((resources.files("tenfold") / "models" / "model_presets.yaml").read_text())
