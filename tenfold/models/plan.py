"""Recipes and plans: a recipe is what a person writes and shares, a plan is what it becomes on one model.

The schema is strict: an unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tenfold.models.roles import ROLES
from tenfold.models.sites import Site, find_sites, is_tied
from tenfold.structure import LowRank, Stacked, Structure, Sum


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Start(_Strict):
    """Where the factors come from.

    ``fit`` names a start of :mod:`tenfold.models.starts`; ``norm`` says what is done about the norm that a fit loses.
    """

    fit: str = "nearest"
    norm: Literal["keep", "restore"] = "keep"
    options: dict[str, Any] = Field(default_factory=dict)


class Share(_Strict):
    """Factors that several sites of a rule use in common.

    Args:
        factors: their names.
        across: ``layers`` (one set per role) or ``roles`` (one set per layer).
        group: how many neighbouring layers share; all of them without it.
    """

    factors: list[str]
    across: Literal["layers", "roles"] = "layers"
    group: int | None = Field(None, ge=1)


class Rule(_Strict):
    """Which sites get which structure; of several rules the first that matches a site wins."""

    role: str | list[str] | None = None
    path: str | None = None
    layers: list[int] | None = None
    structure: dict[str, Any] | None = None
    keep: float | None = None
    split: int = Field(1, ge=1)
    start: Start = Field(default_factory=Start)
    share: Share | None = None
    adapter: int | None = Field(None, ge=1)
    bias: Literal["keep", "drop"] = "keep"
    freeze: list[str] = Field(default_factory=list)

    @field_validator("keep")
    @classmethod
    def _share(cls, value):
        return checked_keep(value)

    @field_validator("start", mode="before")
    @classmethod
    def _named(cls, value):
        return {"fit": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _complete(self):
        for role in self.roles:
            if role not in ROLES:
                near = get_close_matches(role, ROLES, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"roles are {', '.join(ROLES)}"
                raise ValueError(f"there is no role {role!r}; {hint}")
        if self.role is None and self.path is None:
            raise ValueError("a rule needs a role or a path")
        if self.structure is None or "kind" not in self.structure:
            raise ValueError("a rule needs a structure with its kind, for instance {kind: low_rank, rank: 64}")
        return self

    @property
    def roles(self) -> list[str]:
        return [] if self.role is None else [self.role] if isinstance(self.role, str) else self.role

    def matches(self, site: Site) -> bool:
        named = site.role in self.roles or (self.path is not None and fnmatch(site.path, f"*{self.path}"))
        return named and (self.layers is None or site.layer in self.layers)


class Budget(_Strict):
    """The share of parameters that the rules without ``keep`` of their own leave: ``of`` the whole model or the sites."""

    keep: float
    of: Literal["model", "sites"] = "sites"

    @field_validator("keep")
    @classmethod
    def _share(cls, value):
        return checked_keep(value)


class Heal(_Strict):
    """Distillation after compression; see :mod:`tenfold.train.heal`."""

    steps: int | None = None
    epochs: float | None = None
    tokens_per_step: int = 4096
    learning_rate: float = 6.0e-5
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    distill: float = 1.0
    temperature: float = 1.0


class Tokenizer(_Strict):
    """A byte-level BPE of ``vocab_size`` entries, trained on the first ``documents`` of the data."""

    vocab_size: int = Field(ge=257)
    documents: int = Field(10_000, ge=1)


class Train(_Strict):
    """Pre-training: ``tokens`` of the data once, ``batch * accumulate`` windows a step; Muon and AdamW."""

    tokens: int | None = None
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 2.0e-3
    weight_decay: float = 0.1
    schedule: str = "linear"
    warmup: float = 0.03
    compile: bool = False
    seed: int = 0


class Recipe(_Strict):
    """One published system or one recommended setting."""

    name: str = "unnamed"
    source: str = ""
    note: str = ""
    on: str | None = None
    replace: list[Rule] = Field(default_factory=list)
    budget: Budget | None = None
    untie: bool = False
    heal: Heal | None = None
    stages: list[dict[str, Any]] | None = None
    model: dict[str, Any] | None = None
    tokenizer: Tokenizer | None = None
    train: Train | None = None


def checked_keep(keep: float | None) -> float | None:
    if keep is not None and not 0 < keep < 1:
        raise ValueError(f"keep is {keep}, but it is the share of parameters to keep: between 0 and 1, both excluded")
    return keep


def recipe_names() -> list[str]:
    folder = resources.files("tenfold") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


class _Words(yaml.SafeLoader):
    """YAML 1.2's booleans, true and false: in YAML 1.1 the key ``on`` is one, too."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":bool")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Words.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), ["t", "f"])


