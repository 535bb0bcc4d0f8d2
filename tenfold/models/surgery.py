"""Model surgery: put factorized layers where a plan says so, from weights or from random draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.checkpoint_format import describe
from tenfold.models.distributed import gather_results, num_processes, shard_items
from tenfold.models.experts import unpack
from tenfold.models.initializers import (
    BRANCHES,
    DRAWS,
    QUICK,
    STARTS,
    add_adapter,
    check_fit_options,
    check_options,
    initialize,
)
from tenfold.models.plan import Plan, SitePlan
from tenfold.models.sites import FACTORIZED, base_model, dtype_of, forget_tie, head_path, is_tied, weight_of
from tenfold.models.suggestions import check_name
from tenfold.nn import FactorizedEmbedding, FactorizedLinear, SharedFactors, TiedEmbedding, TiedHead
from tenfold.structure import Factors
from tenfold.structure.base import check_matrix

CONTAINER = "shared_factors"
GROUPS_PER_PROCESS = 8  # that a process fits before the results are gathered
Fit = tuple[Factors, float | None]  # with the relative error


def replace(
    model: PreTrainedModel, plan: Plan, source: str = "weights", progress: Callable[[Iterable], Iterable] = iter
) -> dict[str, float | None]:
    """Factorise the sites of ``plan`` in ``model``, in place, and describe them in the model's configuration.

    Fits run in float32 or better; factors get the dtype of the weight they replace. A site that is factorised already is
    fitted anew, from the matrix that it holds.

    Args:
        source: ``weights`` fits the factors to the model's matrices as the plan says, ``noise`` draws them as
            the start says (``tenfold.models.initializers.DRAWS``), with the standard deviation of the present matrix, or of
            the configuration's initialiser where there is none.
        progress: wraps the list of groups of sites that is worked through.

    Returns:
        ``||W - What|| / ||W||`` by path, None from noise.

    Raises:
        ValueError: a matrix holds NaN or Inf or is not in memory, or a start does not suit its structure; the site is
            named.
    """
    if source not in ("weights", "noise"):
        raise ValueError(f"source is {source!r}; it must be 'weights' or 'noise'")
    unpack_experts(model)
    if source == "weights":
        _check_weights(model, plan)
    _prepare(model, plan)
    groups, errors = _group_by_shared_factors(plan), {}
    # every process draws all, but fits only its part of some groups at a time
    size = 1 if source == "noise" or num_processes() == 1 else GROUPS_PER_PROCESS * num_processes()
    for first in progress(range(0, len(groups), size)):
        some = groups[first : first + size]
        if source == "noise":
            results = {0: _draw_group(model, some[0])}
        else:
            results = gather_results({k: _fit_group(model, some[k]) for k in shard_items(list(range(len(some))))})
        for number, found in results.items():
            for entry, (factors, error) in zip(some[number], found, strict=True):
                install(model, entry, factors)
                errors[entry.site.path] = error
    finish(model, plan.recipe)
    return errors


def install_empty(model: PreTrainedModel, plan: Plan) -> None:
    """Put empty layers at the sites of ``plan``: to count on the meta device and before a checkpoint is read."""
    unpack(model)
    _prepare(model, plan)
    for entry in plan.entries.values():
        _install_layer(model, entry)
    tie(model)


@torch.no_grad()
def install(model: PreTrainedModel, entry: SitePlan, factors: Factors, bias: Tensor | None = None) -> None:
    """Factorise one site with known factors and, if given, a new bias; call ``finish`` after the last one."""
    old, new = _install_layer(model, entry)
    new.set_factors(factors)
    for name, key in new.shared.items():
        getattr(base_model(model), CONTAINER).get_parameter(key).copy_(factors[name])
    if bias is not None and isinstance(new, FactorizedLinear):
        like = old.like if isinstance(old, FACTORIZED) else old.weight
        trained = bool((like if old.bias is None else old.bias).requires_grad)
        new.bias = nn.Parameter(bias.to(like), requires_grad=trained)


def install_together(model: PreTrainedModel, changes: list[tuple[SitePlan, Factors, Tensor | None]]) -> None:
    """Factorise several sites that share factors, ``(entry, factors, bias)`` each, as ``install`` does one."""
    _create_container(model, Plan({entry.site.path: entry for entry, _, _ in changes}))
    for change in changes:
        install(model, *change)


def finish(model: PreTrainedModel, recipe: str) -> None:
    """Tie what is tied and describe the model in its configuration, after sites were factorised one by one."""
    tie(model)
    container = getattr(base_model(model), CONTAINER, None)
    if container is not None:
        used = {key for _, layer in factorized_layers(model) for key in layer.shared.values()}
        for key in [key for key, _ in container.named_parameters() if key not in used]:
            delattr(container, key)
        if not used:
            delattr(base_model(model), CONTAINER)
    model.config.quantization_config = describe(model, recipe)


@torch.no_grad()
def set_matrix(module: Any, matrix: Tensor, bias: Tensor | None) -> None:
    """Give a dense layer another matrix ``(out, in)`` and bias."""
    if isinstance(module, FactorizedLinear):
        module.set_factors({"matrix": matrix})
    else:
        module.weight.copy_(matrix.T if isinstance(module, Conv1D) else matrix)
    if bias is not None:
        module.get_parameter("bias").copy_(bias)


def unpack_experts(model: PreTrainedModel) -> None:
    """Unpack fused experts, and describe the model so that it can be saved and read again whatever happens next."""
    if unpack(model):
        finish(model, "")


@torch.no_grad()
def untie(model: PreTrainedModel) -> None:
    """Give the output head a matrix of its own."""
    head: Any = model.get_output_embeddings()
    path = head_path(model)
    if path is None or not is_tied(model):
        return
    if isinstance(head, TiedHead):
        own: Any = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        own.weight, own.bias = nn.Parameter(head.dense()), head.bias
        model.set_submodule(path, own)
    else:
        head.weight = nn.Parameter(head.weight.detach().clone())
    forget_tie(model, f"{path}.weight")
    if not model.all_tied_weights_keys:  # BERT's bias and T5's other embeddings stay tied, and with them the setting
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def tie(model: PreTrainedModel) -> None:
    """Make every tied name of a factorised embedding read from it: the tied head, and T5's two embeddings."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, FactorizedEmbedding):
        return
    own = next(path for path, module in model.named_modules() if module is embedding) + ".weight"
    for pair in model.all_tied_weights_keys.items():
        if own in pair:
            path = pair[pair[0] == own].removesuffix(".weight")
            old = model.get_submodule(path)
            new = TiedHead(embedding, getattr(old, "bias", None)) if old is head else TiedEmbedding(embedding)
            model.set_submodule(path, new)
    for module in model.modules():
        if isinstance(module, TiedHead | TiedEmbedding):  # of an embedding that was factorised before
            module.attach(embedding)
    forget_tie(model, own)
    own_names = vars(model)
    own_names["resize_token_embeddings"] = partial(_refuse_resize, embedding)
    if not hasattr(model, "embeddings") or "embeddings" in own_names:  # where peft's prompt tuning looks for it
        own_names["embeddings"] = nn.ModuleDict({"word_embeddings": embedding})


