"""A model to train from scratch: of a recipe's configuration, with random weights, folded from noise where the recipe says so."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from tenfold.models.hub import of_a_kind
from tenfold.models.plan import make_plan
from tenfold.models.reading import positions_of
from tenfold.models.recipe import Recipe
from tenfold.models.replace import replace
from tenfold.train.wanted import check_known

KINDS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def new_model(recipe: Recipe, tokenizer):
    """The recipe's model with random weights, folded from noise where the recipe says so."""
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    config = _configuration(recipe, vocab_size=len(tokenizer), **ends)
    with of_a_kind(KINDS[recipe.train.objective]):
        model = KINDS[recipe.train.objective].from_config(config)
    if recipe.replace:
        plan = make_plan(model, recipe)
        replace(model, plan, source="noise")
    return model


def _configuration(recipe: Recipe, **more):
    kind = recipe.model["model_type"]
    if kind not in CONFIG_MAPPING:
        near = get_close_matches(kind, CONFIG_MAPPING, 1)
        hint = f"did you mean {near[0]!r}?" if near else "there are llama, gpt2, bert and many more"
        raise ValueError(f"transformers knows no model_type {kind!r}; {hint}")
    try:
        config = AutoConfig.for_model(**recipe.model, **more)
    except StrictDataclassError as reason:  # of numbers that are none, or don't fit together
        raise ValueError(f"recipe {recipe.name!r} has a model that can't be: {reason}") from None
    check_known(config, recipe.model)
    return config


def length_of(recipe: Recipe) -> int:
    """Tokens in a window.

    Raises:
        ValueError: the recipe does not say, it is more than the model can see, or the model can't be.
    """
    config = _configuration(recipe)
    with torch.device("meta"):
        positions = positions_of(AutoModel.from_config(config))
    length = recipe.train.window or positions
    if length is None:
        raise ValueError(f"recipe {recipe.name!r} does not say how long a window is; give train: a window")
    if positions is not None and length > positions:
        raise ValueError(
            f"window {length} of recipe {recipe.name!r} is longer than the {positions} positions of its model; give a shorter "
            "one, or the model more positions"
        )
    return length
