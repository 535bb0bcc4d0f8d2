"""Recipes: what a person writes and shares. The schema is strict: an unknown key is refused with the nearest known one."""

from __future__ import annotations

import re
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tenfold.models.architectures import ROLES
from tenfold.models.config import Calibrate, StrictModel, Tokenizer, Train
from tenfold.models.distillation_config import Heal
from tenfold.models.sites import Site

First = Literal[
    "drop-layers",
    "drop-layers-perplexity",
    "minitron",
    "order",
    "peak-to-peak",
    "rotate",
    "slice",
]


class Start(StrictModel):
    """Where the factors come from.

    ``fit`` names a start of :mod:`tenfold.models.initializers`; ``norm`` says what is done about the norm that a fit loses.
    """

    fit: str = "nearest"
    norm: Literal["keep", "restore"] = "keep"
    options: dict[str, Any] = Field(default_factory=dict)


class Share(StrictModel):
    """Factors that several sites of a rule use in common.

    Args:
        factors: their names.
        across: ``layers`` (one set per role), ``roles`` (one set per layer), ``experts`` (one set per role and layer), or ``all``
            sites of the rule (one set).
        group: how many neighbouring layers share, across layers or all; all of them without it.
        mask: the probability with which a site's part of the gradient of a shared factor is dropped in a step.
    """

    factors: list[str]
    across: Literal["layers", "roles", "experts", "all"] = "layers"
    group: int | None = Field(None, ge=1)
    mask: float = Field(0.0, ge=0, lt=1)


class Rule(StrictModel):
    """Which sites get which structure; of several rules the first that matches a site wins.

    ``narrow`` instead of ``role`` and ``structure`` takes the matrices of a block's ``mlp`` or ``attention`` together and
    leaves fewer hidden units, or fewer dimensions per head. Of several structures every site gets the one that loses least at
    its size, by activations only. ``method`` says how they are chosen: by the ``loss`` behind them
    (:mod:`tenfold.compress.unit_selection`) or as in ``modegpt`` (:mod:`tenfold.baselines.modegpt`). ``rocket``, with a ``dense``
    structure, fills the matrix with the product of a dictionary and sparse coefficients (:mod:`tenfold.baselines.rocket`).
    """

    narrow: Literal["mlp", "attention"] | None = None
    method: Literal["loss", "modegpt", "rocket"] = "loss"
    role: str | list[str] | None = None
    path: str | None = None
    layers: list[int] | None = None
    structure: dict[str, Any] | list[dict[str, Any]] | None = None
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
        if self.narrow is not None:
            if self.role or self.path or self.structure:
                raise ValueError("a rule that narrows names neither role, path nor structure")
            given = self.model_dump(exclude_defaults=True).keys() - {"narrow", "method", "layers"}
            if given:
                raise ValueError(
                    f"a rule that narrows takes no {', '.join(sorted(given))}; a budget says how much stays"
                )
            return self
        if self.role is None and self.path is None:
            raise ValueError("a rule needs a role or a path")
        if not self.structures or any("kind" not in spec for spec in self.structures):
            raise ValueError("a rule needs a structure with its kind, for instance {kind: low_rank, rank: 64}")
        return self

    @property
    def roles(self) -> list[str]:
        if self.narrow is not None:
            return [role for role in ROLES if role.startswith("mlp." if self.narrow == "mlp" else "attn.")]
        return [] if self.role is None else [self.role] if isinstance(self.role, str) else self.role

    @property
    def structures(self) -> list[dict[str, Any]]:
        """What a site may become."""
        if self.structure is None:
            return []
        return self.structure if isinstance(self.structure, list) else [self.structure]

    @property
    def spec(self) -> dict[str, Any]:
        """The one structure.

        Raises:
            ValueError: there are several.
        """
        if len(self.structures) != 1:
            raise ValueError(
                f"the rule for role {self.role} leaves the choice between {len(self.structures)} structures, which activations "
                "make for each matrix of a block by itself: give a calibration text (--calibrate FILE), or one structure here"
            )
        return self.structures[0]

    def matches(self, site: Site) -> bool:
        named = site.role in self.roles or (self.path is not None and fnmatch(site.path, f"*{self.path}"))
        return named and (self.layers is None or site.layer in self.layers)


class Budget(StrictModel):
    """The share of parameters that the rules without ``keep`` of their own leave.

    ``of`` the replaced ``sites``, of the whole ``model``, of the model ``without_head``, or of its ``blocks``: all but
    embeddings and output head. By activations only: ``flops``, of the FLOPs a token of the whole model at 1,024 rows a call;
    ``bytes``, of its weights as they are saved, whole numbers of permutations included.
    """

    keep: float
    of: Literal["model", "sites", "blocks", "without_head", "flops", "bytes"] = "sites"

    @field_validator("keep")
    @classmethod
    def _share(cls, value):
        return checked_keep(value)


class Squeeze(StrictModel):
    """Bonds of tensor trains that are cut, those that lose least first; see :mod:`tenfold.compress.truncate_ranks`.

    Args:
        role: of the matrices, which are folded as tensor trains already.
        by: the share of a bond that stays.
        bonds: how many are cut, one after another.
    """

    role: str | list[str]
    by: float = Field(0.5, gt=0, lt=1)
    bonds: int = Field(1, ge=1)


