"""The methods of fine-tuning by name, each of which decides which parameters of a model are trained.

Add one by an entry in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        prepare: ``prepare(model, rank)`` sets which parameters are trained, except for a new head, and returns a function that
            makes the trained model an ordinary one, in place.
        learning_rate: the default peak.
    """

    prepare: Callable[[PreTrainedModel, int], Callable[[], None]]
    learning_rate: float


def unfreeze_head(model: PreTrainedModel, new: set[str]) -> None:
    """Train the parameters named in ``new``, and the classification head: what is outside of the base model."""
    inside = {id(p) for p in base_model(model).parameters()}
    classifies = model.get_output_embeddings() is None
    for name, parameter in model.named_parameters():
        if name in new or (classifies and id(parameter) not in inside):
            parameter.requires_grad_(True)


def train_all(model: PreTrainedModel, rank: int = 0) -> Callable[[], None]:
    """Train every parameter, including factors that a recipe freezes."""
    model.requires_grad_(True)
    return lambda: None


def train_auxiliary(model: PreTrainedModel, rank: int = 0) -> Callable[[], None]:
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
            "or choose --method full or --method lora"
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
        module = module_at(model, site.path)
        if site.role == "pooler" and module is not None and not isinstance(module, FACTORIZED):
            module.requires_grad_(True)
    return lambda: None


def _structured_layers(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FACTORIZED)]


def add_lora(model: PreTrainedModel, rank: int) -> Callable[[], None]:
    """Add a low-rank part to every matrix of the blocks: peft's to a dense one, an ``Adapter`` to a structured one.

    In the end peft's parts are added to their matrices; an ``Adapter`` stays, as part of its layer's structure.

    Raises:
        ImportError: peft is not installed.

    Reference: arXiv 2106.09685.
    """
    peft, dense, adapters = import_library("peft"), [], []
    for site in find_sites(model):
        module = module_at(model, site.path)
        if site.role in OUTSIDE_BLOCKS or module is None:
            continue
        if isinstance(module, FactorizedLinear):
            adapters.append(Adapter(module, rank))
            model.set_submodule(site.path, adapters[-1])
        else:
            dense.append(site.path)
    tuner = None
    if dense:
        transposed = any(isinstance(model.get_submodule(path), Conv1D) for path in dense)
        settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "fan_in_fan_out": transposed}
        tuner = peft.LoraModel(model, {"default": peft.LoraConfig(target_modules=dense, **settings)}, "default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for layer in adapters:
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(name not in layer.frozen)

    def merge() -> None:
        if tuner is not None:
            tuner.merge_and_unload(progressbar=False)
            model.__dict__.pop("peft_config", None)
        for layer in adapters:
            layer.frozen = ()  # all of the saved model is trainable again
        if adapters:
            before = getattr(model.config, "quantization_config", None)
            model.config.quantization_config = describe(model, getattr(before, "recipe", ""))

    return merge


METHODS = {
    "full": FinetuneMethod(train_all, 5e-5),
    "auxiliary": FinetuneMethod(train_auxiliary, 5e-4),
    "lora": FinetuneMethod(add_lora, 5e-4),
}
