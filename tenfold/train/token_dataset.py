"""The tokens that a run is trained on, by the tokenizer that its recipe names, trains or takes from its model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tenfold.evaluation.text_files import documents
from tenfold.models.auto import load_tokenizer
from tenfold.models.recipe import Recipe
from tenfold.train.model_factory import vocabulary_size, window_length
from tenfold.train.tokenizer import END, train_tokenizer
from tenfold.train.tokens import Tokens, is_tokens, tokenizer_fingerprint, write_tokens

MASK = "<|mask|>"


def load_tokens(folder: Path, data: Sequence[str | Path], recipe: Any) -> tuple[Tokens, Any]:
    """Return the tokens of a run, written to ``folder`` first if ``data`` is text, and their tokenizer."""
    place, limit, given = folder / "tokens", recipe.training.tokens, [path for path in data if is_tokens(path)]
    if given:
        if len(data) > 1:
            raise ValueError(f"{given[0]} is a folder of tokens, which has to be all of a run's data; give it alone")
        tokenizer = Tokens(Path(given[0])).tokenizer()
        _check_tokens(f"{given[0]} holds tokens", tokenizer, recipe)
    elif is_tokens(place):  # a run that resumes does not need the tokenizer that its recipe names
        tokenizer = Tokens(place).tokenizer()
    else:
        tokenizer = _find_tokenizer(recipe)[0] or _train(data, recipe)
    vocabulary_size(recipe, tokenizer)
    if recipe.training.objective == "masked" and tokenizer.mask_token is None:
        source, way_out = ("the tokenizer of the tokens", "give text") if given else ("the tokenizer", "name another")
        raise ValueError(f"{source} has no mask token, which the objective masked needs; {way_out}")
    tokens = Tokens(Path(given[0]), limit) if given else write_tokens(place, data, tokenizer, limit)
    tokenizer = tokens.tokenizer()
    _set_padding(recipe, tokenizer)
    return tokens, tokenizer


def _check_tokens(problem: str, tokenizer, recipe: Recipe) -> None:
    expected, source = _find_tokenizer(recipe)
    if expected and tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(expected):
        way_out = "give text" if source == recipe.origin else "leave the recipe's section out, or give text"
        raise ValueError(f"{problem} of another tokenizer than {source}; {way_out}")
    size = recipe.tokenizer and recipe.tokenizer.vocab_size
    if size and size != len(tokenizer):
        raise ValueError(
            f"{problem} of a vocabulary of {len(tokenizer)}, but recipe {recipe.name!r} wants {size}; leave the recipe's "
            "tokenizer section out, or give text"
        )


def _find_tokenizer(recipe: Recipe) -> tuple[Any, str | None]:
    """Return the tokenizer that the recipe names, or its model's own, and where it is from; None if there is neither."""
    name = recipe.tokenizer and recipe.tokenizer.name
    named = name and load_tokenizer(name)
    if name and named is None:
        raise ValueError(
            f"there is no tokenizer {name}; name a folder that has one, or one on a hub that can be reached from here"
        )
    own = recipe.origin and load_tokenizer(recipe.origin)  # some models have none
    if named and own and tokenizer_fingerprint(named) != tokenizer_fingerprint(own):
        raise ValueError(f"{recipe.origin} has another tokenizer than {name}; leave the recipe's tokenizer section out")
    return (named, name) if named else (own, recipe.origin)


def _train(data: Sequence[str | Path], recipe: Any):
    settings = recipe.tokenizer
    if settings is None:
        missing = "no tokenizer section" if recipe.origin is None else f"a model without a tokenizer, {recipe.origin}"
        raise ValueError(f"recipe {recipe.name!r} has {missing}, and the data is text; name a tokenizer there")
    masked = recipe.training.objective == "masked"
    sample = islice(documents(data), settings.documents)
    tokenizer = train_tokenizer(sample, settings.vocab_size - masked, window_length(recipe))
    if masked:
        tokenizer.add_special_tokens({"mask_token": MASK, "pad_token": END})
    return tokenizer


def _set_padding(recipe: Any, tokenizer) -> None:
    """Set the padding token of the recipe's model section, as Trainer saves the tokenizer's in the model."""
    for key, number in recipe.model.items():
        if key.endswith("_token_id") and isinstance(number, int) and not 0 <= number < len(tokenizer):
            raise ValueError(
                f"recipe {recipe.name!r} has {key} {number} in its model section, but its tokenizer has the tokens 0 to "
                f"{len(tokenizer) - 1}; leave that out"
            )
    if isinstance(number := recipe.model.get("pad_token_id"), int):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)
