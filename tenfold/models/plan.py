"""Plans: what a recipe becomes on one model, site by site; nothing is allocated and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tenfold.models.recipe import Recipe, Rule, Share, Start
from tenfold.models.sites import Site, find_sites, is_tied, share_of
from tenfold.nn.registry import LAYERS, check_matrix, family
from tenfold.structure import LowRank, Stacked, Structure, Sum


@dataclass(frozen=True)
class SitePlan:
    """What one site becomes.

    Args:
        shared: ``{factor name: key in SharedFactors}``.
        frozen: names of factors that stay as they are in training.
        mask: the probability with which the gradient of its shared factors is dropped.
        adapter: whether the last part of ``structure``, a sum, is an adapter.
    """

    site: Site
    structure: Structure
    bias: bool
    start: Start = field(default_factory=Start)
    shared: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    adapter: bool = False
    mask: float = 0.0


@dataclass(frozen=True)
class Plan:
    """``{path: entry}`` for one model, and what happens to its head."""

    entries: dict[str, SitePlan]
    untie: bool = False
    recipe: str = ""


def check_rules(recipe: Recipe) -> None:
    """Raise ValueError for a rule whose layers no trained matrix can be folded into."""
    for rule in (rule for step in recipe.steps() for rule in step.replace):
        for spec in rule.structures:
            check_matrix(spec["kind"], f"the rule for role {rule.role or rule.path}")


def make_plan(model, recipe: Recipe) -> Plan:
    """What ``recipe`` becomes on ``model``; nothing is allocated and nothing is changed.

    Raises:
        ValueError: a rule matches nothing, a structure doesn't fit a site, or a tied head is to be folded.
    """
    if narrowing := [rule.narrow for rule in recipe.replace if rule.narrow]:
        raise ValueError(
            f"recipe {recipe.name} narrows {' and '.join(narrowing)}: which units stay is seen from activations, so give a "
            "calibration text (--calibrate FILE)"
        )
    sites = find_sites(model)
    if is_tied(model) and not recipe.untie:
        sites = [site for site in sites if site.role != "head"]
    chosen: dict[int, list[Site]] = {}
    for site in sites:
        number = next((k for k, rule in enumerate(recipe.replace) if rule.matches(site)), None)
        if number is not None:
            chosen.setdefault(number, []).append(site)
    for rule in recipe.replace:
        if not any(rule.matches(site) for site in sites):
            raise ValueError(_nothing_matched(rule, model, sites))
    keep = _keep(recipe, model, [(recipe.replace[k], site) for k, found in chosen.items() for site in found])
    entries = {
        site.path: _entry(recipe.replace[number], number, site, keep)
        for number, found in chosen.items()
        for site in found
    }
    _check_shared(entries)
    for number, found in chosen.items():
        _check_company(recipe.replace[number], number, found)
    return Plan({site.path: entries[site.path] for site in sites if site.path in entries}, recipe.untie, recipe.name)


def _nothing_matched(rule: Rule, model, sites: list[Site]) -> str:
    present = ", ".join(sorted({site.role for site in sites}))
    if is_tied(model) and any(site.role == "head" and rule.matches(site) for site in find_sites(model)):
        return "the head of this model is tied to its embedding: fold role embed, or set untie: true to give it its own matrix"
    sought = f"role {rule.role}, path {rule.path}, layers {rule.layers}"
    return f"no matrix of this {model.config.model_type} matches {sought}; roles here: {present}"


def _keep(recipe: Recipe, model, matched: list[tuple[Rule, Site]]) -> float | None:
    """The share of each site's parameters that a budget leaves: the same for all."""
    if recipe.budget is None:
        return None
    if recipe.budget.of == "sites":
        return recipe.budget.keep
    total = share_of(model, recipe.budget.of)
    drop, open_sites = (1 - recipe.budget.keep) * total, 0
    for rule, site in matched:
        size = site.shape[0] * site.shape[1]
        if rule.keep is None and _budgeted(rule):
            open_sites += size
        else:
            drop -= size - _fitting(rule, site, rule.keep).numel
    if not 0 < drop < open_sites:
        raise ValueError(
            f"keep {recipe.budget.keep} of the {recipe.budget.of}'s {total:,} parameters asks to drop {round(drop):,} at the "
            f"sites of rules without a rank or keep of their own, which hold {open_sites:,}; change keep or fold more sites"
        )
    return 1 - drop / open_sites


def _budgeted(rule: Rule) -> bool:
    """Whether a share to keep sets the rank of the rule's structures."""
    return family(rule.spec["kind"]).is_open(rule.spec)


def fitting(site: Site, spec: dict) -> Structure:
    """The structure of a whole site that ``spec`` says, nothing left open; every complaint names the site."""
    return _named(site, spec, lambda: family(spec.get("kind")).for_shape(*site.shape, spec))


