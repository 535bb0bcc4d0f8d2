"""Surgery: put factorized layers where a plan says so, from weights or from noise, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.checkpoint_format import describe
from tenfold.models.distributed import mine, processes, together
from tenfold.models.experts import pack, unpack
from tenfold.models.initializers import QUICK, STARTS, beside_adapter, factors_from, of_fits
from tenfold.models.plan import Plan, SitePlan
from tenfold.models.random_init import DRAWS, check_options, ended
from tenfold.models.sites import FOLDED, base_model, dtype_of, forget_tie, head_path, is_tied, shape_of, weight_of
from tenfold.models.suggestions import check_name
from tenfold.nn import Experts, FactorizedEmbedding, FactorizedLinear, SharedFactors, TiedEmbedding, TiedHead
from tenfold.nn.registry import check_matrix, layer_of
from tenfold.structure import Factors, Structure

CONTAINER = "shared_factors"
EACH = 8  # groups of sites that a process fits before it hears from the others
Made = tuple[SitePlan, Factors, float | None]


@dataclass(frozen=True)
class SiteReport:
    """What happened at one site: parameters before and after, and ``||W - What|| / ||W||`` (None from noise).

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
    """Fold the sites of ``plan`` in ``model``, in place, and note it in the model's configuration.

    Fits run in float32 or better, factors get the type of the weight they replace. A site that is folded already is
    folded anew, from the matrix that it holds.

    Args:
        source: ``weights`` fits the factors to the model's matrices as the plan says, ``noise`` draws them as
            the start says (:mod:`tenfold.models.random_init`), with the standard deviation of the matrix that is there, or of the
            configuration's initialiser where there is none.
        progress: wraps the list of groups of sites that is worked through.

    Raises:
        ValueError: a matrix holds NaN or Inf or is not in memory, or a start does not suit its structure; the site is
            named.
    """
    if source not in ("weights", "noise"):
        raise ValueError(f"source is {source!r}; it must be 'weights' or 'noise'")
    take_apart(model)
    if source == "weights":
        _check_weights(model, plan)
    untie(model, plan)
    container, changes = _container(model, plan), []
    for entry, factors, error in (_noise if source == "noise" else _fitted)(model, _groups(plan), progress):
        old, new = _install(model, entry, container)
        _fill(new, factors)
        changes.append(SiteReport(entry.site.path, entry.structure, _size(old), _size(new), error))
    finish(model, plan.recipe)
    return changes


def install_empty(model: PreTrainedModel, plan: Plan) -> None:
    """Put empty layers at the sites of ``plan``: for pricing on the meta device and before a checkpoint is read."""
    unpack(model)
    untie(model, plan)
    container = _container(model, plan)
    for entry in plan.entries.values():
        _install(model, entry, container)
    tie(model)


@torch.no_grad()
def _check_weights(model: PreTrainedModel, plan: Plan) -> None:
    for path, entry in plan.entries.items():
        check_matrix(entry.structure.kind, path)
        weight = weight_of(model.get_submodule(path))
        if weight.is_meta:
            raise ValueError(f"the weight of {path} is not in memory (meta device or offloaded); load it first")
        if wrong := int((~torch.isfinite(weight)).sum()):
            raise ValueError(f"the weight of {path} holds {wrong} values that are NaN or Inf; mend them first")


@torch.no_grad()
def untie(model: PreTrainedModel, plan: Plan) -> None:
    """Give the output head a matrix of its own if the plan says so."""
    if not plan.untie or not is_tied(model):
        return
    head, path = model.get_output_embeddings(), head_path(model)
    if isinstance(head, TiedHead):
        model.set_submodule(path, _own_head(head))
    else:
        head.weight = nn.Parameter(head.weight.detach().clone())
    forget_tie(model, f"{path}.weight")
    if not model.all_tied_weights_keys:  # BERT's bias and T5's other embeddings stay tied, and with them the setting
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _own_head(head: TiedHead) -> nn.Linear:
    new = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    new.weight, new.bias = nn.Parameter(head.dense()), head.bias
    return new


def _groups(plan: Plan) -> list[list[SitePlan]]:
    """Entries that share factors are fitted together; every other one by itself."""
    groups: dict[object, list[SitePlan]] = {}
    for path, entry in plan.entries.items():
        groups.setdefault(tuple(sorted(entry.shared.values())) or path, []).append(entry)
    return list(groups.values())


def _container(model: PreTrainedModel, plan: Plan) -> SharedFactors | None:
    """A new container: the shared factors of ``plan``, and those that layers outside of it go on using."""
    staying = [layer for path, layer in _folded(model) if layer.shared and path not in plan.entries]
    kept = {key: layer._container[0].get_parameter(key) for layer in staying for key in layer.shared.values()}
    masks = {key: layer.mask for layer in staying for key in layer.shared.values() if layer.mask}
    new = {}
    for entry in plan.entries.values():
        new |= {key: entry.structure.factor_shapes()[name] for name, key in entry.shared.items()}
        masks |= {key: entry.mask for key in entry.shared.values() if entry.mask}
    if clash := sorted(kept.keys() & new.keys()):
        raise ValueError(f"layers outside of the plan share {clash} already; fold all that share a factor at once")
    _drop_container(model)
    if not kept and not new:
        return None
    container = SharedFactors(new, masks, model.device, dtype_of(model))
    for key, parameter in kept.items():
        container.register_parameter(key, parameter)
    for layer in staying:
        layer.attach(container)
    setattr(base_model(model), CONTAINER, container)
    return container


