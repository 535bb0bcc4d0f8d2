"""What a recipe wants of pre-training: what no step of it would do is refused, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig

from tenfold.models.initializers import DRAWS, STARTS
from tenfold.models.recipe import Recipe, Rule, find_activation_choices
from tenfold.models.suggestions import check_name

# key -> the way out, where the model starts from noise
IDLE = {
    **dict.fromkeys(
        ("first", "squeeze", "stages", "calibrate"),
        "is for a trained model: train dense for a part of the steps, train: {fold: 0.5}, or leave it out",
    ),
    "heal": "is for a folded model, and pre-training trains anyway: leave it out",
}
TRAINED = (
    "would fold a trained model: do that first, tenfold compress, and name that folder, or midway, train: {fold: 0.5}"
)
WITHOUT_RULES = dict.fromkeys(
    ("budget", "untie"), "does nothing without rules under replace: write one, or leave it out"
)


def check_wanted(recipe: Recipe) -> None:
    """Raise ValueError for what ``recipe`` says and pre-training would not do."""
    for rule in (rule for step in recipe.stage_recipes() for rule in step.replace):
        check_name(rule.start.fit, STARTS, "start")  # with a fold it would be told midway
    if recipe.train.fold:
        return
    idle = IDLE if recipe.replace else IDLE | WITHOUT_RULES
    if recipe.origin:
        idle = idle | dict.fromkeys(("replace", *IDLE, *WITHOUT_RULES), TRAINED) | {"heal": IDLE["heal"]}
    for key, way_out in idle.items():
        if getattr(recipe, key):
            raise ValueError(f"{key} of recipe {recipe.name!r} {way_out}")
    if found := find_activation_choices(recipe):
        raise ValueError(
            f"recipe {recipe.name!r} has {found[0]}, which activations of a trained model decide: train dense for a part of the "
            "steps, train: {fold: 0.5} with calibrate: {}, or leave it out"
        )
    for rule in recipe.replace:
        _check_drawn(rule, recipe.name)


def _check_drawn(rule: Rule, name: str) -> None:
    """A rule that says nothing of its start is drawn as noise; a fit that it names has no matrix to be made of."""
    fit = rule.start.fit
    if "fit" in rule.start.model_fields_set and fit not in DRAWS:
        raise ValueError(
            f"the start {fit} of recipe {name!r} is a fit to a trained matrix, and here is none yet: draw by "
            f"{', '.join(DRAWS)}, or train dense for a part of the steps, train: {{fold: 0.5}}"
        )


def check_known(config: PreTrainedConfig, given: Iterable[str]) -> None:
    """Raise ValueError for a key of ``given``, which ``config`` was made of, that nothing of its model reads.

    transformers keeps any key. What it only renames or puts elsewhere (``rope_theta``) is none of the configuration's own, and
    classes of others are left alone.
    """
    if not type(config).__module__.startswith("transformers."):
        return
    plain = type(config)()
    for key in given:
        if key in vars(config) and not hasattr(plain, key) and not _is_read(config, key):
            near = get_close_matches(key, vars(plain).keys() | plain.attribute_map.keys(), 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ValueError(f"a model of model_type {config.model_type!r} has no {key!r}; {hint}")


def _is_read(config: PreTrainedConfig, key: str) -> bool:
    """Whether the code of the model names the key: some read, with a default, what their configuration doesn't declare."""
    found = find_spec(type(config).__module__.replace(".configuration_", ".modeling_"))
    return found is not None and f'"{key}"' in Path(found.origin).read_text()
