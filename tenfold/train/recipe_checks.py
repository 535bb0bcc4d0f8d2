"""Checks of a pre-training recipe: what no step of it would carry out is refused before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig

from tenfold.models.initializers import DRAWS, STARTS
from tenfold.models.recipe import Recipe
from tenfold.models.suggestions import check_name

# key -> the way out, for a model with random weights
UNUSED = {
    **dict.fromkeys(
        ("transform", "squeeze", "stages", "calibrate"),
        "is for a trained model: train dense for a part of the steps, train: {compress_at: 0.5}, or leave it out",
    ),
    "heal": "is for a compressed model, and pre-training trains anyway: leave it out",
}
TRAINED = (
    "would compress a trained model: do that first, tenfold compress, and name that folder, or midway, "
    "train: {compress_at: 0.5}"
)
WITHOUT_RULES = dict.fromkeys(
    ("budget", "untie"), "does nothing without rules under replace: write one, or leave it out"
)


def check_recipe_keys(recipe: Recipe) -> None:
    """Raise ValueError if ``recipe`` has what pre-training would not carry out."""
    for rule in (rule for stage in recipe.stage_recipes() for rule in stage.replace):
        check_name(rule.start.fit, STARTS, "start")
    if recipe.training.compress_at:
        return
    unused = UNUSED if recipe.replace else UNUSED | WITHOUT_RULES
    if recipe.origin:
        unused = unused | dict.fromkeys(("replace", *UNUSED, *WITHOUT_RULES), TRAINED) | {"heal": UNUSED["heal"]}
    for key, way_out in unused.items():
        if getattr(recipe, key):
            raise ValueError(f"{key} of recipe {recipe.name!r} {way_out}")
    if found := recipe.activation_choices():
        raise ValueError(
            f"recipe {recipe.name!r} has {found[0]}, which activations of a trained model decide: train dense for a part of the "
            "steps, train: {compress_at: 0.5} with calibrate: {}, or leave it out"
        )
    for start in (rule.start for rule in recipe.replace):
        if "fit" in start.model_fields_set and start.fit not in DRAWS:  # without a start factors are drawn
            raise ValueError(
                f"the start {start.fit} of recipe {recipe.name!r} is a fit to a trained matrix, and here is none yet: draw by "
                f"{', '.join(DRAWS)}, or train dense for a part of the steps, train: {{compress_at: 0.5}}"
            )


def check_teacher_named(recipe: Recipe) -> None:
    """Raise ValueError if ``recipe`` has settings of a teacher but names none."""
    train = recipe.training
    if train.teacher is None and (train.losses is not None or train.temperature != 1):
        raise ValueError(
            f"recipe {recipe.name!r} learns from a teacher, a trained model with the same tokenizer: name it (--teacher DIR, "
            "or teacher in the train section), or leave losses and temperature out"
        )


def check_known(config: PreTrainedConfig, given: Iterable[str]) -> None:
    """Raise ValueError for a key of ``given``, which ``config`` was made of, that its model does not read.

    transformers accepts any key. Keys that it renames or moves (``rope_theta``) are not attributes of the configuration itself;
    configurations of other packages are not checked.
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
    """Return whether the model's source names ``key``: some read, with a default, what the configuration does not declare."""
    found = find_spec(type(config).__module__.replace(".configuration_", ".modeling_"))
    return found is not None and found.origin is not None and f'"{key}"' in Path(found.origin).read_text()
