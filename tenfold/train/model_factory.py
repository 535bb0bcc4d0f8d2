"""A model to train: of a recipe's configuration, with random weights, folded from noise where it says so, or a trained one."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from tenfold.models.auto import read_config
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.loading import from_pretrained, short_class_errors, silent
from tenfold.models.plan import make_plan
from tenfold.models.quantization_config import get_tenfold_config
from tenfold.models.recipe import Recipe
from tenfold.models.surgery import replace
from tenfold.models.text_mode import MASKED, positions_of
from tenfold.train.recipe_checks import check_known

KINDS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
ENCODERS = {*MASKED, "bert-generation"}
NAMED = ("pad_token_id", "mask_token_id", "cls_token_id", "sep_token_id")


def new_model(recipe: Recipe, tokenizer):
    """The recipe's model with random weights, folded from noise where the recipe says so; or the one that it goes on with.

    Raises:
        ValueError: it can't be.
    """
    if recipe.origin:
        return from_pretrained(recipe.origin, KINDS[recipe.train.objective], whole=True, dtype=torch.float32)
    model = _model(recipe, _configuration(recipe, **_of_the_tokenizer(recipe, tokenizer)))
    _check_positions(recipe, length_of(recipe), model)  # which RoBERTa counts from behind the tokenizer's padding
    if recipe.replace:
        plan = make_plan(model, recipe)
        replace(model, plan, source="noise")
    return model


def outline(recipe: Recipe, tokenizer):
    """The recipe's model before it is folded, without numbers."""
    with torch.device("meta"):
        return _model(recipe, _configuration(recipe, **_of_the_tokenizer(recipe, tokenizer)))


def _of_the_tokenizer(recipe: Recipe, tokenizer) -> dict[str, int | None]:
    """What the configuration of a new model has from its tokenizer; a trained one has its own."""
    if recipe.origin:
        return {}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return {"vocab_size": len(tokenizer)} | ends | _named(recipe, tokenizer)


def vocabulary_of(recipe: Recipe, tokenizer) -> int:
    """How many tokens the recipe's model knows: the tokenizer's, or of a trained model perhaps more.

    Raises:
        ValueError: fewer.
    """
    if not recipe.origin:
        return len(tokenizer)
    size = read_config(recipe.origin).get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"{recipe.origin} knows {size:,} tokens, and the tokenizer has {len(tokenizer):,}: take the model's own, or "
            "give the model more first (resize_token_embeddings)"
        )
    return size


def pad_as(recipe: Recipe, tokenizer) -> None:
    """Let the tokenizer pad with what the recipe's model section says, if it does: Trainer saves the tokenizer's in the model.

    Raises:
        ValueError: there is no such token.
    """
    for key, number in (recipe.model or {}).items():
        if key.endswith("_token_id") and isinstance(number, int) and not 0 <= number < len(tokenizer):
            raise ValueError(
                f"recipe {recipe.name!r} has {key} {number} in its model section, but its tokenizer has the tokens 0 to "
                f"{len(tokenizer) - 1}; leave that out"
            )
    if isinstance(number := recipe.model.get("pad_token_id"), int):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)


def _named(recipe: Recipe, tokenizer) -> dict[str, int | None]:
    """The tokens that the configuration names, as the tokenizer numbers them: its own are those of another vocabulary.

    What the tokenizer has no token for is the end of a text where the model can't do without.
    """
    known = _configuration(recipe)
    keys = [key for key in NAMED if hasattr(known, key) and key not in recipe.model]
    numbers = {key: getattr(tokenizer, key) for key in keys}
    lacking = [key for key in keys if numbers[key] is None and not _can_be(recipe, **{key: None})]
    return numbers | dict.fromkeys(lacking, tokenizer.eos_token_id)


def _can_be(recipe: Recipe, **more) -> bool:
    """Whether the configuration takes ``more``, and the model runs with it."""
    try:
        with torch.device("meta"):
            AutoModel.from_config(_configuration(recipe, **more))(input_ids=torch.ones(1, 2, dtype=torch.long))
    except (TypeError, ValueError):  # RoBERTa counts its positions from that of padding
        return False
    except RuntimeError:  # not all models run without numbers; this one was made
        return True
    return True


def _model(recipe: Recipe, config):
    """A model of the recipe's kind.

    Raises:
        ValueError: transformers has none, or it would see the tokens that it is to predict.
    """
    kind = KINDS[recipe.train.objective]
    try:
        with short_class_errors(kind), silent(reports=False):
            model = kind.from_config(config)
    except AssertionError as reason:  # torch's and transformers' own of numbers that don't fit together
        raise ValueError(f"recipe {recipe.name!r} has a model that can't be: {reason}") from None
    key = next((key for key in ("is_decoder", "causal") if hasattr(model.config, key)), None)
    sees = (
        config.model_type in ENCODERS and key and not getattr(model.config, key)
    )  # GPT-NeoX is causal whatever it says
    if recipe.train.objective == "causal" and sees:
        raise ValueError(
            f"a {config.model_type} sees the tokens behind a position, which it would have to predict; write objective: masked "
            f"in the train section of recipe {recipe.name!r}, or {key}: true into the model's configuration"
        )
    return model


def _configuration(recipe: Recipe, **more):
    if recipe.origin:
        config = read_config(recipe.origin)
        check_plain(config, recipe.origin)
        if recipe.train.fold and get_tenfold_config(config):
            raise ValueError(f"{recipe.origin} is folded already, so that train.fold has nothing to do; leave it out")
        return config
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
    with torch.device("meta"):
        model = _model(recipe, _configuration(recipe))
    length = recipe.train.window or positions_of(model)
    if length is None:
        raise ValueError(f"recipe {recipe.name!r} does not say how long a window is; give train: a window")
    _check_positions(recipe, length, model)
    return length


def _check_positions(recipe: Recipe, length: int, model) -> None:
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"window {length} of recipe {recipe.name!r} is longer than the {positions} positions of its model; give a shorter "
            "one, or the model more positions"
        )
