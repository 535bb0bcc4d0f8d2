"""Changes of the whole model before the rules of a recipe are carried out, by the name that the recipe gives in ``first``.

Add one by a function ``(model, recipe, text) -> report`` and a line in ``FIRST``; one that reads no text, and may get None, has
its name in ``WEIGHTS_ONLY``, too. :mod:`tenfold.baselines` enters more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from tenfold.compress.layers import drop_layers
from tenfold.compress.order import order_units
from tenfold.compress.rotate import rotate_stream
from tenfold.compress.slice import slice_stream
from tenfold.models.recipe import Recipe

FIRST: dict[str, Callable[[PreTrainedModel, Recipe, Any], dict[str, Any]]] = {
    "drop-layers": drop_layers,
    "slice": slice_stream,
    "rotate": rotate_stream,
    "order": order_units,
}

WEIGHTS_ONLY: set[str] = set()
