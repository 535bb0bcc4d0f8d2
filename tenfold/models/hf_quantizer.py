"""Quantizer that lets plain ``from_pretrained`` load compressed checkpoints; importing this module registers it.

``import tenfold`` runs nothing else, so that the rest of the package is imported when the first such checkpoint is read.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from tenfold.models.quantization_config import METHOD, TenfoldConfig


@register_quantizer(METHOD)
class TenfoldQuantizer(HfQuantizer):
    """Puts empty factorized layers into the model before its weights are read, and leaves an ordinary model behind."""

    quantization_config: TenfoldConfig

    def validate_environment(self, *args, **kwargs) -> None:
        from tenfold.models.checkpoint_format import read_format

        if not self.pre_quantized:
            raise ValueError(
                "the configuration is that of a compressed checkpoint; compress a dense one with tenfold.compress"
            )
        read_format(self.quantization_config)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs) -> None:
        from tenfold.models.loading import install_layers

        install_layers(model, self.quantization_config, checkpoint_files or ())

    def _process_model_after_weight_loading(self, model, **kwargs):
        from tenfold.models.loading import finish_loading

        finish_loading(model, self.quantization_config)
        return model

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True
