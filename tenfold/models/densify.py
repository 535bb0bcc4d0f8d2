"""Dense models of factorised ones: ordinary checkpoints that need no tenfold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.experts import pack
from tenfold.models.sites import base_model, forget_tie, head_path, is_tied, shape_of
from tenfold.models.surgery import CONTAINER, factorized_layers, forget_embedding
from tenfold.nn import Experts, TiedEmbedding, TiedHead
from tenfold.structure import Structure


@torch.no_grad()
def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Make every factorised layer dense again, in place, so that ``model`` is saved as a checkpoint that needs no tenfold."""
    for path, layer in factorized_layers(model):
        if not isinstance(layer.structure, Structure):
            raise ValueError(
                f"{path} can't be densified: {layer.structure.kind} has a non-linearity between its factors"
            )
    tied = is_tied(model)
    vars(model.config).pop("quantization_config", None)
    with torch.device("meta"):
        twin = type(model)(model.config)
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(path, pack(module, twin.get_submodule(path)))
    for path, layer in factorized_layers(model):
        model.set_submodule(path, _fill(twin.get_submodule(path), layer).train(layer.training))
    for path, module in list(model.named_modules()):
        if isinstance(module, TiedHead | TiedEmbedding):
            plain: Any = twin.get_submodule(path)
            plain.weight = model.get_input_embeddings().weight
            if getattr(module, "bias", None) is not None:
                plain.bias = module.bias
            model.set_submodule(path, plain.train(module.training))
    base_model(model)._modules.pop(CONTAINER, None)
    forget_embedding(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__.pop("_tied_weights_keys", None)  # back to those of the class
    model.all_tied_weights_keys = twin.all_tied_weights_keys
    if not tied and (head := head_path(model)):
        forget_tie(model, f"{head}.weight")
    return model


def _fill(plain: Any, layer: Any) -> nn.Module:
    """Return ``plain``, which the architecture has at this place, with ``W``, padded by zeros where ``W`` is narrower."""
    weight = pad_to(layer.dense().to(layer.dtype), shape_of(plain))
    plain.weight = nn.Parameter(weight.T.contiguous() if isinstance(plain, Conv1D) else weight)
    if hasattr(plain, "scalar_embed_scale"):  # Gemma
        plain.embed_scale = torch.tensor(layer.multiplier).to(weight)
    if (bias := getattr(layer, "bias", None)) is not None:  # the parameter itself: BERT's head shares it
        plain.bias = bias if len(bias) == len(plain.bias) else nn.Parameter(pad_to(bias, plain.bias.shape))
    elif getattr(plain, "bias", None) is not None:
        plain.bias = nn.Parameter(weight.new_zeros(len(plain.bias)))  # the recipe dropped it
    return plain


def pad_to(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``value`` with zeros behind it on every side, up to ``shape``."""
    sides = [side for have, want in zip(value.shape[::-1], shape[::-1], strict=True) for side in (0, want - have)]
    return nn.functional.pad(value, sides) if any(sides) else value
