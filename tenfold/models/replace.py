"""Surgery: put factorized layers where a plan says so, from weights or from noise, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.plan import Entry, Plan
from tenfold.models.sites import base_path, dtype_of, is_tied, weight_of
from tenfold.models.starts import factors_from
from tenfold.nn import FactorizedEmbedding, FactorizedLinear, SharedFactors, TiedEmbedding, TiedHead
from tenfold.structure import Factors, Structure

CONTAINER = "shared_factors"


@dataclass(frozen=True)
class Change:
    """What happened at one site: parameters before and after, and ``||W - What|| / ||W||`` (None from noise)."""

    path: str
    structure: Structure
    before: int
    after: int
    error: float | None


def replace(
    model: PreTrainedModel, plan: Plan, source: str = "weights", progress: Callable[[Iterable], Iterable] = iter
) -> list[Change]:
    """Fold the sites of ``plan`` in ``model``, in place.

    Args:
        source: ``weights`` fits the factors to the model's matrices as the plan says, ``noise`` draws them so that
            the entries of every matrix have the standard deviation of the configuration's initialiser.
        progress: wraps the list of groups of sites that is worked through.

    Raises:
        ValueError: a matrix holds NaN or Inf, or a start does not suit its structure; the site is named.
    """
    if source not in ("weights", "noise"):
        raise ValueError(f"source is {source!r}; it must be 'weights' or 'noise'")
    meta = dtype_of(model)
    prepare(model, plan)
    container = _container(model, plan, device=model.device, dtype=meta)
    changes: list[Change] = []
    for group in progress(_groups(plan)):
        fitted = _noise(model, group) if source == "noise" else _fitted(model, group)
        for entry, factors, error in fitted:
            changes.append(_install(model, entry, factors, error, container))
    tie(model)
    return changes


def prepare(model: PreTrainedModel, plan: Plan) -> None:
    """Give an output head that is to be untied a matrix of its own."""
    if not plan.untie or not is_tied(model):
        return
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def install_empty(model: PreTrainedModel, plan: Plan, device=None, dtype=None) -> None:
    """Put empty layers at the sites of ``plan``: for pricing on the meta device and before a checkpoint is read."""
    prepare(model, plan)
    container = _container(model, plan, device, dtype)
    for entry in plan.entries.values():
        _install(model, entry, None, None, container, device, dtype)
    tie(model)


def _groups(plan: Plan) -> list[list[Entry]]:
    """Entries that share factors are fitted together; every other one by itself."""
    groups: dict[object, list[Entry]] = {}
    for path, entry in plan.entries.items():
        groups.setdefault(tuple(sorted(entry.shared.values())) or path, []).append(entry)
    return list(groups.values())


def _container(model: PreTrainedModel, plan: Plan, device, dtype) -> SharedFactors | None:
    shapes = {
        key: entry.structure.factor_shapes()[name] for entry in plan.entries.values() for name, key in entry.shared.items()
    }
    if not shapes:
        return None
    base = model.get_submodule(base_path(model).rstrip("."))
    setattr(base, CONTAINER, SharedFactors(shapes, device, dtype))
    return getattr(base, CONTAINER)


def _weight(model: PreTrainedModel, entry: Entry) -> Tensor:
    return weight_of(model.get_submodule(entry.site.path)).detach()


@torch.no_grad()
def _fitted(model: PreTrainedModel, group: list[Entry]) -> list[tuple[Entry, Factors, float | None]]:
    """The factors of one entry, or of several that share some, fitted in float32 or better."""
    first, names = group[0], tuple(group[0].shared)
    weights = [_weight(model, entry).float() for entry in group]
    try:
        if len(group) == 1:
            sets = [factors_from(first.structure, weights[0], first.start.fit, first.start.norm, first.start.options)]
        else:
            joint = first.structure.fit(weights, shared=names, **{"sweeps": 50, "tolerance": 1e-6} | first.start.options)
            sets = [{n: v if n in names else v[k] for n, v in joint.items()} for k in range(len(group))]
    except ValueError as reason:
        raise ValueError(f"{', '.join(entry.site.path for entry in group)}: {reason}") from None
    return [
        (entry, factors, _error(entry.structure, factors, weight))
        for entry, factors, weight in zip(group, sets, weights, strict=True)
    ]


def _error(structure: Structure, factors: Factors, weight: Tensor) -> float:
    near = structure.dense({name: value.to(weight.device) for name, value in factors.items()}).to(weight.dtype)
    return float(near.sub_(weight).norm() / weight.norm().clamp_min(1e-30))


def _noise(model: PreTrainedModel, group: list[Entry]) -> list[tuple[Entry, Factors, float | None]]:
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    made = [(entry, entry.structure.init(std), None) for entry in group]
    for entry, factors, _ in made[1:]:
        factors.update({name: made[0][1][name] for name in entry.shared})
    return made


@torch.no_grad()
def _install(
    model: PreTrainedModel,
    entry: Entry,
    factors: Factors | None,
    error: float | None,
    container: SharedFactors | None,
    device=None,
    dtype=None,
) -> Change:
    """Swap the module of one site for a factorized one, its bias and scale taken along."""
    old = model.get_submodule(entry.site.path)
    like = next(old.parameters(), None)
    place = {"device": device or like.device, "dtype": dtype or like.dtype} if like is not None else {"device": device, "dtype": dtype}
    if entry.site.role == "embed":
        scale = float(getattr(old, "scalar_embed_scale", 1.0))
        new = FactorizedEmbedding(entry.structure, getattr(old, "padding_idx", None), scale, entry.shared, **place)
    else:
        new = FactorizedLinear(entry.structure, entry.bias, entry.shared, **place)
        if new.bias is not None and factors is not None:
            new.bias.copy_(old.bias)
    if container is not None:
        new.attach(container)
        for name, key in entry.shared.items() if factors is not None else ():
            container(key).copy_(factors[name])
    if factors is not None:
        new.set_factors(factors)
    for name in entry.frozen:
        new.factors()[name].requires_grad_(False)
    before = sum(p.numel() for p in old.parameters())
    model.set_submodule(entry.site.path, new.train(old.training))
    return Change(entry.site.path, entry.structure, before, sum(p.numel() for p in new.parameters()), error)


def tie(model: PreTrainedModel) -> None:
    """Let every other name of a folded embedding ask it: the tied head, and T5's two embeddings."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, FactorizedEmbedding):
        return
    path = next(name for name, module in model.named_modules() if module is embedding)
    head = model.get_output_embeddings()
    for target, source in list(model.all_tied_weights_keys.items()):
        owner = target.removesuffix(".weight")
        if source == f"{path}.weight" and owner != target:
            old = model.get_submodule(owner)
            new = TiedHead(embedding, getattr(old, "bias", None)) if old is head else TiedEmbedding(embedding)
            model.set_submodule(owner, new)
            del model.all_tied_weights_keys[target]
    if isinstance(model._tied_weights_keys, dict):
        kept = {k: v for k, v in model._tied_weights_keys.items() if v != f"{path}.weight"}
        model._tied_weights_keys = kept


