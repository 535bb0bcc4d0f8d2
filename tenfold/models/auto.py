"""A model and its tokenizer by the name of their folder, of a GGUF file, or on a hub."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tenfold.models.cost import read_config
from tenfold.models.gguf import resolve_gguf
from tenfold.models.loading import from_pretrained, silent


def load_model(name: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model of the class that its configuration names."""
    kind = getattr(transformers, (read_config(str(name)).architectures or [""])[0], AutoModelForCausalLM)
    with silent():
        return from_pretrained(name, kind, dtype=dtype)


def load_tokenizer(name: str | Path):
    """The tokenizer of a folder, a GGUF file or a hub name, None if it has none.

    Where there are no files of one, transformers makes one for some kinds of models; it knows special tokens at best, and the
    boundary of words.
    """
    place, where = resolve_gguf(name)
    try:
        found = AutoTokenizer.from_pretrained(place, **where)
    except (OSError, ValueError):
        return None
    return found if len(found.get_vocab().keys() - set(found.all_special_tokens)) > 1 else None