class Shrink(StrictModel):
    """In which proportion the widths of a model shrink, where ``first`` prunes widths.

    Until the budget is met, every width loses the same fraction times its number here: with ``mlp: 1`` and ``heads: 0.5`` heads
    lose half the fraction that hidden units of the MLPs lose.

    Args:
        mlp: of the hidden units of the MLPs.
        heads: of the heads of the attentions, which go in whole groups of keys and values.
        hidden: of the channels of the residual stream. Where a configuration derives the size of a head from them, heads go
            along.
    """

    mlp: float = Field(0.0, ge=0)
    heads: float = Field(0.0, ge=0)
    hidden: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _something(self):
        if not (self.mlp or self.heads or self.hidden):
            raise ValueError(
                "a shrink of nothing leaves the model as it is; give mlp, heads or hidden a number above 0"
            )
        return self


class Stage(StrictModel):
    """One step of gradual compression: what is folded, by which share and guided by what, and the healing behind it.

    Args:
        squeeze: tensor trains of earlier stages are cut, instead of folding anything.
        rounds: how often the stage is done.
    """

    first: First | None = None
    shrink: Shrink | None = None
    replace: list[Rule] = Field(default_factory=list)
    squeeze: Squeeze | None = None
    rounds: int = Field(1, ge=1)
    budget: Budget | None = None
    untie: bool = False
    calibrate: Calibrate | None = None
    heal: Heal | None = None


class Recipe(StrictModel):
    """One published system or one recommended setting.

    ``first`` names a change of the whole model before the rules are carried out; see :mod:`tenfold.compress.whole_model`.
    """

    name: str = "unnamed"
    source: str = ""
    note: str = ""
    on: str | None = None
    first: First | None = None
    shrink: Shrink | None = None
    replace: list[Rule] = Field(default_factory=list)
    squeeze: Squeeze | None = None
    budget: Budget | None = None
    untie: bool = False
    calibrate: Calibrate | None = None
    heal: Heal | None = None
    stages: list[Stage] = Field(default_factory=list)
    model: dict[str, Any] | None = None
    tokenizer: Tokenizer | None = None
    train: Train | None = None

    @field_validator("model")
    @classmethod
    def _configuration(cls, value):
        if "from" in (value or ()):
            if len(value) > 1 or not isinstance(value["from"], str) or not value["from"].strip():
                raise ValueError("a model that is trained on is its folder or its name alone: {from: DIR}")
        elif value is not None and "model_type" not in value:
            raise ValueError(
                "a model needs its model_type, for instance {model_type: llama}, or the folder of a trained one, {from: DIR}"
            )
        if given := sorted({"vocab_size", "bos_token_id", "eos_token_id"} & set(value or ())):
            raise ValueError(f"a model has {', '.join(given)} from its tokenizer; leave that out")
        return value

    @model_validator(mode="after")
    def _one_way(self):
        if self.stages:
            keys = ("replace", "first", "shrink", "squeeze", "budget", "untie", "calibrate", "heal")
            if given := sorted(self.model_dump(include=set(keys), exclude_defaults=True)):
                raise ValueError(
                    f"a recipe of stages says in them what is done, and has no {', '.join(given)} of its own"
                )
        if self.origin and self.tokenizer and self.tokenizer.vocab_size:
            raise ValueError("a model that is trained on has its tokenizer: leave vocab_size out")
        if self.train and self.train.fold:
            self._check_fold(self.train)
        for step in (self, *self.stages):
            if step.shrink is not None and step.first is None:
                raise ValueError(
                    "shrink says how first prunes widths, and there is no first; write it, or leave shrink out"
                )
            if step.squeeze is not None and step.replace:
                raise ValueError("squeeze and replace are two stages: fold in one, squeeze in the next")
        return self

    def _check_fold(self, train: Train) -> None:
        steps = (self, *self.stages)
        if not any(step.replace or step.first for step in steps):
            raise ValueError(
                "train.fold folds by the rules under replace, and there are none; write one, or leave it out"
            )
        if any(step.heal for step in steps):
            raise ValueError("what train.fold folds is trained on behind it; leave heal out")
        if any(step.calibrate is None and (step.first or by_activations(step)) for step in steps):
            raise ValueError(
                "a choice of structures, a budget of flops or bytes, rules that narrow, and first, go by activations: write a "
                "calibrate section, {} for the usual one"
            )
        if train.guide:
            raise ValueError("train.fold and train.guide are two ways to begin with dense matrices; leave one out")

    @property
    def origin(self) -> str | None:
        """The folder or the name of the model that is trained on, None where a new one is."""
        return (self.model or {}).get("from")

    def steps(self) -> list[Recipe]:
        """The recipes of its stages, this one where there are none."""
        keys = [key for key in Stage.model_fields if key != "rounds"]
        stages = [stage for stage in self.stages for _ in range(stage.rounds)]
        return [Recipe(name=self.name, **{key: getattr(stage, key) for key in keys}) for stage in stages] or [self]


def by_activations(step: Recipe | Stage) -> list[str]:
    """What of a step, beside ``first``, is decided by activations, in words."""
    found = [f"narrow: {rule.narrow}" for rule in step.replace if rule.narrow]
    found += [f"a choice of {len(rule.structures)} structures" for rule in step.replace if len(rule.structures) > 1]
    of = step.budget and step.budget.of
    return found + ([f"a budget of {of}"] if of in ("flops", "bytes") else [])


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


_KEYS = {
    key
    for model in (Recipe, Rule, Start, Share, Budget, Calibrate, Heal, Squeeze, Stage, Tokenizer, Train)
    for key in model.model_fields
}


def _complaint(error) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(str(error["loc"][-1]), _KEYS, 1)
        return f"unknown key {place!r}" + (
            f", did you mean {near[0]!r}?" if near else f", known keys are {sorted(_KEYS)}"
        )
    given = "" if error["type"] in ("value_error", "missing") else f", not {error['input']!r}"
    where = f"{place}: " if place else ""  # of the whole recipe
    return f"{where}{error['msg'].removeprefix('Value error, ')}{given}"
