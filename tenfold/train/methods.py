"""What a fine-tuning trains: ways by name, each of which says which parameters of a model are free.

Add one by an entry in :data:`WAYS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.evaluate.metrics import library
from tenfold.models.checkpoint_format import describe
from tenfold.models.sites import FACTORIZED, base_model, find_sites, module_at
from tenfold.models.suggestions import check_name
from tenfold.nn import Adapter, FactorizedLinear

OUTSIDE = ("embed", "head")


@dataclass(frozen=True)
class FinetuneMethod:
    """One way to fine-tune.

    Args:
        free: ``free(model, rank)`` leaves those parameters of a model free that are trained; the new head is freed after it.
        learning_rate: the peak, unless one is given.
        finish: makes an ordinary model of the trained one, in place.
    """

    free: Callable[[PreTrainedModel, int], None]
    learning_rate: float
    finish: Callable[[PreTrainedModel], None] = lambda model: None


def way_named(name: str) -> FinetuneMethod:
    """The way of this name.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    check_name(name, WAYS, "way to train")
    return WAYS[name]


def free_head(model: PreTrainedModel, new: set[str]) -> None:
    """Let the parameters that are ``new`` be trained, and the classification head, the part outside of the base model."""
    inside = {id(p) for p in base_model(model).parameters()}
    classifies = model.get_output_embeddings() is None
    for name, parameter in model.named_parameters():
        if name in new or (classifies and id(parameter) not in inside):
            parameter.requires_grad_(True)


def full(model: PreTrainedModel, rank: int = 0) -> None:
    """Every parameter, factors that a recipe freezes too."""
    model.requires_grad_(True)


def auxiliary(model: PreTrainedModel, rank: int = 0) -> None:
    """Of every folded matrix all factors but the largest one, the central tensor; biases, norms, and a pooler that is not folded.

    Central tensors, factors that a recipe freezes, embeddings and whatever else is dense stay as they are. A factor that
    several layers share is central if it is the largest one of any of them. A pooler is the first half of the classification
    head, and often as new as the rest of it.

    Raises:
        ValueError: nothing of the model is folded.

    Reference: arXiv 2106.02205 (MPOP, lightweight fine-tuning).
    """
    layers = _folded(model)
    if not layers:
        raise ValueError(
            f"a {type(model).__name__} without folded layers has no auxiliary tensors; fold it first (tenfold compress), or "
            "choose --train full or --train lora"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    kept = set()
    for layer in layers:
        factors = _parameters(layer)
        central = max(factors, key=lambda name: factors[name].numel())
        kept |= {id(factors[name]) for name in {central, *layer.frozen} & factors.keys()}
        for parameter in factors.values():
            parameter.requires_grad_(True)
    for layer in layers:
        for parameter in _parameters(layer).values():
            parameter.requires_grad_(id(parameter) not in kept)
    for site in find_sites(model):
        if site.role == "pooler" and not isinstance(module := module_at(model, site.path), FACTORIZED):
            module.requires_grad_(True)


def _folded(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FACTORIZED)]


def _parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a folded layer as parameters, shared ones too."""
    own = {name: p for name, p in layer.named_parameters(recurse=False) if name in layer.structure.factor_shapes()}
    return own | {name: layer._container[0].get_parameter(key) for name, key in layer.shared.items()}


def lora(model: PreTrainedModel, rank: int) -> None:
    """A low-rank part beside every matrix of the blocks: peft's where it is dense, :class:`Adapter` where it is folded.

    Raises:
        ImportError: peft is not installed.

    Reference: arXiv 2106.09685.
    """
    peft, dense = library("peft"), []
    for site in find_sites(model):
        module = module_at(model, site.path)
        if site.role in OUTSIDE or module is None:
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


def merged(model: PreTrainedModel) -> None:
    """peft's parts added to their matrices; an :class:`Adapter` stays, as a part of its layer's structure."""
    tuner = library("peft.tuners.lora").LoraLayer
    for path, module in list(model.named_modules()):
        if isinstance(module, tuner):
            module.merge()
            model.set_submodule(path, module.get_base_layer())
    model.__dict__.pop("peft_config", None)
    for layer in _adapters(model):
        layer.frozen = ()  # the saved model trains as a whole again
    if _folded(model):
        before = getattr(model.config, "quantization_config", None)
        model.config.quantization_config = describe(model, getattr(before, "recipe", ""))


WAYS = {
    "full": FinetuneMethod(full, 5e-5),
    "auxiliary": FinetuneMethod(auxiliary, 5e-4),
    "lora": FinetuneMethod(lora, 5e-4, merged),
}
