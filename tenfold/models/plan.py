"""Plans: what a recipe makes of one model, site by site, without allocating or changing anything."""

from __future__ import annotations

from dataclasses import dataclass, field

from tenfold.models.recipe import Recipe, Rule, Share, Start
from tenfold.models.sites import Site, count_parameters, find_sites, is_tied
from tenfold.structure import LowRank, Stacked, Structure, Sum
from tenfold.structure.base import FactorSpec, check_matrix, has_matrix


@dataclass(frozen=True)
class SitePlan:
    """Plan of one site.

    Args:
        shared: ``{factor name: key in SharedFactors}``.
        frozen: names of factors that are not trained.
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

    @property
    def fitted_structure(self) -> Structure:
        """Return the part of ``structure`` that is fitted to the weight; an adapter beside it starts at zero."""
        return self.structure.parts[0] if self.adapter and isinstance(self.structure, Sum) else self.structure


@dataclass(frozen=True)
class Plan:
    """Plans ``{path: entry}`` of the sites of one model, and what happens to its head."""

    entries: dict[str, SitePlan]
    untie: bool = False
    recipe: str = ""


def check_rules(recipe: Recipe) -> None:
    """Raise ValueError for a rule with a kind of layer that no trained matrix can become."""
    for rule in (rule for stage in recipe.stage_recipes() for rule in stage.replace):
        for spec in rule.structures:
            check_matrix(spec["kind"], f"the rule for role {rule.role or rule.path}")


def make_plan(model, recipe: Recipe) -> Plan:
    """Plan what ``recipe`` makes of ``model``.

    Raises:
        ValueError: a rule matches nothing, a structure doesn't fit a site, or a tied head is to be factorised.
    """
    if pruned := [rule.prune for rule in recipe.replace if rule.prune]:
        raise ValueError(
            f"recipe {recipe.name} prunes {' and '.join(pruned)}: activations decide which units stay, so give a "
            "calibration text (--calibrate FILE)"
        )
    sites = find_sites(model)
    if is_tied(model) and not recipe.untie:
        sites = [site for site in sites if site.role != "head"]
    rules, matched = recipe.replace, list[tuple[Site, int]]()
    for site in sites:
        number = next((k for k, rule in enumerate(rules) if rule.matches(site)), None)
        if number is not None:
            matched.append((site, number))
    for rule in rules:
        if not any(rule.matches(site) for site in sites):
            raise ValueError(_describe_no_match(rule, model, sites))
    keep = _solve_keep(recipe, model, [(rules[number], site) for site, number in matched])
    entries = {site.path: _plan_site(rules[number], number, site, keep) for site, number in matched}
    _check_shared_shapes(entries)
    for k in sorted({number for _, number in matched}):
        _check_sharing_partners(rules[k], k, [site for site, number in matched if number == k])
    return Plan(entries, recipe.untie, recipe.name)


def _describe_no_match(rule: Rule, model, sites: list[Site]) -> str:
    if is_tied(model) and any(site.role == "head" and rule.matches(site) for site in find_sites(model)):
        return "the head of this model is tied to its embedding: factorise role embed, or set untie: true for a matrix of its own"
    sought = f"role {rule.role}, path {rule.path}, layers {rule.layers}"
    present = ", ".join(sorted({site.role for site in sites}))
    return f"no matrix of this {model.config.model_type} matches {sought}; roles here: {present}"


def _solve_keep(recipe: Recipe, model, matched: list[tuple[Rule, Site]]) -> float | None:
    """Return the ratio of parameters that a budget leaves at every site, the same for all."""
    if recipe.budget is None:
        return None
    if recipe.budget.of == "sites":
        return recipe.budget.keep
    total = count_parameters(model, recipe.budget.of)
    drop, open_size = (1 - recipe.budget.keep) * total, 0
    for rule, site in matched:
        size = site.shape[0] * site.shape[1]
        if rule.keep is None and _is_open(rule):
            open_size += size
        else:
            drop -= size - _build_by_rule(rule, site, rule.keep).numel
    if not 0 < drop < open_size:
        raise ValueError(
            f"keep {recipe.budget.keep} of the {recipe.budget.of}'s {total:,} parameters asks to drop {round(drop):,} at the "
            f"sites of rules without a rank or keep of their own, which hold {open_size:,}; change keep or factorise more sites"
        )
    return 1 - drop / open_size


def _plan_site(rule: Rule, number: int, site: Site, keep: float | None) -> SitePlan:
    structure = _build_by_rule(rule, site, keep if rule.keep is None else rule.keep)
    prefix, share, names = "part_0_" if rule.adapter_rank else "", rule.share, structure.factor_shapes()
    for name in [prefix + name for name in (*(share.factors if share else ()), *rule.freeze)]:
        if name not in names:
            raise ValueError(f"{site.path}: there is no factor {name!r} to share or freeze; it has {', '.join(names)}")
    return SitePlan(
        site,
        structure,
        site.bias and rule.bias == "keep",
        rule.start,
        {prefix + name: _shared_key(share, number, site, name) for name in share.factors} if share else {},
        tuple(prefix + name for name in rule.freeze),
        rule.adapter_rank is not None,
        share.grad_dropout if share else 0.0,
    )


# structures ------------------------------------------------------------------------------------------------------------


def build_structure(site: Site, spec: dict) -> Structure:
    """Build the structure of a whole site from a ``spec`` that leaves nothing open; every complaint names the site."""
    return _build_by_rule(Rule.model_validate({"path": site.path, "structure": spec}), site, None)


def _is_open(rule: Rule) -> bool:
    """Tell whether a ratio to keep determines the rank of the rule's structure."""
    return FactorSpec.family(rule.spec["kind"]).is_open(rule.spec)