def _drop_container(model: PreTrainedModel) -> None:
    if hasattr(base_model(model), CONTAINER):
        delattr(base_model(model), CONTAINER)


def _folded(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, FOLDED)]


def _fitted(model: PreTrainedModel, groups: list[list[SitePlan]], progress) -> Iterator[Made]:
    """Every group's factors; each of several processes fits its share of some groups, then all know all of them."""
    apart = 1 if processes() == 1 else EACH * processes()
    for first in progress(range(0, len(groups), apart)):
        some = groups[first : first + apart]
        for number, found in together({k: _fit(model, some[k]) for k in mine(list(range(len(some))))}).items():
            yield from ((entry, *made) for entry, made in zip(some[number], found, strict=True))


@torch.no_grad()
def _fit(model: PreTrainedModel, group: list[SitePlan]) -> list[tuple[Factors, float]]:
    """The factors of one entry, or of several that share some, and their errors, in float32 or better."""
    first, structure, names = group[0], fitted_part(group[0]), tuple(group[0].shared)
    if first.adapter:
        names = tuple(name.removeprefix("part_0_") for name in names)
    weights = [weight_of(model.get_submodule(entry.site.path)) for entry in group]
    weights = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    try:
        if len(group) == 1:
            sets = [factors_from(structure, weights[0], first.start.fit, first.start.norm, first.start.options)]
        else:
            joint = structure.fit(weights, shared=names, **QUICK | of_fits(first.start.options))
            sets = [{n: v if n in names else v[k] for n, v in joint.items()} for k in range(len(group))]
    except ValueError as reason:
        raise ValueError(f"{', '.join(entry.site.path for entry in group)}: {reason}") from None
    return [
        (_whole(entry, factors), _error(structure, factors, weight))
        for entry, factors, weight in zip(group, sets, weights, strict=True)
    ]


def fitted_part(entry: SitePlan) -> Structure:
    """What of an entry's structure holds the weight at first: an adapter beside it starts at zero."""
    return entry.structure.parts[0] if entry.adapter else entry.structure


def _whole(entry: SitePlan, factors: Factors) -> Factors:
    return beside_adapter(entry.structure, factors) if entry.adapter else factors


def _error(structure: Structure, factors: Factors, weight: Tensor) -> float:
    near = structure.dense({name: value.to(weight.device) for name, value in factors.items()}).to(weight.dtype)
    return float(near.sub_(weight).norm() / weight.norm().clamp_min(1e-30))


def _noise(model: PreTrainedModel, groups: list[list[SitePlan]], progress) -> Iterator[Made]:
    for group in progress(groups):
        drawn = [_whole(entry, _drawn(model, entry)) for entry in group]
        for entry, factors in zip(group, drawn, strict=True):
            yield entry, factors | {name: drawn[0][name] for name in entry.shared}, None


@torch.no_grad()
def _drawn(model: PreTrainedModel, entry: SitePlan) -> Factors:
    """Random factors as the start says; ``branch: scaled`` or ``zero`` is for what ends a branch beside the stream."""
    structure, options = fitted_part(entry), entry.start.options
    check_name(entry.start.fit, STARTS, "start")  # a fit's is drawn as noise
    check_options(options, {"branch": str}, f"the start {entry.start.fit} of a new model")
    weight, config = weight_of(model.get_submodule(entry.site.path)), model.config.get_text_config()
    usual, known = getattr(config, "initializer_range", 0.02), not weight.is_meta and bool(weight.any())
    branch = options.get("branch") if entry.site.role.endswith(".out") else None
    std = float(weight.float().std()) if known and branch is None else usual
    factors = DRAWS.get(entry.start.fit, DRAWS["noise"])(structure, std, options, None)
    return ended(structure, factors, branch, config.num_hidden_layers) if branch else factors


def _install(model: PreTrainedModel, entry: SitePlan, container: SharedFactors | None) -> tuple[nn.Module, nn.Module]:
    """Swap the module of one site for an empty factorized one that keeps its bias; returns both."""
    path, old = entry.site.path, model.get_submodule(entry.site.path)
    like = old.like if isinstance(old, FOLDED) else old.weight
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


def install(model: PreTrainedModel, entry: SitePlan, factors: Factors, bias: Tensor | None) -> None:
    """Fold one site with factors that are known already; :func:`finish` when all are done."""
    _put_in(model, entry, factors, bias, None)