def load_recipe(name: str | Path | dict) -> Recipe:
    """A recipe by the name it ships under, by the path of a YAML file, or from a mapping.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: the text is not YAML, or breaks the schema.
    """
    if isinstance(name, dict):
        return parse_recipe(name, "the recipe")
    shipped = resources.files("tenfold") / "recipes" / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        raise FileNotFoundError(
            f"there is no recipe file {name}; check the path, or use a name: tenfold recipes lists them"
        )
    if not path.is_file() and not shipped.is_file():
        near = get_close_matches(str(name), recipe_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(recipe_names())}"
        raise FileNotFoundError(f"there is no recipe {name!r}: {hint}")
    text = path.read_text() if path.is_file() else shipped.read_text()
    try:
        data = yaml.load(text, _Words)
    except yaml.YAMLError as reason:
        raise ValueError(f"{name} is not YAML: {' '.join(str(reason).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{name} holds no mapping of keys; a recipe starts with name: and replace:")
    return parse_recipe(data, str(name))


def parse_recipe(data: dict, where: str) -> Recipe:
    """``data`` checked against the schema, every complaint as one sentence."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as reason:
        raise ValueError(f"{where}: {'; '.join(_complaint(error) for error in reason.errors())}") from None


_KEYS = {key for model in (Recipe, Rule, Start, Share, Budget, Heal, Tokenizer, Train) for key in model.model_fields}


def _complaint(error) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(str(error["loc"][-1]), _KEYS, 1)
        return f"unknown key {place!r}" + (
            f", did you mean {near[0]!r}?" if near else f", known keys are {sorted(_KEYS)}"
        )
    given = "" if error["type"] in ("value_error", "missing") else f", not {error['input']!r}"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}{given}"


@dataclass(frozen=True)
class Entry:
    """What one site becomes.

    Args:
        shared: ``{factor name: key in SharedFactors}``.
        frozen: names of factors that stay as they are in training.
    """

    site: Site
    structure: Structure
    bias: bool
    start: Start = field(default_factory=Start)
    shared: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """``{path: entry}`` for one model, and what happens to its head."""

    entries: dict[str, Entry]
    untie: bool = False
    recipe: str = ""


def make_plan(model, recipe: Recipe) -> Plan:
    """What ``recipe`` becomes on ``model``; nothing is allocated and nothing is changed.

    Raises:
        ValueError: a rule matches nothing, a structure doesn't fit a site, or a tied head is to be folded.
    """
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
    total = sum(p.numel() for p in model.parameters())
    drop, open_sites = (1 - recipe.budget.keep) * total, 0
    for rule, site in matched:
        size = site.shape[0] * site.shape[1]
        if rule.keep is None and _budgeted(rule):
            open_sites += size
        else:
            drop -= size - _fitting(rule, site, rule.keep).numel
    if not 0 < drop < open_sites:
        raise ValueError(
            f"keep {recipe.budget.keep} of the model's {total:,} parameters asks to drop {round(drop):,} at the sites "
            f"of rules without a rank or keep of their own, which hold {open_sites:,}; change keep or fold more sites"
        )
    return 1 - drop / open_sites


def _budgeted(rule: Rule) -> bool:
    """Whether a share to keep sets the rank of the rule's structures."""
    assert rule.structure is not None
    return Structure.family(rule.structure["kind"]).is_open(rule.structure)


def _fitting(rule: Rule, site: Site, keep: float | None) -> Structure:
    """The structure of one site; every complaint names the site."""
    where = f"{site.path} ({site.shape[0]}x{site.shape[1]})"
    try:
        return _structure(rule, site, keep)
    except ValueError as reason:
        raise ValueError(f"{where}: {reason}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError):
        raise ValueError(
            f"{where}: {rule.structure} is no structure; sizes and ranks are whole numbers or lists of them, a base or "
            "part is a mapping with its own kind"
        ) from None


def _entry(rule: Rule, number: int, site: Site, keep: float | None) -> Entry:
    structure = _fitting(rule, site, keep if rule.keep is None else rule.keep)
    prefix = "part_0_" if rule.adapter else ""
    names = structure.factor_shapes()
    wanted = [prefix + name for name in (rule.share.factors if rule.share else [])] + [prefix + n for n in rule.freeze]
    for name in wanted:
        if name not in names:
            raise ValueError(f"{site.path}: there is no factor {name!r} to share or freeze; it has {', '.join(names)}")
    shared = {prefix + name: _key(rule.share, number, site, name) for name in rule.share.factors} if rule.share else {}
    bias = site.bias and rule.bias == "keep"
    return Entry(site, structure, bias, rule.start, shared, tuple(prefix + name for name in rule.freeze))


def _key(share: Share, number: int, site: Site, name: str) -> str:
    """Sites of one rule share, never those of two rules: the number of the rule is part of the key."""
    layer = site.layer or 0
    if share.across == "roles":
        return f"rule_{number}_layer_{layer}_{name}"
    group = layer // share.group if share.group else 0
    return f"rule_{number}_{site.role.replace('.', '_')}_{name}_{group}"


def _check_shared(entries: dict[str, Entry]) -> None:
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


def _structure(rule: Rule, site: Site, keep: float | None) -> Structure:
    (out, inner), spec = site.shape, rule.structure
    assert spec is not None
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
