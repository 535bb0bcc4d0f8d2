"""``quantization_config`` of a compressed checkpoint: what its ``config.json`` says about its layers."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD, VERSION = "tenfold", 1


class TenfoldConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model, as it is said; ``checkpoint_format.read_format`` checks it.

    Unknown keys are dropped.

    Args:
        sites: ``{path: {structure, bias, shared, frozen, mask}}``, the last three where there are any.
        untied: whether the output head has a matrix of its own.
        recipe: the name of the recipe.
    """

    def __init__(
        self,
        sites: dict | None = None,
        untied: bool = False,
        recipe: str = "",
        format_version: int = VERSION,
        **unknown,
    ):
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.sites, self.untied, self.recipe = {} if sites is None else sites, untied, recipe


register_quantization_config(METHOD)(TenfoldConfig)  # no decorator, which would hide the type


def get_tenfold_config(config: Any) -> TenfoldConfig | None:
    """Return what a model's configuration says about its compression, None for a dense model."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == METHOD:
        return TenfoldConfig(**found)
    return found if isinstance(found, TenfoldConfig) else None