def forget_embedding(model: PreTrainedModel) -> None:
    """Remove what ``tie`` has put on ``model`` for a factorised embedding."""
    for name in ("resize_token_embeddings", "embeddings"):
        vars(model).pop(name, None)


def _refuse_resize(embedding: FactorizedEmbedding, size: int | None = None, *arguments, **keywords) -> Any:
    if size in (None, embedding.num_embeddings) and not arguments and not keywords.get("pad_to_multiple_of"):
        return embedding
    raise ValueError(
        f"the embedding is factorised ({embedding.structure}) and can't be resized; make it dense first: tenfold.densify(model)"
    )


# layers ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _check_weights(model: PreTrainedModel, plan: Plan) -> None:
    for path, entry in plan.entries.items():
        check_matrix(entry.structure.kind, path)
        weight = weight_of(model.get_submodule(path))
        if weight.is_meta:
            raise ValueError(f"the weight of {path} is not in memory (meta device or offloaded); load it first")
        if wrong := int((~torch.isfinite(weight)).sum()):
            raise ValueError(f"the weight of {path} holds {wrong} values that are NaN or Inf; mend them first")


def _prepare(model: PreTrainedModel, plan: Plan) -> None:
    if plan.untie:
        untie(model)
    _create_container(model, plan)


def _install_layer(model: PreTrainedModel, entry: SitePlan) -> tuple[Any, Any]:
    """Replace the module of one site by an empty factorized one with its bias; return both."""
    path = entry.site.path
    old: Any = model.get_submodule(path)
    like = old.like if isinstance(old, FACTORIZED) else old.weight
    given = {"shared": entry.shared, "frozen": entry.frozen, "device": like.device, "dtype": like.dtype}
    if isinstance(old, nn.Embedding | FactorizedEmbedding):
        scale = getattr(old, "scalar_embed_scale", getattr(old, "multiplier", 1.0))
        new: Any = FactorizedEmbedding(entry.structure, old.padding_idx, scale, **given)
    else:
        new = FactorizedLinear(entry.structure, entry.bias, **given)
        if not entry.bias:
            forget_tie(model, f"{path}.bias")
        elif old.bias is not None and old.bias.shape == new.bias.shape:  # not where the layer gets narrower
            new.bias = old.bias  # the parameter itself: BERT's head shares it
    if entry.shared:
        new.attach(getattr(base_model(model), CONTAINER))
    new.freeze()
    model.set_submodule(path, new.train(old.training))
    return old, new


