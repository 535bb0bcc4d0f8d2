"""Schema of recipes, the YAML files that users write and share; an unknown key is refused with the nearest known one."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from tenfold.models.architectures import ROLES
from tenfold.models.config import Calibrate, StrictModel, Tokenizer, Train
from tenfold.models.distillation_config import Heal
from tenfold.models.sites import Site
from tenfold.models.suggestions import check_name
from tenfold.models.yaml_files import read_yaml, shorten

ERRORS = 8  # of a recipe, in one sentence
First = Literal["drop-layers", "drop-layers-perplexity", "minitron", "peak-to-peak", "rotate", "slice"]


def check_keep(keep: float) -> float:
    """Return ``keep`` if it is between 0 and 1, both excluded."""
    if not 0 < keep < 1:
        raise ValueError(f"keep is {keep}, but it is the share of parameters to keep: between 0 and 1, both excluded")
    return keep


Keep = Annotated[float, AfterValidator(check_keep)]


class Start(StrictModel):
    """Initialisation of factors.

    ``fit`` names a start of ``tenfold.models.initializers``; ``norm: restore`` scales the factors to the norm of the weight.
    """

    fit: str = "nearest"
    norm: Literal["keep", "restore"] = "keep"
    options: dict[str, Any] = Field(default_factory=dict)


class Share(StrictModel):
    """Factors that several sites of a rule share.

    Args:
        factors: their names.
        across: ``layers`` (one set per role), ``roles`` (one set per layer), ``experts`` (one set per role and layer), or ``all``
            sites of the rule (one set).
        group: the number of neighbouring layers that share, with ``layers`` or ``all``; by default all of them.
        grad_dropout: the probability with which the gradient of a shared factor from one site is dropped in a step.
    """

    factors: list[str]
    across: Literal["layers", "roles", "experts", "all"] = "layers"
    group: int | None = Field(None, ge=1)
    grad_dropout: float = Field(0.0, ge=0, lt=1)


class Rule(StrictModel):
    """Sites and their structure; of several rules the first that matches a site applies.

    ``prune`` replaces ``role`` and ``structure``: it prunes hidden units of a block's ``mlp``, or dimensions of the heads of its
    ``attention``, or dimensions of rare tokens' rows of a tied ``embedding`` (``tenfold.compression.embedding_ranks``), by
    ``criterion``: by the ``loss`` (``tenfold.compression.unit_selection``) or as in ``modegpt``
    (``tenfold.baselines.modegpt``). Of several structures every site gets the one with the least loss at its size, which
    needs activations. ``criterion: rocket``, with a ``dense`` structure, replaces the matrix by the product of a dictionary and
    sparse coefficients (``tenfold.baselines.rocket``); ``criterion: lems`` measures the divergence of every matrix alone
    (``tenfold.baselines.lems``).
    """

    prune: Literal["mlp", "attention", "heads", "embedding"] | None = None
    criterion: Literal["loss", "lems", "modegpt", "rocket"] = "loss"
    role: str | list[str] | None = None
    path: str | None = None
    layers: list[int] | None = None
    structure: dict[str, Any] | list[dict[str, Any]] | None = None
    keep: Keep | None = None
    split: int = Field(1, ge=1)
    start: Start = Field(default_factory=Start)
    share: Share | None = None
    adapter_rank: int | None = Field(None, ge=1)
    bias: Literal["keep", "drop"] = "keep"
    freeze: list[str] = Field(default_factory=list)

    @field_validator("start", mode="before")
    @classmethod
    def _expand_name(cls, value):
        return {"fit": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_complete(self):
        for role in self.roles:
            check_name(role, ROLES, "role")
        if self.prune is not None:
            if self.role or self.path or self.structure:
                raise ValueError("a rule that prunes names neither role, path nor structure")
            given = self.model_dump(exclude_defaults=True).keys() - {"prune", "criterion", "layers"}
            if given:
                raise ValueError(
                    f"a rule that prunes takes no {', '.join(sorted(given))}; a budget says how much stays"
                )
            return self
        if self.role is None and self.path is None:
            raise ValueError("a rule needs a role or a path")
        if not self.structures or any("kind" not in spec for spec in self.structures):
            raise ValueError("a rule needs a structure with its kind, for instance {kind: low_rank, rank: 64}")
        return self

    @property
    def roles(self) -> list[str]:
        if self.prune is not None:
            prefix = {"mlp": "mlp.", "embedding": "embed"}.get(self.prune, "attn.")
            return [role for role in ROLES if role.startswith(prefix)]
        return [] if self.role is None else [self.role] if isinstance(self.role, str) else self.role

    @property
    def structures(self) -> list[dict[str, Any]]:
        """Return the structures that a site may get."""
        if self.structure is None:
            return []
        return self.structure if isinstance(self.structure, list) else [self.structure]

    @property
    def spec(self) -> dict[str, Any]:
        """Return the only structure.

        Raises:
            ValueError: there are several.
        """
        if len(self.structures) != 1:
            raise ValueError(
                f"the rule for role {self.role} leaves the choice between {len(self.structures)} structures, which activations "
                "make for each matrix: give a calibration text (--calibrate FILE), or one structure here"
            )
        return self.structures[0]

    def matches(self, site: Site) -> bool:
        named = site.role in self.roles or (self.path is not None and fnmatch(site.path, f"*{self.path}"))
        return named and (self.layers is None or site.layer in self.layers)


class Budget(StrictModel):
    """Share of parameters to keep at the sites of rules without a ``keep`` of their own.

    ``of`` the replaced ``sites``, of the whole ``model``, of the model ``without_head``, or of its ``blocks``: all but
    embeddings and output head. Two need activations: ``flops``, the FLOPs per token of the whole model at 1,024 rows a call;
    ``bytes``, those of its saved weights, index maps included.

    ``shapes: stock`` spends it on shapes that a plain configuration can say (``tenfold.compression.stock_shapes``): one width of
    all MLPs, a multiple of ``align``, as many groups of heads in every block, and whole blocks.
    """

    keep: Keep
    of: Literal["model", "sites", "blocks", "without_head", "flops", "bytes"] = "sites"
    shapes: Literal["free", "stock"] = "free"
    align: int = Field(64, ge=1)


class Squeeze(StrictModel):
    """Bonds of tensor trains to truncate, those with the least loss first; see ``tenfold.compression.truncate_ranks``.

    Args:
        role: of the matrices, which are tensor trains already.
        rank_ratio: the ratio of a bond that stays.
        bonds: how many are truncated, one after another.
    """

    role: str | list[str]
    rank_ratio: float = Field(0.5, gt=0, lt=1)
    bonds: int = Field(1, ge=1)


class Shrink(StrictModel):
    """Proportions in which the widths of a model shrink, where ``transform`` prunes widths.

    Every width loses the same fraction times its number here, until the budget is met: with ``mlp: 1`` and ``heads: 0.5`` heads
    lose half the fraction that hidden units of the MLPs lose.

    Args:
        mlp: hidden units of the MLPs.
        heads: heads of the attentions, in whole groups of keys and values.
        hidden: channels of the residual stream. Where a configuration derives the size of a head from them, heads shrink, too.
    """

    mlp: float = Field(0.0, ge=0)
    heads: float = Field(0.0, ge=0)
    hidden: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check_not_empty(self):
        if not (self.mlp or self.heads or self.hidden):
            raise ValueError(
                "a shrink of nothing leaves the model as it is; give mlp, heads or hidden a number above 0"
            )
        return self


class Rules(StrictModel):
    """What a stage and a recipe without stages say: a transform of the whole model, rules, calibration, and the healing after it.

    Args:
        transform: before the rules; see ``tenfold.compression.compress``.
        squeeze: truncate tensor trains of earlier stages, instead of ``replace``.
    """

    transform: First | None = None
    shrink: Shrink | None = None
    replace: list[Rule] = Field(default_factory=list)
    squeeze: Squeeze | None = None
    budget: Budget | None = None
    untie: bool = False
    calibrate: Calibrate | None = None
    heal: Heal | None = None

    @model_validator(mode="after")
    def _check_rules(self):
        if self.shrink is not None and self.transform is None:
            raise ValueError(
                "shrink sets how transform prunes widths, and there is no transform; write it, or leave shrink out"
            )
        if self.squeeze is not None and self.replace:
            raise ValueError("squeeze and replace are two stages: replace in one, squeeze in the next")
        return self

    def activation_choices(self) -> list[str]:
        """Return what activations decide, beside ``transform``, in words."""
        found = [f"prune: {rule.prune}" for rule in self.replace if rule.prune]
        found += [f"a choice of {len(rule.structures)} structures" for rule in self.replace if len(rule.structures) > 1]
        of = self.budget and self.budget.of
        return found + ([f"a budget of {of}"] if of in ("flops", "bytes") else [])


class Stage(Rules):
    """Stage of gradual compression, ``rounds`` times."""

    rounds: int = Field(1, ge=1)


class Recipe(Rules):
    """Recipe of a published system or a recommended setting."""

    name: str = "unnamed"
    source: str = ""
    note: str = ""
    base_model: str | None = None
    stages: list[Stage] = Field(default_factory=list)
    model: dict[str, Any] | None = None
    tokenizer: Tokenizer | None = None
    train: Train | None = None

    @field_validator("model")
    @classmethod
    def _check_model(cls, value):
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
    def _check_conflicts(self):
        if self.stages and (given := sorted(self.model_dump(include=set(Rules.model_fields), exclude_defaults=True))):
            raise ValueError(
                f"a recipe of stages has its rules in them, and no {', '.join(given)} of its own; move it into a stage"
            )
        if self.origin and self.tokenizer and self.tokenizer.vocab_size:
            raise ValueError("a model that is trained on has its tokenizer: leave vocab_size out")
        if self.train and self.train.compress_at:
            self._check_compress_at(self.train)
        return self

    def _check_compress_at(self, train: Train) -> None:
        stages = (self, *self.stages)
        if not any(stage.replace or stage.transform for stage in stages):
            raise ValueError(
                "train.compress_at compresses by the rules under replace, and there are none; write one, or leave it out"
            )
        if any(stage.heal for stage in stages):
            raise ValueError(
                "training continues after train.compress_at, so that nothing is left to heal; leave heal out"
            )
        if any(stage.calibrate is None and (stage.transform or stage.activation_choices()) for stage in stages):
            raise ValueError(
                "a choice of structures, a budget of flops or bytes, rules that prune, and transform, need activations: write a "
                "calibrate section, {} for the default one"
            )
        if train.self_guided_fraction:
            raise ValueError(
                "train.compress_at and train.self_guided_fraction are two ways to begin with dense matrices; leave one out"
            )

    @property
    def origin(self) -> str | None:
        """Return the folder or the name of the model that training starts from, None for a new one."""
        return (self.model or {}).get("from")

    @property
    def training(self) -> Train:
        """Return the train section.

        Raises:
            ValueError: there is none.
        """
        if self.train is None:
            raise ValueError(f"recipe {self.name} has no train section; write one, or compress with it instead")
        return self.train

    def stage_recipes(self) -> list[Recipe]:
        """Return the recipes of the stages, or this recipe where there are none."""
        return [
            Recipe(name=self.name, **{key: getattr(stage, key) for key in Rules.model_fields})
            for stage in self.stages
            for _ in range(stage.rounds)
        ] or [self]


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    folder = resources.files("tenfold") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str | Path | dict | Recipe) -> Recipe:
    """Load a recipe by the name it ships under, by the path of a YAML file, or from a mapping; a recipe is returned as it is.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: the text is not YAML, or breaks the schema.
    """
    if isinstance(name, Recipe):
        return name
    if isinstance(name, dict):
        return parse_recipe(name, "the recipe")
    shipped, path = resources.files("tenfold") / "recipes" / f"{name}.yaml", Path(name)
    if path.is_file():
        data = read_yaml(path)
    elif shipped.is_file():
        data = yaml.safe_load(shipped.read_text())
    elif path.suffix in (".yaml", ".yml"):
        raise FileNotFoundError(
            f"there is no recipe file {name}; check the path, or use a name: tenfold recipes lists them"
        )
    else:
        near = get_close_matches(str(name), recipe_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(recipe_names())}"
        raise FileNotFoundError(f"there is no recipe {name!r}: {hint}")
    if not isinstance(data, dict):
        raise ValueError(f"{name} holds no mapping of keys; a recipe starts with name: and replace:")
    return parse_recipe(data, str(name))


def parse_recipe(data: dict, where: str) -> Recipe:
    """Check ``data`` against the schema, and report all errors in one sentence."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as reason:
        told = "; ".join(_describe_error(error) for error in reason.errors()[:ERRORS])
        more = f"; {left} more" if (left := reason.error_count() - ERRORS) > 0 else ""
        raise ValueError(f"{where}: {shorten(told, 1600)}{more}") from None


_KEYS = {
    key
    for model in (Recipe, Rule, Start, Share, Budget, Calibrate, Heal, Squeeze, Stage, Tokenizer, Train)
    for key in model.model_fields
}


def _describe_error(error) -> str:
    place = shorten(".".join(str(part) for part in error["loc"]))
    if error["type"] == "extra_forbidden":
        near = get_close_matches(place.rpartition(".")[2], _KEYS, 1)
        return f"unknown key {place!r}" + (
            f", did you mean {near[0]!r}?" if near else f", known keys are {sorted(_KEYS)}"
        )
    given = "" if error["type"] in ("value_error", "missing") else f", not {shorten(repr(error['input']))}"
    where = f"{place}: " if place else ""  # of the whole recipe
    return f"{where}{error['msg'].removeprefix('Value error, ')}{given}"
