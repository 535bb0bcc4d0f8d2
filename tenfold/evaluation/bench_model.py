"""Tokens per second and memory of a compressed model and its dense twin, measured in turns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenfold.evaluation.timing import check_counts, compare, module_bytes
from tenfold.models.densify import densify
from tenfold.models.text_mode import context_of, positions_of
from tenfold.nn.dense_cache import dense_cache

PROMPT = 8  # tokens at most in front of generated ones


def bench(
    model: Any,
    batch_size: int = 1,
    length: int | None = None,
    new_tokens: int | None = None,
    repeats: int = 5,
    against: Any = None,
    training: bool = False,
    compiled: bool = False,
    cache: bool = True,
) -> dict[str, Any]:
    """Measure a prompt's forward pass, generation and optionally a training step of ``model`` and another one, in turns.

    If one of them is an encoder or a classifier, nothing is generated.

    Args:
        batch_size: sequences in a batch.
        length: tokens of the prompt; the model's context less ``new_tokens``, 512 at most, unless given.
        new_tokens: tokens generated one at a time with a cache; 16 unless given.
        repeats: measured turns, after one that warms up.
        against: the other model; the dense twin unless given.
        training: also measure forward, backward and AdamW on the prompts, on copies.
        compiled: use torch.compile for both, with a static cache for generation; layers then cache no dense matrix.
        cache: let layers cache their dense matrix (``tenfold.nn.dense_cache.dense_cache``) for prompts and generation.

    Returns:
        For ``prefill``, ``decode`` and ``training``: ``tokens_per_second``, ``dense_tokens_per_second`` (medians), ``ratio``,
        the median of the ratios of the turns, which noise affects least, and ``bytes`` and ``dense_bytes``: the model and the
        peak of a call. ``cached``: how many layers multiply by a cached matrix at some numbers of rows.

    Raises:
        ValueError: a number is below 1 or exceeds a model's positions, or a model can't be measured like this.
    """
    check_counts(batch_size=batch_size, length=length, new_tokens=new_tokens, repeats=repeats)
    length, new_tokens = _check_sizes([model] if against is None else [model, against], length, new_tokens)
    model.eval()
    twin: Any = (densify(copy.deepcopy(model)) if against is None else against).eval()
    device = next(model.parameters()).device
    vocabulary = min(one.get_input_embeddings().weight.shape[0] for one in (model, twin))
    ids = torch.randint(0, vocabulary, (batch_size, length), device=device)
    limit = None if cache and not compiled else 0
    result: dict[str, Any] = {
        "rows": {},
        "device": str(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "compiled": compiled,
    }

    def measure(name: str, make_call: Callable[[Any], Callable], models: Sequence[Any], rows: int, tokens: int) -> None:
        found = compare(make_call(models[0]), make_call(models[1]), device, repeats)
        result["rows"][name] = rows
        result[name] = {
            "tokens_per_second": tokens / found["seconds"],
            "dense_tokens_per_second": tokens / found["dense_seconds"],
            "ratio": found["ratio"],
            "bytes": found["bytes"] + module_bytes(models[0]),
            "dense_bytes": found["dense_bytes"] + module_bytes(models[1]),
        }

    both, prompts = (model, twin), ids.numel()
    with (
        torch.no_grad(),
        compile_forward(both if compiled else ()),
        dense_cache(model, limit),
        dense_cache(twin, limit),
    ):
        result["cached"] = sum(bool(getattr(one, "cached_rows", None)) for one in model.modules())
        measure("prefill", lambda one: partial(one, input_ids=ids, use_cache=False), both, prompts, prompts)
        if new_tokens:
            decode = partial(_make_decode, ids=ids, new_tokens=new_tokens, static=compiled)
            measure("decode", decode, both, batch_size, batch_size * new_tokens)
    if training:
        copies = [copy.deepcopy(one).train() for one in both]
        with compile_forward(copies if compiled else ()):
            measure("training", partial(_make_step, ids=ids), copies, prompts, prompts)
    return result


def _check_sizes(models: Sequence[Any], length: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Return the tokens of a prompt, and of those generated, 0 unless all models generate; raise as ``bench``."""
    for one in models:
        if one.config.is_encoder_decoder:
            raise ValueError(
                f"a {type(one).__name__} reads one text and writes another; bench is for models that read one text, but times "
                "the layers of any (--layers)"
            )
        if new_tokens is not None and not one.can_generate():
            raise ValueError(f"a {type(one).__name__} writes no text; leave the {new_tokens} new tokens out")
    written = (new_tokens or 16) if all(one.can_generate() for one in models) else 0
    if length is None:
        length = max(1, min(min(map(context_of, models)) - written, 512))
    longest = min((known for one in models if (known := positions_of(one)) is not None), default=math.inf)
    needed = max(length, min(length, PROMPT) + written)
    if needed > longest:
        raise ValueError(
            f"length {length} and {written} new tokens need {needed} positions, and the model has {longest}; give smaller ones"
        )
    return length, written


@contextmanager
def compile_forward(models: Sequence[Any]) -> Iterator[None]:
    """Use torch.compile for the forward of ``models`` within the context."""
    for one in models:
        one.forward = torch.compile(one.forward)  # hides the method of the class
    try:
        with torch._dynamo.config.patch(recompile_limit=64):  # of all models together, which share their code
            yield
    finally:
        for one in models:
            del one.forward


def _make_decode(model, ids: Tensor, new_tokens: int, static: bool) -> Callable[[], Tensor]:
    prompt = ids[:, :PROMPT]
    return partial(
        model.generate,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **({"cache_implementation": "static"} if static else {}),
    )


def _make_step(model, ids) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        _loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss(model, ids) -> torch.Tensor:
    if model.can_generate():
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    outputs = model(input_ids=ids, use_cache=False)[0].flatten(0, -2)  # one row per token, or per sequence
    return cross_entropy(outputs, outputs.new_zeros(len(outputs), dtype=torch.long))
