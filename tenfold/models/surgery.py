"""Model surgery: put factorized layers where a plan says so, from weights or from random draws, and make them dense again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.checkpoint_format import describe
from tenfold.models.distributed import gather_results, num_processes, shard_items
from tenfold.models.experts import pack, unpack
from tenfold.models.initializers import (
    DRAWS,
    QUICK,
    STARTS,
    add_adapter,
    check_fit_options,
    check_options,
    initialize,
    scale_branch_end,
)
from tenfold.models.plan import Plan, SitePlan
from tenfold.models.sites import FACTORIZED, base_model, dtype_of, forget_tie, head_path, is_tied, shape_of, weight_of
from tenfold.models.suggestions import check_name
from tenfold.nn import Experts, FactorizedEmbedding, FactorizedLinear, SharedFactors, TiedEmbedding, TiedHead
from tenfold.nn.registry import check_matrix, layer_of
from tenfold.structure import Factors, Structure

CONTAINER = "shared_factors"
GROUPS_PER_PROCESS = 8  # that a process fits before the results are gathered
Fit = tuple[SitePlan, Factors, float | None]  # with the relative error


@dataclass(frozen=True)
class SiteReport:
    """Parameters of one site before and after, and ``||W - What|| / ||W||`` (None from noise).

    Shared factors are left out of ``after``.
    """

    path: str
    structure: Structure
    before: int
    after: int
    error: float | None


def replace(
    model: PreTrainedModel, plan: Plan, source: str = "weights", progress: Callable[[Iterable], Iterable] = iter
) -> list[SiteReport]:
    """Factorise the sites of ``plan`` in ``model``, in place, and describe them in the model's configuration.

    Fits run in float32 or better; factors get the dtype of the weight they replace. A site that is factorised already is
    fitted anew, from the matrix that it holds.

    Args:
        source: ``weights`` fits the factors to the model's matrices as the plan says, ``noise`` draws them as
            the start says (``tenfold.models.initializers.DRAWS``), with the standard deviation of the present matrix, or of
            the configuration's initialiser where there is none.
        progress: wraps the list of groups of sites that is worked through.

    Raises:
        ValueError: a matrix holds NaN or Inf or is not in memory, or a start does not suit its structure; the site is
            named.
    """
    if source not in ("weights", "noise"):
        raise ValueError(f"source is {source!r}; it must be 'weights' or 'noise'")
    unpack_experts(model)
    if source == "weights":
        _check_weights(model, plan)
    untie(model, plan)
    container, reports = _create_container(model, plan), []
    fit = _draw_groups if source == "noise" else _fit_groups
    for entry, factors, error in fit(model, _group_by_shared_factors(plan), progress):
        old, new = _install_layer(model, entry, container)
        _set_factors(new, factors)
        before, after = (sum(p.numel() for p in module.parameters()) for module in (old, new))
        reports.append(SiteReport(entry.site.path, entry.structure, before, after, error))
    finish(model, plan.recipe)
    return reports


def install_empty(model: PreTrainedModel, plan: Plan) -> None:
    """Put empty layers at the sites of ``plan``: to count on the meta device and before a checkpoint is read."""
    unpack(model)
    untie(model, plan)
    container = _create_container(model, plan)
    for entry in plan.entries.values():
        _install_layer(model, entry, container)
    tie(model)


@torch.no_grad()
def install(
    model: PreTrainedModel,
    entry: SitePlan,
    factors: Factors,
    bias: Tensor | None,
    container: SharedFactors | None = None,
) -> None:
    """Factorise one site with known factors and, if given, a new bias; call ``finish`` after the last one."""
    old, new = _install_layer(model, entry, container)
    _set_factors(new, factors)
    if bias is not None and isinstance(new, FactorizedLinear):
        like = old.like if isinstance(old, FACTORIZED) else old.weight
        before = like if old.bias is None else old.bias
        new.bias = nn.Parameter(bias.to(like), requires_grad=before.requires_grad)


def install_together(model: PreTrainedModel, changes: list[tuple[SitePlan, Factors, Tensor | None]]) -> None:
    """Factorise several sites that share factors, ``(entry, factors, bias)`` each, as ``install`` does one."""
    container = _create_container(model, Plan({entry.site.path: entry for entry, _, _ in changes}))
    for change in changes:
        install(model, *change, container)


def finish(model: PreTrainedModel, recipe: str) -> None:
    """Tie what is tied and describe the model in its configuration, after sites were factorised one by one."""
    tie(model)
    container = getattr(base_model(model), CONTAINER, None)
    if container is not None:
        used = {key for _, layer in _factorized_layers(model) for key in layer.shared.values()}
        for key in [key for key, _ in container.named_parameters() if key not in used]:
            delattr(container, key)
        if not used:
            _drop_container(model)
    model.config.quantization_config = describe(model, recipe)


@torch.no_grad()
def set_matrix(module: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    """Give a dense layer another matrix ``(out, in)`` and bias."""
    if isinstance(module, FactorizedLinear):
        module.set_factors({"matrix": matrix})
    else:
        module.weight.copy_(matrix.T if isinstance(module, Conv1D) else matrix)
    if bias is not None:
        module.bias.copy_(bias)


def unpack_experts(model: PreTrainedModel) -> None:
    """Unpack fused experts, and describe the model so that it can be saved and read again whatever happens next."""
    if unpack(model):
        finish(model, "")


@torch.no_grad()
def untie(model: PreTrainedModel, plan: Plan) -> None:
    """Give the output head a matrix of its own if the plan says so."""
    if not plan.untie or not is_tied(model):
        return
    head, path = model.get_output_embeddings(), head_path(model)
    if isinstance(head, TiedHead):
        own = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
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


# one site --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _check_weights(model: PreTrainedModel, plan: Plan) -> None:
    for path, entry in plan.entries.items():
        check_matrix(entry.structure.kind, path)
        weight = weight_of(model.get_submodule(path))
        if weight.is_meta:
            raise ValueError(f"the weight of {path} is not in memory (meta device or offloaded); load it first")
        if wrong := int((~torch.isfinite(weight)).sum()):
            raise ValueError(f"the weight of {path} holds {wrong} values that are NaN or Inf; mend them first")


def _install_layer(
    model: PreTrainedModel, entry: SitePlan, container: SharedFactors | None
) -> tuple[nn.Module, nn.Module]:
    """Replace the module of one site by an empty factorized one with its bias; return both."""
    path, old = entry.site.path, model.get_submodule(entry.site.path)
    like = old.like if isinstance(old, FACTORIZED) else old.weight
    given = {"shared": entry.shared, "frozen": entry.frozen, "device": like.device, "dtype": like.dtype}
    if isinstance(old, nn.Embedding | FactorizedEmbedding):
        scale = getattr(old, "scalar_embed_scale", getattr(old, "multiplier", 1.0))
        new = FactorizedEmbedding(entry.structure, old.padding_idx, scale, **given)
    else:
        new = layer_of(entry.structure)(entry.structure, entry.bias, **given)
        if entry.bias and old.bias is not None and len(old.bias) == len(new.bias):  # not where the layer gets narrower
            new.bias = old.bias  # the parameter itself: BERT's head shares it
        elif not entry.bias:
            forget_tie(model, f"{path}.bias")
    if container is not None and entry.shared:
        new.attach(container)
    new.freeze()
    model.set_submodule(path, new.train(old.training))
    return old, new


@torch.no_grad()
def _set_factors(layer: FactorizedLinear | FactorizedEmbedding, factors: Factors) -> None:
    """Set the factors of ``layer``, the shared ones too."""
    layer.set_factors(factors)
    for name, key in layer.shared.items():
        layer._container[0].get_parameter(key).copy_(factors[name])


# shared factors --------------------------------------------------------------------------------------------------------


def _group_by_shared_factors(plan: Plan) -> list[list[SitePlan]]:
    """Return the groups of entries that are fitted together; an entry that shares nothing is a group."""
    groups: dict[object, list[SitePlan]] = {}
    for path, entry in plan.entries.items():
        groups.setdefault(tuple(sorted(entry.shared.values())) or path, []).append(entry)
    return list(groups.values())


def _create_container(model: PreTrainedModel, plan: Plan) -> SharedFactors | None:
    """Replace the container of shared factors by one with those of ``plan``, and those that other layers go on using."""
    others = [layer for path, layer in _factorized_layers(model) if layer.shared and path not in plan.entries]
    kept = {key: layer._container[0].get_parameter(key) for layer in others for key in layer.shared.values()}
    masks = {key: layer.mask for layer in others for key in layer.shared.values() if layer.mask}
    new = {}
    for entry in plan.entries.values():
        new |= {key: entry.structure.factor_shapes()[name] for name, key in entry.shared.items()}
        masks |= {key: entry.mask for key in entry.shared.values() if entry.mask}
    if clash := sorted(kept.keys() & new.keys()):
        raise ValueError(f"layers outside of the plan share {clash} already; factorise all that share a factor at once")
    _drop_container(model)
    if not kept and not new:
        return None
    container = SharedFactors(new, masks, model.device, dtype_of(model))
    for key, parameter in kept.items():
        container.register_parameter(key, parameter)
    for layer in others:
        layer.attach(container)
    setattr(base_model(model), CONTAINER, container)
    return container


def _drop_container(model: PreTrainedModel) -> None:
    if hasattr(base_model(model), CONTAINER):
        delattr(base_model(model), CONTAINER)


def _factorized_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, FACTORIZED)]


# factors ---------------------------------------------------------------------------------------------------------------


def _fit_groups(model: PreTrainedModel, groups: list[list[SitePlan]], progress) -> Iterator[Fit]:
    """Fit every group; each process fits a part of some groups, then all gather the results."""
    size = 1 if num_processes() == 1 else GROUPS_PER_PROCESS * num_processes()
    for first in progress(range(0, len(groups), size)):
        some = groups[first : first + size]
        own = {k: _fit_group(model, some[k]) for k in shard_items(list(range(len(some))))}
        for number, results in gather_results(own).items():
            yield from ((entry, *result) for entry, result in zip(some[number], results, strict=True))


@torch.no_grad()
def _fit_group(model: PreTrainedModel, group: list[SitePlan]) -> list[tuple[Factors, float]]:
    """Return the factors of one entry, or of several that share some, and their errors, in float32 or better."""
    first, names = group[0], tuple(group[0].shared)
    structure, start = first.fitted_structure, first.start
    if first.adapter:
        names = tuple(name.removeprefix("part_0_") for name in names)
    weights = [weight_of(model.get_submodule(entry.site.path)) for entry in group]
    weights = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    try:
        if len(group) == 1:
            sets = [initialize(structure, weights[0], start.fit, start.norm, start.options)]
        else:
            joint = structure.fit(weights, shared=names, **QUICK | check_fit_options(start.options))
            sets = [{n: v if n in names else v[k] for n, v in joint.items()} for k in range(len(group))]
    except ValueError as reason:
        raise ValueError(f"{', '.join(entry.site.path for entry in group)}: {reason}") from None
    return [
        (add_adapter(entry.structure, factors) if entry.adapter else factors, _error(structure, factors, weight))
        for entry, factors, weight in zip(group, sets, weights, strict=True)
    ]


def _error(structure: Structure, factors: Factors, weight: Tensor) -> float:
    near = structure.dense({name: value.to(weight.device) for name, value in factors.items()}).to(weight.dtype)
    return float(near.sub_(weight).norm() / weight.norm().clamp_min(1e-30))


def _draw_groups(model: PreTrainedModel, groups: list[list[SitePlan]], progress) -> Iterator[Fit]:
    for group in progress(groups):
        drawn = [_draw(model, entry) for entry in group]
        for entry, factors in zip(group, drawn, strict=True):
            yield entry, factors | {name: drawn[0][name] for name in entry.shared}, None


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
        factors = scale_branch_end(structure, factors, branch, config.num_hidden_layers)
    return add_adapter(entry.structure, factors) if entry.adapter else factors


# dense again -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Make every factorised layer dense again, in place, so that ``model`` is saved as a checkpoint that needs no tenfold."""
    for path, layer in _factorized_layers(model):
        if not isinstance(layer.structure, Structure):
            raise ValueError(
                f"{path} can't be densified: {layer.structure.kind} has a non-linearity between its factors"
            )
    tied = is_tied(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with torch.device("meta"):
        twin = type(model)(model.config)
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(path, pack(module, twin.get_submodule(path)))
    for path, module in _factorized_layers(model):
        model.set_submodule(path, _dense_module(twin.get_submodule(path), module).train(module.training))
    for path, module in list(model.named_modules()):
        if isinstance(module, TiedHead | TiedEmbedding):
            plain = twin.get_submodule(path)
            plain.weight = model.get_input_embeddings().weight
            if getattr(module, "bias", None) is not None:
                plain.bias = module.bias
            model.set_submodule(path, plain.train(module.training))
    _drop_container(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__.pop("_tied_weights_keys", None)  # back to those of the class
    model.all_tied_weights_keys = twin.all_tied_weights_keys
    if not tied and (head := head_path(model)):
        forget_tie(model, f"{head}.weight")
    return model


def _dense_module(like: nn.Module, module: FactorizedLinear | FactorizedEmbedding) -> nn.Module:
    """Return the layer that the architecture has at this place, with ``W``, padded by zeros where ``W`` is narrower."""
    weight = _pad(module.dense().to(module.dtype), shape_of(like))
    if isinstance(module, FactorizedEmbedding):
        scale = (module.multiplier,) if hasattr(like, "scalar_embed_scale") else ()
        new = type(like)(*module.structure.shape, module.padding_idx, *scale)
    elif isinstance(like, Conv1D):
        new = Conv1D(*weight.shape)
    else:
        new = nn.Linear(*weight.shape[::-1], getattr(like, "bias", None) is not None)
    new = new.to(device=weight.device, dtype=weight.dtype)
    set_matrix(new, weight, None)
    if getattr(module, "bias", None) is not None:
        narrow = len(module.bias) < len(new.bias)  # else the parameter itself: BERT's head shares it
        new.bias = nn.Parameter(_pad(module.bias[None], (1, len(new.bias)))[0]) if narrow else module.bias
    elif getattr(new, "bias", None) is not None:
        new.bias.zero_()  # the recipe dropped it
    return new


def _pad(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    return nn.functional.pad(matrix, (0, shape[1] - matrix.shape[1], 0, shape[0] - matrix.shape[0]))