def factorized_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return ``(path, layer)`` of every factorized layer."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, FACTORIZED)]


def _group_by_shared_factors(plan: Plan) -> list[list[SitePlan]]:
    """Return the groups of entries that are fitted together; an entry that shares nothing is a group."""
    groups: dict[object, list[SitePlan]] = {}
    for path, entry in plan.entries.items():
        groups.setdefault(tuple(sorted(entry.shared.values())) or path, []).append(entry)
    return list(groups.values())


def _create_container(model: PreTrainedModel, plan: Plan) -> None:
    """Replace the container of shared factors by one with those of ``plan``, and those that other layers go on using."""
    base, shapes, masks = base_model(model), {}, {}
    others = [layer for path, layer in factorized_layers(model) if layer.shared and path not in plan.entries]
    kept = {key: getattr(base, CONTAINER).get_parameter(key) for layer in others for key in layer.shared.values()}
    for entry in plan.entries.values():
        shapes |= {key: entry.structure.factor_shapes()[name] for name, key in entry.shared.items()}
        masks |= {key: entry.mask for key in entry.shared.values() if entry.mask}
    if clash := sorted(kept.keys() & shapes.keys()):
        raise ValueError(f"layers outside of the plan share {clash} already; factorise all that share a factor at once")
    if not kept and not shapes:
        base._modules.pop(CONTAINER, None)
        return
    masks |= {key: layer.mask for layer in others for key in layer.shared.values() if layer.mask}
    container = SharedFactors(shapes, masks, model.device, dtype_of(model))
    for key, parameter in kept.items():
        container.register_parameter(key, parameter)
    for layer in others:
        layer.attach(container)
    setattr(base, CONTAINER, container)


# factors ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fit_group(model: PreTrainedModel, group: list[SitePlan]) -> list[Fit]:
    """Return the factors of one entry, or of several that share some, and their errors, in float32 or better."""
    structure, start = group[0].fitted_structure, group[0].start
    names = tuple(name.removeprefix("part_0_") if group[0].adapter else name for name in group[0].shared)
    weights = [weight_of(model.get_submodule(entry.site.path)) for entry in group]
    weights = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    try:
        if len(group) == 1:
            sets = [initialize(structure, weights[0], start)]
        else:
            joint = structure.fit(weights, shared=names, **QUICK | check_fit_options(start.options))
            sets = [{n: v if n in names else v[k] for n, v in joint.items()} for k in range(len(group))]
    except ValueError as reason:
        raise ValueError(f"{', '.join(entry.site.path for entry in group)}: {reason}") from None
    results: list[Fit] = []
    for entry, factors, weight in zip(group, sets, weights, strict=True):
        near = structure.dense({name: value.to(weight.device) for name, value in factors.items()}).to(weight.dtype)
        error = float(near.sub_(weight).norm() / weight.norm().clamp_min(1e-30))
        results.append((add_adapter(entry.structure, factors) if entry.adapter else factors, error))
    return results


def _draw_group(model: PreTrainedModel, group: list[SitePlan]) -> list[Fit]:
    drawn = [_draw(model, entry) for entry in group]
    shared = ({name: drawn[0][name] for name in entry.shared} for entry in group)
    return [(factors | first, None) for factors, first in zip(drawn, shared, strict=True)]


@torch.no_grad()
def _draw(model: PreTrainedModel, entry: SitePlan) -> Factors:
    """Draw factors as the start says; ``branch: scaled`` or ``zero`` applies to the end of a residual branch."""
    structure, start = entry.fitted_structure, entry.start
    check_name(start.fit, STARTS, "start")  # the start of a fit is drawn as noise
    check_options(start.options, {"branch": str}, f"the start {start.fit} of a new model")
    weight, config = weight_of(model.get_submodule(entry.site.path)), model.config.get_text_config()
    std, known = getattr(config, "initializer_range", 0.02), not weight.is_meta and bool(weight.any())
    branch = start.options.get("branch") if entry.site.role.endswith(".out") else None
    if known and branch is None:
        std = float(weight.float().std())
    factors = DRAWS.get(start.fit, DRAWS["noise"])(structure, std, None)
    if branch:
        scale = BRANCHES[branch](config.num_hidden_layers)
        factors |= {name: factors[name] * scale for name in structure.last_factors()}
    return add_adapter(entry.structure, factors) if entry.adapter else factors