@torch.no_grad()
def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Every folded layer as an ordinary one again, in place; the result is a plain checkpoint that needs no tenfold."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        twin = type(model)(config)
    for path, module in list(model.named_modules()):
        if isinstance(module, FactorizedLinear | FactorizedEmbedding):
            model.set_submodule(path, _plain(twin.get_submodule(path), module))
    for path, module in list(model.named_modules()):
        if isinstance(module, TiedHead):
            model.set_submodule(path, _untied(module, model.get_input_embeddings()))
        elif isinstance(module, TiedEmbedding):
            model.set_submodule(path, model.get_input_embeddings())
    base = model.get_submodule(base_path(model).rstrip("."))
    if hasattr(base, CONTAINER):
        delattr(base, CONTAINER)
    model._tied_weights_keys, model.all_tied_weights_keys = type(model)._tied_weights_keys, twin.all_tied_weights_keys
    return model


def _plain(like: nn.Module, module: FactorizedLinear | FactorizedEmbedding) -> nn.Module:
    """The layer that the architecture itself has at this place, holding ``W``."""
    weight = module.dense().to(module.dtype)
    if isinstance(module, FactorizedEmbedding):
        scale = (module.scale,) if hasattr(like, "scalar_embed_scale") else ()
        new = type(like)(*module.structure.shape, module.padding_idx, *scale)
    elif isinstance(like, Conv1D):
        new, weight = Conv1D(*module.structure.shape), weight.T.contiguous()
    else:
        new = nn.Linear(module.in_features, module.out_features, getattr(like, "bias", None) is not None)
    new = new.to(device=weight.device, dtype=weight.dtype)
    new.weight.copy_(weight)
    if getattr(new, "bias", None) is not None:  # a bias that the recipe dropped comes back as zeros
        new.bias.zero_() if module.bias is None else new.bias.copy_(module.bias)
    return new


def _untied(head: TiedHead, embedding: nn.Module) -> nn.Linear:
    new = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    new.weight, new.bias = embedding.weight, head.bias
    return new
