"""Register transforms of the whole model that run before the rules of a recipe, by the name that the recipe gives in ``first``.

Add one with a function ``(model, recipe, text) -> report`` and a line in ``TRANSFORMS``; one that reads no text, and may get
None, has its name in ``WEIGHTS_ONLY``, too. :mod:`tenfold.baselines` registers all that ship.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from tenfold.models.recipe import Recipe

TRANSFORMS: dict[str, Callable[[PreTrainedModel, Recipe, Any], dict[str, Any]]] = {}
WEIGHTS_ONLY: set[str] = set()
