"""What a recipe wants of pre-training: what no step of it would do is refused, before anything is written."""

from __future__ import annotations

from tenfold.models.recipe import Recipe

# key -> the way out, where the model starts from noise
IDLE = {
    **dict.fromkeys(
        ("first", "squeeze", "stages", "calibrate"),
        "is for a trained model: train dense for a part of the steps, train: {fold: 0.5}, or leave it out",
    ),
    "heal": "is for a folded model, and pre-training trains anyway: leave it out",
}
WITHOUT_RULES = dict.fromkeys(
    ("budget", "untie"), "does nothing without rules under replace: write one, or leave it out"
)


def check_wanted(recipe: Recipe) -> None:
    """Raise ValueError for what ``recipe`` says and pre-training would not do."""
    if recipe.train.fold:
        return
    idle = IDLE if recipe.replace else IDLE | WITHOUT_RULES
    for key, way_out in idle.items():
        if getattr(recipe, key):
            raise ValueError(f"{key} of recipe {recipe.name!r} {way_out}")
