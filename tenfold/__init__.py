"""tenfold prunes and factorises transformer language models, guided by activations, and heals them by distillation.

Importing the package teaches transformers to load compressed checkpoints: after ``import tenfold``, plain
``AutoModelForCausalLM.from_pretrained(folder)`` works. The public names, which are the Python equivalents of the commands, are
imported on first use.
"""

# ruff: noqa: F403, F405 - type checkers read the public names in tenfold.api
from importlib import import_module
from typing import TYPE_CHECKING

import tenfold.models.hf_quantizer as _hf_quantizer  # noqa: F401 - registers itself with transformers

if TYPE_CHECKING:
    from tenfold.api import *

__all__ = [
    "Recipe", "bench", "compress", "deepen", "dense_cache", "densify", "evaluate", "evaluate_task", "finetune",
    "from_pretrained", "generate", "heal", "inspect", "load", "load_recipe", "plan", "pretrain", "read_calibration", "save",
]  # fmt: skip


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'tenfold' has no attribute {name!r}; it has {', '.join(__all__)}")
    return globals().setdefault(name, getattr(import_module("tenfold.api"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