def _build_by_rule(rule: Rule, site: Site, keep: float | None) -> Structure:
    where = f"{site.path} ({site.shape[0]}x{site.shape[1]})"
    try:
        return _build(rule, site, keep)
    except ValueError as reason:
        raise ValueError(f"{where}: {reason}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError):
        raise ValueError(
            f"{where}: {rule.spec} is no structure; sizes and ranks are whole numbers or lists of them, a base or "
            "part is a mapping with its own kind"
        ) from None


def _build(rule: Rule, site: Site, keep: float | None) -> Structure:
    (out, inner), spec = site.shape, rule.spec
    if not has_matrix(spec["kind"]):
        given = {"split": rule.split > 1, "adapter": rule.adapter_rank is not None, "keep": rule.keep}
        if wrong := [name for name, value in given.items() if value]:
            raise ValueError(f"{spec['kind']} is no structure and takes no {', '.join(wrong)}; give it a rank")
        if site.role == "embed":
            raise ValueError(f"{spec['kind']} takes the place of linear layers; choose a structure for the embedding")
        return FactorSpec.family(spec["kind"]).for_shape(out, inner, spec)
    if rule.split > 1 and site.interleaved:
        raise ValueError(f"its parts alternate head by head, so split: {rule.split} can't part them; leave split out")
    if out % rule.split:
        raise ValueError(f"{out} rows can't be split into {rule.split} equal parts")
    rows = out // rule.split
    if keep is not None and _is_open(rule):
        part = Structure.within(rows, inner, spec, keep * rows * inner)
    else:
        part = Structure.for_shape(rows, inner, spec)
    whole = part if rule.split == 1 else Stacked(parts=(part,) * rule.split)
    if rule.adapter_rank is None:
        return whole
    return Sum(parts=(whole, LowRank(out_features=out, in_features=inner, rank=rule.adapter_rank)))


# shared factors --------------------------------------------------------------------------------------------------------


def _shared_key(share: Share, number: int, site: Site, name: str) -> str:
    """Return the key of a shared factor, which contains the number of the rule: sites of two rules never share."""
    layer = site.layer or 0
    if share.across == "roles":
        own = "" if site.expert is None else f"_expert_{site.expert}"
        return f"rule_{number}_layer_{layer}{own}_{name}"
    if share.across == "experts":
        return f"rule_{number}_{parameter_name(site.role if site.expert is not None else site.path)}_{layer}_{name}"
    group = layer // share.group if share.group else 0
    return f"rule_{number}_{'all' if share.across == 'all' else parameter_name(site.role)}_{name}_{group}"


def parameter_name(name: str) -> str:
    """Return ``name`` without dots and without ``mlp``: transformers renames ``_mlp_`` when it saves Mixtral."""
    return name.replace("mlp", "ff").replace(".", "_")


def _check_shared_shapes(entries: dict[str, SitePlan]) -> None:
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


def _check_sharing_partners(rule: Rule, number: int, sites: list[Site]) -> None:
    """Raise ValueError where no site has another one to share with; a model of one layer may, since it can be deepened."""
    if rule.share is None or rule.share.across == "layers":
        return
    if len({_shared_key(rule.share, number, site, "") for site in sites}) == len(sites):
        raise ValueError(
            f"the rule for role {rule.role or rule.path} shares across {rule.share.across}, but each of its matrices in this "
            "model would share with itself alone; name other roles, or share across layers"
        )
