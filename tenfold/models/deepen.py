"""Deepening: from a trained model of ``L`` layers one of ``N``, whose layers share the central tensors of their matrices.

Reference: MPOBERT, arXiv 2303.16753.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tenfold.models.architectures import ARCHITECTURES
from tenfold.models.checkpoint_format import check_plain, describe
from tenfold.models.cost import count
from tenfold.models.plan import Plan, SitePlan, make_plan
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.sites import FOLDED, Site, base_path, find_sites, module_at
from tenfold.models.surgery import finish, install_empty, replace
from tenfold.nn import FactorizedLinear
from tenfold.structure import LowRank, Structure, Sum

RECIPE = "deepen"


def deepen(
    model: PreTrainedModel,
    layers: int,
    recipe: Recipe | str | dict | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``W_l = A1_l A2_l C A3_l A4_l + U_l D_l`` in ``layers`` layers, from a trained model of ``L`` of them.

    - ``C``, the central tensor of a role, is shared by all layers (by the groups of the recipe). The paper takes it from
      ALBERT, whose layers are equal. Where they differ it is that of no single layer and of no mean: it is fitted to all
      ``L`` layers together, and with it the auxiliary tensors ``A``. What the centre of one layer or of the mean loses, and
      what auxiliary tensors lose that are merely copied beside it, is in docs/sharing.md.
    - Layer ``l >= L`` is that of ``l mod L``: the same ``C``, and auxiliary tensors whose product is ``(2 layers)^(-1/4)``
      times as large, each of them by the same share. So is a matrix that is not folded.
    - Adapters start at zero, in the new layers of a folded model as well. Norms, biases, embeddings and heads are copied.

    With ``u`` and ``v`` the scales of the two matrices of a residual branch the paper bounds what an update changes by
    ``(v^2 + u^2) u v = O(1 / layers)``; here it is ``1 / layers``.

    Args:
        model: dense, or folded already: then its structures and its shared factors stay, without a fit. It is folded in place.
        layers: how many; as many as there are folds and adds none.
        recipe: for a dense model: which structures, what is shared, adapters; ``deepen`` unless given.
        progress: wraps the groups of sites that are fitted together.

    Returns:
        The deeper model, and a report: ``layers`` and ``parameters`` before and after, ``scale``, ``errors`` of the fit.

    Raises:
        ValueError: another tool has quantised the model, fewer layers than there are, an architecture without a table or with an
            encoder and a decoder, a recipe for a model that is folded already, and what planning and fitting raise.

    Reference: MPOBERT, arXiv 2303.16753, section 3.
    """
    check_plain(model.config, "the model")
    before = _depth(model)
    if layers < before:
        raise ValueError(
            f"the model has {before} layers and deepening only adds: ask for more than {before}, not {layers}"
        )
    for path, layer in model.named_modules():
        if isinstance(layer, FOLDED) and not isinstance(layer.structure, Structure):
            raise ValueError(f"{path} is a {layer.structure.kind} layer, of which no matrix could be made smaller")
    dense, errors = count(model), {}
    if not any(isinstance(module_at(model, site.path), FOLDED) for site in find_sites(model) if site.layer is not None):
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(RECIPE if recipe is None else recipe)
        errors = {c.path: c.error for c in replace(model, make_plan(model, loaded), "weights", progress)}
    elif recipe is not None:
        raise ValueError(
            "the model is folded already and keeps its structures and shared factors; leave the recipe out"
        )
    deep = _extended(model, before, layers)
    return deep, {
        "layers": [before, layers],
        "scale": scale(layers),
        "parameters": count(deep) | {"dense": dense["total"]},
        "parameters_dense": dense,
        "errors": errors,
    }


def scale(layers: int) -> float:
    """``(2 layers)^(-1/4)``: of every matrix of an added layer."""
    return (2 * layers) ** -0.25


def deeper_config(config: Any, layers: int) -> Any:
    """A copy of ``config`` for ``layers`` layers; its lists of one entry a layer begin again behind the last."""
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    before = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before and "layer" in key and key != "mlp_only_layers":
            setattr(text, key, [value[k % before] for k in range(layers)])
    if getattr(text, "mlp_only_layers", None):
        text.mlp_only_layers = [k for k in range(layers) if k % before in text.mlp_only_layers]
    if hasattr(text, "num_hidden_groups"):
        text.num_hidden_groups = layers  # ALBERT's layers are equal at first, and each has parameters of its own
    text.num_hidden_layers = layers
    return config


