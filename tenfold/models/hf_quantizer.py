"""The hook that lets plain ``from_pretrained`` rebuild folded layers; importing this module registers it.

It is all that ``import tenfold`` runs, so it imports nothing of the package before a folded checkpoint is read.
"""

from __future__ import annotations

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD, VERSION = "tenfold", 1


@register_quantization_config(METHOD)
class FoldedConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a folded model; unknown keys are kept out.

    Args:
        sites: ``{path: {structure, bias, shared, frozen, mask}}``, the last three where there are any.
        untied: whether the output head has a matrix of its own.
        recipe: the name of the recipe.
    """

    def __init__(
        self, sites: dict | None = None, untied: bool = False, recipe: str = "", format_version=VERSION, **more
    ):
        self.quant_method, self.format_version = METHOD, format_version
        self.sites, self.untied, self.recipe = sites or {}, untied, recipe


@register_quantizer(METHOD)
class FoldedLoader(HfQuantizer):
    """Puts empty factorized layers into the model before its weights are read, then steps aside."""

    def validate_environment(self, *args, **kwargs) -> None:
        from tenfold.models.loading import check_stored

        if not self.pre_quantized:
            raise ValueError("the configuration is that of a folded checkpoint; fold a dense one with tenfold.compress")
        check_stored(self.quantization_config)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs) -> None:
        from tenfold.models.loading import make_room

        make_room(model, self.quantization_config, checkpoint_files or ())

    def _process_model_after_weight_loading(self, model, **kwargs):
        from tenfold.models.loading import step_aside

        step_aside(model, self.quantization_config)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
