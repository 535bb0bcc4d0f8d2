"""What a run is trained on: its text as numbers, by the tokenizer that its recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tenfold.evaluate.text import documents
from tenfold.models.named import load_tokenizer
from tenfold.models.recipe import Recipe
from tenfold.train.scratch import length_of
from tenfold.train.tokenizer import END, train_tokenizer
from tenfold.train.tokens import Tokens, fingerprint, is_tokens, write_tokens

MASK = "<|mask|>"


def tokens_of(folder: Path, data: Sequence[str | Path], recipe: Recipe) -> Tokens:
    """The data as numbers: written once, or another run's."""
    limit, made = recipe.train.tokens, [path for path in data if is_tokens(path)]
    if not made:
        place = folder / "tokens"
        known = Tokens(place).tokenizer() if is_tokens(place) else _tokenizer(data, recipe, length_of(recipe))
        return write_tokens(place, data, known, limit)
    if len(data) > 1:
        raise ValueError(f"{made[0]} is a folder of tokens, which is the whole of a run's data; give it alone")
    tokens, section = Tokens(Path(data[0]), limit), recipe.tokenizer
    named = section and section.name
    known = _named(named) if named else recipe.origin and load_tokenizer(recipe.origin)  # not all models bring one
    if known and fingerprint(known) != tokens.about["tokenizer"]:
        way_out = "leave the recipe's section out, or give text" if named else "give text"
        raise ValueError(f"{data[0]} holds tokens of another tokenizer than {named or recipe.origin}; {way_out}")
    size = len(tokens.tokenizer())
    wanted = section and section.vocab_size
    if wanted and wanted != size:
        raise ValueError(
            f"{data[0]} holds tokens of a vocabulary of {size}, but recipe {recipe.name!r} wants {wanted}; leave the recipe's "
            "tokenizer section out, or give text"
        )
    return tokens


def _tokenizer(data: Sequence[str | Path], recipe: Recipe, length: int):
    wanted = recipe.tokenizer
    named = wanted.name if wanted else recipe.origin
    if named is not None:
        tokenizer = _named(named)
    elif wanted is None:
        raise ValueError(
            f"recipe {recipe.name!r} has no tokenizer section, and the data is text; name a tokenizer there"
        )
    else:
        sample = islice(documents(data), wanted.documents)
        masked = recipe.train.objective == "masked"
        tokenizer = train_tokenizer(sample, wanted.vocab_size - masked, length)
        if masked:
            tokenizer.add_special_tokens({"mask_token": MASK, "pad_token": END})
    if recipe.train.objective == "masked" and tokenizer.mask_token is None:
        raise ValueError(f"tokenizer {named} has no mask token, which the objective masked needs; name another")
    return tokenizer


def _named(name: str):
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        raise ValueError(
            f"there is no tokenizer {name}; name a folder that has one, or one on a hub that can be reached from here"
        )
    return tokenizer