def _depth(model: PreTrainedModel) -> int:
    find_sites(model)  # refuses an architecture without a table
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"a {config.model_type} has an encoder and a decoder, of which one number of layers says nothing; deepen a model "
            "that has one of them"
        )
    if getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"in this {config.model_type} every {config.decoder_sparse_step}th block has experts, the added ones would not be "
            "copies of others; deepen a model with experts in every block"
        )
    return config.num_hidden_layers


@dataclass(frozen=True)
class _Blocks:
    """Which block of a model a block of the deeper one comes from.

    Args:
        pattern: of names inside blocks: what is in front of the number, and the number.
        before: layers of the model.
        count: its blocks; fewer where several layers are one block (ALBERT).
    """

    pattern: re.Pattern
    before: int
    count: int

    @classmethod
    def of(cls, model: PreTrainedModel, before: int) -> _Blocks:
        paths = ARCHITECTURES[model.config.model_type].paths.values()
        names = [path for found in paths for path in ([found] if isinstance(found, str) else found)]
        (front,) = {base_path(model) + name.partition("*")[0] for name in names if "*" in name}
        count = len(model.get_submodule(front.rstrip(".")))
        return cls(re.compile(rf"({re.escape(front)})(\d+)(?=\.|$)"), before, count)

    def source(self, number: int) -> int:
        return number % self.before * self.count // self.before

    def number(self, name: str) -> int | None:
        found = self.pattern.match(name)
        return int(found[2]) if found else None

    def renamed(self, name: str, number: int) -> str:
        return self.pattern.sub(rf"\g<1>{number}", name, count=1)

    def named(self, name: str) -> str:
        """What the tensor ``name`` of the deeper model is called in the model."""
        number = self.number(name)
        return name if number is None else self.renamed(name, self.source(number))


@torch.no_grad()
def _extended(model: PreTrainedModel, before: int, layers: int) -> PreTrainedModel:
    """A model of ``layers`` layers with the structures and the weights of ``model``."""
    stored, blocks, entries = describe(model, model.config.quantization_config.recipe), _Blocks.of(model, before), {}
    for path, layer in model.named_modules():
        if isinstance(layer, FOLDED):
            number = blocks.number(path)
            numbers = [k for k in range(layers) if blocks.source(k) == number] if number is not None else []
            for name in [blocks.renamed(path, k) for k in numbers] or [path]:
                entries[name] = _entry(name, layer)
    deep = type(model)._from_config(deeper_config(model.config, layers), dtype=model.dtype).to(model.device)
    install_empty(deep, Plan(entries, stored.untied, stored.recipe))
    state = model.state_dict()
    deep.load_state_dict({name: state[blocks.named(name)] for name in deep.state_dict()})
    for site in find_sites(deep):
        number = blocks.number(site.path)
        if number is not None and number >= before:
            _begin(deep.get_submodule(site.path), scale(layers))
    finish(deep, stored.recipe)
    return deep.train(model.training)


def _entry(path: str, layer: nn.Module) -> SitePlan:
    bias = getattr(layer, "bias", None) is not None
    site = Site(path, "", None, layer.structure.shape, bias)
    return SitePlan(site, layer.structure, bias, shared=layer.shared, frozen=layer.frozen, mask=layer.mask)


def _begin(module: nn.Module, scale: float) -> None:
    """The matrix of an added layer: smaller, what is shared as it is, an adapter beside it zero."""
    if not isinstance(module, FactorizedLinear):
        module.weight.mul_(scale)
        return
    places = module.structure.normal_form()
    if _has_adapter(module):
        module.part_1_left.zero_()
        places = places[:-1]
    for place in places:
        own = [name for name in place.spec.names if name not in module.shared]
        for name in own:
            getattr(module, name).mul_(scale ** (1 / len(own)))


def _has_adapter(layer: FactorizedLinear) -> bool:
    """A sum whose second and last part is of low rank: what a recipe's ``adapter`` makes."""
    structure = layer.structure
    return isinstance(structure, Sum) and len(structure.parts) == 2 and isinstance(structure.parts[1], LowRank)
