"""Deepening: make a model of ``N`` layers from a trained one of ``L``, with shared central tensors in their matrices.

Reference: MPOBERT, arXiv 2303.16753.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedModel

from tenfold.models.architectures import ARCHITECTURES
from tenfold.models.checkpoint_format import check_plain, describe, read_plan
from tenfold.models.cost import count
from tenfold.models.plan import make_plan
from tenfold.models.quantization_config import TenfoldConfig
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.sites import FACTORIZED, base_path, find_sites, module_at
from tenfold.models.surgery import factorized_layers, finish, install_empty, replace
from tenfold.nn import FactorizedLinear
from tenfold.structure import LowRank, Structure, Sum

RECIPE = "deepen"


def deepen(
    model: PreTrainedModel,
    layers: int,
    recipe: Recipe | str | dict | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Make a model of ``layers`` layers from a trained one of ``L``, with ``W_l = A1_l A2_l C A3_l A4_l + U_l D_l``.

    - ``C``, the central tensor of a role, is shared by all layers (by the groups of the recipe). The paper takes it from
      ALBERT, whose layers are equal. Here it is fitted to all ``L`` layers together, and with it the auxiliary tensors ``A``;
      docs/sharing.md compares that with the centre of one layer or of the mean.
    - Layer ``l >= L`` is a copy of layer ``l mod L``: the same ``C``, and auxiliary tensors whose product is
      ``(2 layers)^(-1/4)`` times as large, each scaled alike. A matrix that is not factorised is scaled, too.
    - Adapters start at zero, in the new layers of a factorised model as well. Norms, biases, embeddings and heads are copied.

    With ``u`` and ``v`` the scales of the two matrices of a residual branch the paper bounds the effect of an update by
    ``(v^2 + u^2) u v = O(1 / layers)``; here it is ``1 / layers``.

    Args:
        model: dense, or factorised already: then its structures and its shared factors stay, without a fit. A dense model is
            factorised in place.
        layers: their number; ``L`` factorises and adds none.
        recipe: for a dense model: its structures, shared factors and adapters; ``deepen`` unless given.
        progress: wraps the groups of sites that are fitted together.

    Returns:
        The deeper model, and a report: ``layers`` and ``parameters`` before and after, ``scale``, ``errors`` of the fit.

    Raises:
        ValueError: another tool has quantised the model, fewer layers than there are, an architecture without a table or with an
            encoder and a decoder, a recipe for a factorised model, and what planning and fitting raise.

    Reference: MPOBERT, arXiv 2303.16753, section 3.
    """
    check_plain(model.config, "the model")
    before = _depth(model)
    if layers < before:
        raise ValueError(
            f"the model has {before} layers and deepening only adds: ask for more than {before}, not {layers}"
        )
    for path, layer in factorized_layers(model):
        if not isinstance(layer.structure, Structure):
            raise ValueError(f"{path} is a {layer.structure.kind} layer and has no matrix to scale; take another model")
    dense, errors = count(model), {}
    inside = [module_at(model, site.path) for site in find_sites(model) if site.layer is not None]
    if not any(isinstance(module, FACTORIZED) for module in inside):
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(RECIPE if recipe is None else recipe)
        errors = replace(model, make_plan(model, loaded), "weights", progress)
    elif recipe is not None:
        raise ValueError(
            "the model is factorised already and keeps its structures and shared factors; leave the recipe out"
        )
    deep = _extend(model, before, layers)
    return deep, {
        "layers": [before, layers],
        "scale": scale(layers),
        "parameters": count(deep) | {"dense": dense["total"]},
        "parameters_dense": dense,
        "errors": errors,
    }


def scale(layers: int) -> float:
    """Return ``(2 layers)^(-1/4)``, the scale of every matrix of an added layer."""
    return (2 * layers) ** -0.25


def deeper_config(config: Any, layers: int) -> Any:
    """Return ``config`` for ``layers`` layers; its lists of one entry per layer repeat."""
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
        text.num_hidden_groups = layers  # ALBERT's layers are equal at first, but have parameters of their own
    text.num_hidden_layers = layers
    return config


def _depth(model: PreTrainedModel) -> int:
    find_sites(model)  # refuses an architecture without a table
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"a {config.model_type} has an encoder and a decoder, so that one number of layers is not enough; deepen a model "
            "that has one of them"
        )
    if getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"in this {config.model_type} every {config.decoder_sparse_step}th block has experts, the added ones would not be "
            "copies of others; deepen a model with experts in every block"
        )
    return config.num_hidden_layers


def _front(model: PreTrainedModel) -> str:
    """Return the path of the list of the model's blocks, with a dot."""
    paths = ARCHITECTURES[model.config.model_type].paths.values()
    names = [path for found in paths for path in ([found] if isinstance(found, str) else found)]
    (front,) = {base_path(model) + name.partition("*")[0] for name in names if "*" in name}
    return front


@torch.no_grad()
def _extend(model: PreTrainedModel, before: int, layers: int) -> PreTrainedModel:
    """Return a model of ``layers`` layers with the structures and the weights of ``model``."""
    front = _front(model)
    block = re.compile(rf"({re.escape(front)})(\d+)(?=\.|$)")
    blocks: Any = model.get_submodule(front.rstrip("."))  # fewer than layers where several are one block (ALBERT)

    def source(number: int) -> int:
        return number % before * len(blocks) // before

    stored, sites = describe(model, model.config.quantization_config.recipe), {}
    for path, site in stored.sites.items():
        found = block.match(path)
        copies = [k for k in range(layers) if found is None or source(k) == int(found[2])]
        sites |= {block.sub(rf"\g<1>{k}", path, count=1): site for k in copies}
    deep: Any = type(model)._from_config(deeper_config(model.config, layers), dtype=model.dtype)
    deep.to(model.device)
    install_empty(deep, read_plan(deep, TenfoldConfig(sites, stored.untied, stored.recipe)))
    state = model.state_dict()
    names = {name: block.sub(lambda m: f"{m[1]}{source(int(m[2]))}", name, count=1) for name in deep.state_dict()}
    deep.load_state_dict({name: state[old] for name, old in names.items()})
    for site in find_sites(deep):
        found = block.match(site.path)
        if found is not None and int(found[2]) >= before:
            _scale_added(deep.get_submodule(site.path), scale(layers))
    finish(deep, stored.recipe)
    return deep.train(model.training)


def _scale_added(module: Any, scale: float) -> None:
    """Scale the matrix of an added layer, without its shared factors, and set an adapter beside it to zero."""
    if not isinstance(module, FactorizedLinear):
        module.weight.mul_(scale)
        return
    places, structure = module.structure.normal_form(), module.structure
    # a sum whose second and last part is of low rank has an adapter of a recipe
    if isinstance(structure, Sum) and len(structure.parts) == 2 and isinstance(structure.parts[1], LowRank):
        module.get_parameter("part_1_left").zero_()
        places = places[:-1]
    for place in places:
        own = [name for name in place.spec.names if name not in module.shared]
        for name in own:
            module.get_parameter(name).mul_(scale ** (1 / len(own)))
