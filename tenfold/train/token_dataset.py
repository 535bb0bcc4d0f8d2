"""What a run is trained on: its text as numbers, by the tokenizer that its recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tenfold.evaluate.text_files import documents
from tenfold.models.auto import load_tokenizer
from tenfold.models.recipe import Recipe
from tenfold.train.model_factory import length_of, vocabulary_of
from tenfold.train.tokenizer import END, train_tokenizer
from tenfold.train.tokens import Tokens, alike, is_tokens, write_tokens

MASK = "<|mask|>"


def tokens_of(folder: Path, data: Sequence[str | Path], recipe: Recipe) -> Tokens:
    """The data as numbers: written once, or another run's.

    Raises:
        ValueError: the tokens are not those of the recipe or of its model, there is no tokenizer, or there is no text.
    """
    limit, made = recipe.train.tokens, [path for path in data if is_tokens(path)]
    place = folder / "tokens"
    here = not made and is_tokens(place)  # a run that goes on needs no other tokenizer
    said, whose = (Tokens(place).tokenizer(), str(place)) if here else _said(recipe)
    if not made:
        known = said or _new(data, recipe)
        vocabulary_of(recipe, known)
        if recipe.train.objective == "masked" and known.mask_token is None:
            raise ValueError(f"tokenizer {whose} has no mask token, which the objective masked needs; name another")
        return write_tokens(place, data, known, limit)
    if len(data) > 1:
        raise ValueError(f"{made[0]} is a folder of tokens, which is the whole of a run's data; give it alone")
    tokens = Tokens(Path(data[0]), limit)
    found = tokens.tokenizer()
    if said and not alike(found, said):
        way_out = "give text" if whose == recipe.origin else "leave the recipe's section out, or give text"
        raise ValueError(f"{data[0]} holds tokens of another tokenizer than {whose}; {way_out}")
    wanted = recipe.tokenizer and recipe.tokenizer.vocab_size
    if wanted and wanted != len(found):
        raise ValueError(
            f"{data[0]} holds tokens of a vocabulary of {len(found)}, but recipe {recipe.name!r} wants {wanted}; leave the "
            "recipe's tokenizer section out, or give text"
        )
    vocabulary_of(recipe, found)
    return tokens


def _said(recipe: Recipe) -> tuple[Any, str | None]:
    """The tokenizer that the recipe names, or its model's own, and whose it is; None where neither is."""
    named = recipe.tokenizer and recipe.tokenizer.name
    said = named and _named(named)
    own = recipe.origin and load_tokenizer(recipe.origin)  # not all models bring one
    if said and own and not alike(said, own):
        raise ValueError(
            f"{recipe.origin} has another tokenizer than {named}; leave the recipe's tokenizer section out"
        )
    return (said, named) if said else (own, recipe.origin)


def _new(data: Sequence[str | Path], recipe: Recipe):
    wanted = recipe.tokenizer
    if wanted is None:
        missing = "no tokenizer section" if recipe.origin is None else f"a model without a tokenizer, {recipe.origin}"
        raise ValueError(f"recipe {recipe.name!r} has {missing}, and the data is text; name a tokenizer there")
    masked = recipe.train.objective == "masked"
    sample = islice(documents(data), wanted.documents)
    tokenizer = train_tokenizer(sample, wanted.vocab_size - masked, length_of(recipe))
    if masked:
        tokenizer.add_special_tokens({"mask_token": MASK, "pad_token": END})
    return tokenizer


def _named(name: str):
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        raise ValueError(
            f"there is no tokenizer {name}; name a folder that has one, or one on a hub that can be reached from here"
        )
    return tokenizer
