"""The model of a recipe: from a configuration with random weights, structured or dense, or a trained one."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from tenfold.models.auto import read_config
from tenfold.models.checkpoint_format import check_plain, get_tenfold_config
from tenfold.models.loading import from_pretrained, short_class_errors, silent
from tenfold.models.plan import make_plan
from tenfold.models.recipe import Recipe
from tenfold.models.surgery import replace
from tenfold.models.text_mode import MASKED, positions_of
from tenfold.train.recipe_checks import check_known

AUTO_CLASSES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
ENCODERS = {*MASKED, "bert-generation"}
SPECIAL_TOKENS = ("pad_token_id", "mask_token_id", "cls_token_id", "sep_token_id")


def new_model(recipe: Recipe, tokenizer):
    """Return the recipe's model with random weights, structured where its rules say so; or load the one it starts from."""
    if recipe.origin:
        return from_pretrained(
            recipe.origin, AUTO_CLASSES[recipe.training.objective], new_head=False, dtype=torch.float32
        )
    model = _build(recipe, _configure_for(recipe, tokenizer))
    _check_positions(recipe, window_length(recipe), model)  # RoBERTa counts positions from the tokenizer's padding
    if recipe.replace:
        replace(model, make_plan(model, recipe), source="noise")
    return model


def new_empty_model(recipe: Recipe, tokenizer):
    """Return the recipe's dense model on the meta device."""
    with torch.device("meta"):
        return _build(recipe, _configure_for(recipe, tokenizer))


def window_length(recipe: Recipe) -> int:
    """Return the tokens in a window."""
    with torch.device("meta"):
        model = _build(recipe, _configure(recipe))
    length = recipe.training.sequence_length or positions_of(model)
    if length is None:
        raise ValueError(f"recipe {recipe.name!r} does not say how long a window is; give train: a window")
    _check_positions(recipe, length, model)
    return length


def _check_positions(recipe: Recipe, length: int, model) -> None:
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"sequence_length {length} of recipe {recipe.name!r} is longer than the {positions} positions of its model; give "
            "a shorter one, or the model more positions"
        )


def vocabulary_size(recipe: Recipe, tokenizer) -> int:
    """Return the vocabulary size of the recipe's model: the tokenizer's, or that of a trained model, which may be larger."""
    if not recipe.origin:
        return len(tokenizer)
    size = read_config(recipe.origin).get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"{recipe.origin} knows {size:,} tokens, and the tokenizer has {len(tokenizer):,}: take the model's own, or "
            "give the model more first (resize_token_embeddings)"
        )
    return size


def _configure_for(recipe: Recipe, tokenizer):
    """Return the configuration with vocabulary and special tokens of the tokenizer; a trained model has its own.

    The configuration's own special tokens belong to another vocabulary. One that the tokenizer lacks becomes the end of text
    where the model requires it.
    """
    if recipe.origin:
        return _configure(recipe)
    known, given = _configure(recipe), recipe.model or {}
    keys = [key for key in SPECIAL_TOKENS if hasattr(known, key) and key not in given]
    numbers = {key: getattr(tokenizer, key) for key in keys}
    required = [key for key in keys if numbers[key] is None and not _runs_with(recipe, **{key: None})]
    numbers |= dict.fromkeys(required, tokenizer.eos_token_id)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return _configure(recipe, vocab_size=len(tokenizer), **ends, **numbers)


def _runs_with(recipe: Recipe, **more) -> bool:
    """Return whether a model with ``more`` in its configuration runs."""
    try:
        with torch.device("meta"):
            AutoModel.from_config(_configure(recipe, **more))(input_ids=torch.ones(1, 2, dtype=torch.long))
    except (TypeError, ValueError):  # RoBERTa counts positions from the padding token
        return False
    except RuntimeError:  # the model was made, but does not run on the meta device
        return True
    return True


def _configure(recipe: Recipe, **more):
    if recipe.origin:
        config = read_config(recipe.origin)
        check_plain(config, recipe.origin)
        if recipe.training.compress_at and get_tenfold_config(config):
            raise ValueError(
                f"{recipe.origin} is compressed already, so that train.compress_at has nothing to do; leave it out"
            )
        return config
    given = recipe.model or {}
    kind = given["model_type"]
    if kind not in CONFIG_MAPPING:
        near = get_close_matches(kind, CONFIG_MAPPING, 1)
        hint = f"did you mean {near[0]!r}?" if near else "there are llama, gpt2, bert and many more"
        raise ValueError(f"transformers knows no model_type {kind!r}; {hint}")
    try:
        config = AutoConfig.for_model(**given, **more)
    except StrictDataclassError as reason:  # a value has the wrong type, or values don't fit together
        raise ValueError(f"recipe {recipe.name!r} has a model that can't be: {reason}") from None
    check_known(config, given)
    return config


def _build(recipe: Recipe, config):
    """Return a model with random weights, unless transformers has none or it attends to the tokens that it predicts."""
    auto_class = AUTO_CLASSES[recipe.training.objective]
    try:
        with short_class_errors(auto_class), silent(reports=False):
            model = auto_class.from_config(config)
    except AssertionError as reason:  # raised by torch and transformers for sizes that don't fit together
        raise ValueError(f"recipe {recipe.name!r} has a model that can't be: {reason}") from None
    key = next((key for key in ("is_decoder", "causal") if hasattr(model.config, key)), None)
    attends_ahead = config.model_type in ENCODERS and key and not getattr(model.config, key)
    if recipe.training.objective == "causal" and attends_ahead:
        raise ValueError(
            f"a {config.model_type} attends to the tokens after a position, which it would have to predict; write objective: "
            f"masked in the train section of recipe {recipe.name!r}, or {key}: true in the model's configuration"
        )
    return model
