"""Models, configurations and tokenizers by name: a folder, a GGUF file, a name on a hub, or a known configuration."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from tenfold.models.atomic_io import read_json
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.configuration import build_model, model_class, naming, read_config, read_presets
from tenfold.models.gguf import resolve_gguf
from tenfold.models.loading import from_pretrained, silent

SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)  # no tokenizer by themselves
# in the order in which a damaged one is named
TOKENIZER_FILES = (
    "tokenizer.json", *SETTINGS, "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


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


def meta_model(name: str | Path | PreTrainedModel) -> PreTrainedModel:
    """Build a model on the meta device, compressed if its configuration says so.

    Args:
        name: a known name, a folder, a name on a hub, or a model.

    Raises:
        FileNotFoundError: the name is neither known here nor found.
        ValueError: the configuration is damaged, or another tool has quantised the model.
    """
    presets, default = read_presets(), AutoModel
    if isinstance(name, PreTrainedModel):
        config = deepcopy(name.config)
        config.architectures, default = None, type(name)
    elif name in presets and not Path(name).exists():
        preset = dict(presets[str(name)])
        architectures = [preset.pop("class")]
        config = AutoConfig.for_model(**preset, architectures=architectures)
    else:
        config = read_config(name)
        check_plain(config, name)
    where = "the model" if isinstance(name, PreTrainedModel) else name
    with naming(where), torch.device("meta"):
        return build_model(config, default)


def load_model(name: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a model of the class that its configuration names."""
    with naming(name):
        kind = model_class(read_config(name))
    with silent():
        return from_pretrained(name, kind, dtype=dtype)


def load_tokenizer(name: str | Path):
    """Load the tokenizer of a folder, a GGUF file or a hub name, None if it has none.

    Where there are no files of one, transformers makes one for some kinds of models; it knows special tokens at best, and the
    boundary of words.

    Raises:
        ValueError: a file of it is damaged.
    """
    place, where = resolve_gguf(name)
    files = [file for file in (Path(name) / one for one in TOKENIZER_FILES) if file.is_file()]
    try:
        found = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **where)
        vocabulary = found.get_vocab().keys() - set(found.all_special_tokens)
        if len(vocabulary) > 1:
            found("a word, \u00e4 and 1\n")  # damage may show only here
    except (KeyboardInterrupt, SystemExit, MemoryError, ImportError):
        raise
    except BaseException as reason:  # tokenizers raises bare Exception, and panics
        if {file.name for file in files} <= {*SETTINGS} and isinstance(reason, (OSError, ValueError)):
            return None
        words = " ".join(str(reason).split()).rstrip(".")[:300] or type(reason).__name__
        raise ValueError(f"the tokenizer {_damaged(files) or name} can't be read ({words}); copy it again") from None
    return found if len(vocabulary) > 1 else None


def _damaged(files: list[Path]) -> Path | None:
    """Return the first file that is no JSON object though its name says so, else the first of all."""
    for file in files:
        if file.suffix == ".json":
            try:
                if not isinstance(read_json(file), dict):
                    return file
            except (ValueError, RecursionError):
                return file
    return next(iter(files), None)
