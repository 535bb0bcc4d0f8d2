"""tenfold prunes and factorises transformer language models, guided by activations, and heals them by distillation.

Importing the package teaches transformers to load compressed checkpoints: after ``import tenfold``, plain
``AutoModelForCausalLM.from_pretrained(folder)`` works. The public names, which are the Python equivalents of the commands, are
imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import tenfold.models.hf_quantizer as _hf_quantizer  # noqa: F401 - registers itself with transformers

if TYPE_CHECKING:
    from tenfold.api import (
        bench,
        compress,
        evaluate,
        evaluate_task,
        finetune,
        generate,
        heal,
        inspect,
        load,
        plan,
        pretrain,
        read_calibration,
        save,
    )  # fmt: skip
    from tenfold.models.deepen import deepen
    from tenfold.models.densify import densify
    from tenfold.models.loading import from_pretrained
    from tenfold.models.recipe import Recipe, load_recipe
    from tenfold.models.surgery import replace
    from tenfold.nn.dense_cache import dense_cache

_MODULES = {  # of public names that are not in tenfold.api
    "Recipe": "tenfold.models.recipe",
    "deepen": "tenfold.models.deepen",
    "dense_cache": "tenfold.nn.dense_cache",
    "densify": "tenfold.models.densify",
    "from_pretrained": "tenfold.models.loading",
    "load_recipe": "tenfold.models.recipe",
    "replace": "tenfold.models.surgery",
}

__all__ = [
    "Recipe", "bench", "compress", "deepen", "dense_cache", "densify", "evaluate", "evaluate_task", "finetune",
    "from_pretrained", "generate", "heal", "inspect", "load", "load_recipe", "plan", "pretrain", "read_calibration", "replace",
    "save",
]  # fmt: skip


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'tenfold' has no attribute {name!r}; it has {', '.join(__all__)}")
    return globals().setdefault(name, getattr(import_module(_MODULES.get(name, "tenfold.api")), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
