"""tenfold folds the weight matrices of transformer language models into small tensors.

The public names are twins of the commands. Importing the package teaches transformers to load folded checkpoints:
after ``import tenfold`` plain ``AutoModelForCausalLM.from_pretrained(folder)`` works. Everything else is imported when
it is first asked for.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import tenfold.models.hf_quantizer as _hook  # noqa: F401 - registers it

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
    )
    from tenfold.models.deepen import deepen
    from tenfold.models.loading import from_pretrained
    from tenfold.models.surgery import densify, replace
    from tenfold.nn.dense_cache import dense_cache

_HOME = {
    "dense_cache": "tenfold.nn.dense_cache",
    "deepen": "tenfold.models.deepen",
    "from_pretrained": "tenfold.models.loading",
    "densify": "tenfold.models.surgery",
    "replace": "tenfold.models.surgery",
}

__all__ = [
    "bench",
    "compress",
    "deepen",
    "dense_cache",
    "densify",
    "evaluate",
    "evaluate_task",
    "finetune",
    "from_pretrained",
    "generate",
    "heal",
    "inspect",
    "load",
    "plan",
    "pretrain",
    "read_calibration",
    "replace",
    "save",
]  # fmt: skip


class _Package(ModuleType):
    """The functions ``compress`` and ``evaluate`` win over the folders of the same names."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str):
        if name not in __all__:
            raise AttributeError(f"module 'tenfold' has no attribute {name!r}; it has {', '.join(__all__)}")
        setattr(self, name, getattr(import_module(_HOME.get(name, "tenfold.api")), name))
        return vars(self)[name]

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
