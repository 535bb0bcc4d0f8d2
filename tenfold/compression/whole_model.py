"""Registry of the transforms of a whole model that run before the rules of a recipe, by the name that ``transform`` gives.

To add one, write a function ``(model, recipe, text) -> report`` and put it into ``TRANSFORMS``; add its name to
``WEIGHTS_ONLY`` if it accepts None for the text. ``tenfold.baselines`` registers all that ship.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from tenfold.models.recipe import Recipe

TRANSFORMS: dict[str, Callable[[PreTrainedModel, Recipe, Any], dict[str, Any]]] = {}
WEIGHTS_ONLY: set[str] = set()