def _fitting(rule: Rule, site: Site, keep: float | None) -> Structure:
    return _named(site, rule.spec, lambda: _structure(rule, site, keep))


def _named(site: Site, spec: dict, make: Callable[[], Structure]) -> Structure:
    where = f"{site.path} ({site.shape[0]}x{site.shape[1]})"
    try:
        return make()
    except ValueError as reason:
        raise ValueError(f"{where}: {reason}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError):
        raise ValueError(
            f"{where}: {spec} is no structure; sizes and ranks are whole numbers or lists of them, a base or "
            "part is a mapping with its own kind"
        ) from None


def _entry(rule: Rule, number: int, site: Site, keep: float | None) -> SitePlan:
    structure = _fitting(rule, site, keep if rule.keep is None else rule.keep)
    prefix = "part_0_" if rule.adapter else ""
    names = structure.factor_shapes()
    wanted = [prefix + name for name in (rule.share.factors if rule.share else [])] + [prefix + n for n in rule.freeze]
    for name in wanted:
        if name not in names:
            raise ValueError(f"{site.path}: there is no factor {name!r} to share or freeze; it has {', '.join(names)}")
    shared = {prefix + name: _key(rule.share, number, site, name) for name in rule.share.factors} if rule.share else {}
    bias = site.bias and rule.bias == "keep"
    frozen = tuple(prefix + name for name in rule.freeze)
    return SitePlan(site, structure, bias, rule.start, shared, frozen, rule.adapter is not None, _mask(rule))


def _mask(rule: Rule) -> float:
    return rule.share.mask if rule.share else 0.0


def _key(share: Share, number: int, site: Site, name: str) -> str:
    """Sites of one rule share, never those of two rules: the number of the rule is part of the key."""
    layer = site.layer or 0
    if share.across == "roles":
        own = "" if site.expert is None else f"_expert_{site.expert}"
        return f"rule_{number}_layer_{layer}{own}_{name}"
    if share.across == "experts":
        return f"rule_{number}_{plain(site.role if site.expert is not None else site.path)}_{layer}_{name}"
    group = layer // share.group if share.group else 0
    return f"rule_{number}_{'all' if share.across == 'all' else plain(site.role)}_{name}_{group}"


def plain(name: str) -> str:
    """``name`` for a parameter; transformers renames ``_mlp_`` when it saves Mixtral, taking the dots of its pattern for any."""
    return name.replace("mlp", "ff").replace(".", "_")


def _check_shared(entries: dict[str, SitePlan]) -> None:
    """Raise ValueError where sites would share a factor that has two shapes."""
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, entry in entries.items():
        for name, key in entry.shared.items():
            shape = entry.structure.factor_shapes()[name]
            other, seen = first.setdefault(key, (path, shape))
            if seen != shape:
                raise ValueError(
                    f"{path} and {other} can't share factor {name!r}, it has shapes {shape} and {seen}; "
                    "share another factor, or give them rules of their own"
                )


def _check_company(rule: Rule, number: int, sites: list[Site]) -> None:
    """Raise ValueError where every site would share with itself alone; a model of one layer may, it can be deepened."""
    if rule.share is None or rule.share.across == "layers":
        return
    if len({_key(rule.share, number, site, "") for site in sites}) == len(sites):
        raise ValueError(
            f"the rule for role {rule.role or rule.path} shares across {rule.share.across}, but each of its matrices in this "
            "model would share with itself alone; name other roles, or share across layers"
        )


def _layer(rule: Rule, site: Site):
    """What describes a layer that no matrix stands for."""
    kind, said = rule.spec["kind"], {"split": rule.split > 1, "adapter": rule.adapter is not None, "keep": rule.keep}
    if wrong := [name for name, value in said.items() if value]:
        raise ValueError(f"{kind} is no structure and takes no {', '.join(wrong)}; give it a rank")
    if site.role == "embed":
        raise ValueError(f"{kind} takes the place of linear layers; choose a structure for the embedding")
    return family(kind).for_shape(*site.shape, rule.spec)


def _structure(rule: Rule, site: Site, keep: float | None) -> Structure:
    (out, inner), spec = site.shape, rule.spec
    if spec["kind"] in LAYERS:
        return _layer(rule, site)
    if rule.split > 1 and site.interleaved:
        raise ValueError(f"its parts alternate head by head, so split: {rule.split} can't part them; leave split out")
    if out % rule.split:
        raise ValueError(f"{out} rows can't be split into {rule.split} equal parts")
    rows = out // rule.split
    if keep is not None and _budgeted(rule):
        part = Structure.within(rows, inner, spec, keep * rows * inner)
    else:
        part = Structure.for_shape(rows, inner, spec)
    whole = part if rule.split == 1 else Stacked(parts=(part,) * rule.split)
    if rule.adapter is None:
        return whole
    return Sum(parts=(whole, LowRank(out_features=out, in_features=inner, rank=rule.adapter)))