def install_together(model: PreTrainedModel, changes: list[tuple[SitePlan, Factors, Tensor | None]]) -> None:
    """Likewise several sites, ``(entry, factors, bias)`` each, that share factors."""
    container = _container(model, Plan({entry.site.path: entry for entry, _, _ in changes}))
    for entry, factors, bias in changes:
        _put_in(model, entry, factors, bias, container)


@torch.no_grad()
def _put_in(model, entry: SitePlan, factors: Factors, bias: Tensor | None, container: SharedFactors | None) -> None:
    old, new = _install(model, entry, container)
    _fill(new, factors)
    if bias is not None and isinstance(new, FactorizedLinear):
        like = old.like if isinstance(old, FOLDED) else old.weight
        before = like if old.bias is None else old.bias
        new.bias = nn.Parameter(bias.to(like), requires_grad=before.requires_grad)


@torch.no_grad()
def set_matrix(module: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    """Give a dense layer another matrix ``(out, in)`` and bias."""
    if isinstance(module, FactorizedLinear):
        module.set_factors({"matrix": matrix})
    else:
        module.weight.copy_(matrix.T if isinstance(module, Conv1D) else matrix)
    if bias is not None:
        module.bias.copy_(bias)


def take_apart(model: PreTrainedModel) -> None:
    """Take fused experts apart; the model can be saved and read again from there on, whatever happens next."""
    if unpack(model):
        finish(model, "")


def finish(model: PreTrainedModel, recipe: str) -> None:
    """After sites were folded one by one: tie what is tied, and note it in the model's configuration."""
    tie(model)
    container = getattr(base_model(model), CONTAINER, None)
    if container is not None:
        used = {key for _, layer in _folded(model) for key in layer.shared.values()}
        for key in [key for key, _ in container.named_parameters() if key not in used]:
            delattr(container, key)
        if not used:
            _drop_container(model)
    model.config.quantization_config = describe(model, recipe)


@torch.no_grad()
def _fill(layer: FactorizedLinear | FactorizedEmbedding, factors: Factors) -> None:
    """Give ``layer`` its factors, the shared ones too."""
    layer.set_factors(factors)
    for name, key in layer.shared.items():
        layer._container[0].get_parameter(key).copy_(factors[name])


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tie(model: PreTrainedModel) -> None:
    """Let every other name of a folded embedding ask it: the tied head, and T5's two embeddings."""
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
        if isinstance(module, TiedHead | TiedEmbedding):  # of an embedding that was folded before
            module.attach(embedding)
    forget_tie(model, own)


@torch.no_grad()
def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Every folded layer as an ordinary one again, in place; the result is a plain checkpoint that needs no tenfold."""
    for path, layer in _folded(model):
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
    for path, module in _folded(model):
        model.set_submodule(path, _plain(twin.get_submodule(path), module).train(module.training))
    for path, module in list(model.named_modules()):
        if isinstance(module, TiedHead | TiedEmbedding):
            model.set_submodule(path, _plain_tied(twin.get_submodule(path), module, model.get_input_embeddings()))
    _drop_container(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__.pop("_tied_weights_keys", None)  # those of the class are in force again
    model.all_tied_weights_keys = twin.all_tied_weights_keys
    if not tied and (head := head_path(model)):
        forget_tie(model, f"{head}.weight")
    return model


def _plain(like: nn.Module, module: FactorizedLinear | FactorizedEmbedding) -> nn.Module:
    """The layer that the architecture itself has at this place, holding ``W``; where that is narrower, zeros around it."""
    weight = _padded(module.dense().to(module.dtype), shape_of(like))
    if isinstance(module, FactorizedEmbedding):
        scale = (module.multiplier,) if hasattr(like, "scalar_embed_scale") else ()
        new = type(like)(*module.structure.shape, module.padding_idx, *scale)
    elif isinstance(like, Conv1D):
        new, weight = Conv1D(*weight.shape), weight.T.contiguous()
    else:
        new = nn.Linear(*weight.shape[::-1], getattr(like, "bias", None) is not None)
    new = new.to(device=weight.device, dtype=weight.dtype)
    new.weight.copy_(weight)
    if getattr(module, "bias", None) is not None:
        narrow = len(module.bias) < len(new.bias)  # else the parameter itself: BERT's head shares it
        new.bias = nn.Parameter(_padded(module.bias[None], (1, len(new.bias)))[0]) if narrow else module.bias
    elif getattr(new, "bias", None) is not None:
        new.bias.zero_()  # the recipe has dropped it
    return new


def _padded(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    return nn.functional.pad(matrix, (0, shape[1] - matrix.shape[1], 0, shape[0] - matrix.shape[0]))


def _plain_tied(like: nn.Module, module: TiedHead | TiedEmbedding, embedding: nn.Module) -> nn.Module:
    """``like``, which is on the meta device, with the weight of the embedding and the bias of the head."""
    like.weight = embedding.weight
    if getattr(module, "bias", None) is not None:
        like.bias = module.bias
    return like.train(module.training)
