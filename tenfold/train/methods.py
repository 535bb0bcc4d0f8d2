"""The methods of fine-tuning by name, each of which decides which parameters of a model are trained.

Add one by an entry in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.evaluation.metrics import import_library
from tenfold.models.checkpoint_format import describe
from tenfold.models.sites import FACTORIZED, base_model, find_sites, module_at
from tenfold.nn import Adapter, FactorizedLinear
from tenfold.train.optimizer import factor_parameters

OUTSIDE_BLOCKS = ("embed", "head")


@dataclass(frozen=True)
class FinetuneMethod:
    """One method of fine-tuning.

    Args:
        prepare: ``prepare(model, rank)`` sets which parameters are trained, except for a new head.
        learning_rate: the default peak.
        finish: turns the trained model into an ordinary one, in place.
    """

    prepare: Callable[[PreTrainedModel, int], None]
    learning_rate: float
    finish: Callable[[PreTrainedModel], None] = lambda model: None


def unfreeze_head(model: PreTrainedModel, new: set[str]) -> None:
    """Train the parameters named in ``new``, and the classification head: what is outside of the base model."""
    inside = {id(p) for p in base_model(model).parameters()}
    classifies = model.get_output_embeddings() is None
    for name, parameter in model.named_parameters():
        if name in new or (classifies and id(parameter) not in inside):
            parameter.requires_grad_(True)


def train_all(model: PreTrainedModel, rank: int = 0) -> None:
    """Train every parameter, including factors that a recipe freezes."""
    model.requires_grad_(True)


def train_auxiliary(model: PreTrainedModel, rank: int = 0) -> None:
    """Train all factors of every structured layer but the largest one, the central tensor; also biases, norms and the pooler.

    Central tensors, factors that a recipe freezes, embeddings and other dense matrices stay. A shared factor is central if it is
    the largest one of any of its layers. A dense pooler is trained: it is the first half of the classification head.

    Raises:
        ValueError: the model has no structured layer.

    Reference: arXiv 2106.02205 (MPOP, lightweight fine-tuning).
    """
    layers = _structured_layers(model)
    if not layers:
        raise ValueError(
            f"a {type(model).__name__} without structured layers has no auxiliary tensors; compress it first (tenfold compress), "
            "or choose --train full or --train lora"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    every, frozen = [factor_parameters(layer) for layer in layers], set()
    for layer, factors in zip(layers, every, strict=True):
        central = max(factors, key=lambda name: factors[name].numel())
        frozen |= {id(factors[name]) for name in {central, *layer.frozen} & factors.keys()}
    for parameter in (parameter for factors in every for parameter in factors.values()):
        parameter.requires_grad_(id(parameter) not in frozen)
    for site in find_sites(model):
        if site.role == "pooler" and not isinstance(module := module_at(model, site.path), FACTORIZED):
            module.requires_grad_(True)


def _structured_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FACTORIZED)]


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """Add a low-rank part to every matrix of the blocks: peft's to a dense one, an ``Adapter`` to a structured one.

    Raises:
        ImportError: peft is not installed.

    Reference: arXiv 2106.09685.
    """
    peft, dense = import_library("peft"), []
    for site in find_sites(model):
        module = module_at(model, site.path)
        if site.role in OUTSIDE_BLOCKS or module is None:
            continue
        if isinstance(module, FactorizedLinear):
            model.set_submodule(site.path, Adapter(module, rank))
        else:
            dense.append(site.path)
    model.requires_grad_(False)
    if dense:
        transposed = any(isinstance(model.get_submodule(path), Conv1D) for path in dense)
        settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "fan_in_fan_out": transposed}
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=dense, **settings), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for layer in _adapters(model):
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(name not in layer.frozen)


def _adapters(model: PreTrainedModel) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def merge_lora(model: PreTrainedModel) -> None:
    """Add peft's parts to their matrices; an ``Adapter`` stays, as part of its layer's structure."""
    tuner = import_library("peft.tuners.lora").LoraLayer
    for path, module in list(model.named_modules()):
        if isinstance(module, tuner):
            module.merge()
            model.set_submodule(path, module.get_base_layer())
    model.__dict__.pop("peft_config", None)
    for layer in _adapters(model):
        layer.frozen = ()  # all of the saved model is trainable again
    if _structured_layers(model):
        before = getattr(model.config, "quantization_config", None)
        model.config.quantization_config = describe(model, getattr(before, "recipe", ""))


METHODS = {
    "full": FinetuneMethod(train_all, 5e-5),
    "auxiliary": FinetuneMethod(train_auxiliary, 5e-4),
    "lora": FinetuneMethod(add_lora, 5e-4, merge_lora),
}
