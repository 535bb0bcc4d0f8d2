"""Tokens per second and memory of a compressed model and its dense twin, measured in turns, and an upper bound of the machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tenfold.evaluation.timing import (
    bytes_per_second,
    check_counts,
    flops_per_second,
    module_bytes,
    peak_memory,
    stored_bytes,
    summarize_turns,
    time_in_turns,
)
from tenfold.models.cost import site_flops
from tenfold.models.densify import densify
from tenfold.models.sites import find_sites, is_tied, module_at
from tenfold.models.text_mode import context_of, positions_of
from tenfold.nn.dense_cache import dense_cache
from tenfold.structure.matmul import bucket

PROMPT = 8  # tokens at most in front of generated ones


def bench(
    model,
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
        For ``prefill``, ``decode`` and ``training``: ``tokens_per_second``, ``dense_tokens_per_second`` (medians) and ``ratio``,
        the median of the ratios of the turns, which noise affects least; ``most_tokens_per_second``, an upper bound: for the
        FLOPs of the cheapest plans at the rate of a large matrix product, or for the bytes of the matrices at the rate of a
        large copy (attention itself is left out); ``bytes`` and ``dense_bytes``: the model and the peak of a call, after the
        first. ``cached``: how many layers multiply by a cached matrix at some numbers of rows, and are dense layers then;
        ``cached_at``: how many at those of ``prefill`` and ``decode``, if they see all rows of a call.

    Raises:
        ValueError: a number is below 1 or exceeds a model's positions, or a model can't be measured like this.
    """
    check_counts(batch_size=batch_size, length=length, new_tokens=new_tokens, repeats=repeats)
    length, new_tokens = sizes([model] if against is None else [model, against], length, new_tokens)
    model.eval()
    twin = (densify(copy.deepcopy(model)) if against is None else against).eval()
    device = next(model.parameters()).device
    vocabulary = min(one.get_input_embeddings().weight.shape[0] for one in (model, twin))
    ids = torch.randint(0, vocabulary, (batch_size, length), device=device)
    runs = {"prefill": _prefill} | ({"decode": partial(_decode, static=compiled)} if new_tokens else {})
    rows = {"prefill": batch_size * length, "decode": batch_size}
    result = {
        "rows": {name: rows[name] for name in runs},
        "device": str(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "compiled": compiled,
    }
    limit = None if cache and not compiled else 0
    with (
        torch.no_grad(),
        compile_forward((model, twin) if compiled else ()),
        dense_cache(model, limit),
        dense_cache(twin, limit),
    ):
        cached = [one.cached_rows for one in model.modules() if getattr(one, "cached_rows", None)]
        result["cached"] = len(cached)
        result["cached_at"] = {name: sum(bucket(rows[name]) in one for one in cached) for name in runs}
        for name, run in runs.items():
            calls = [lambda one=one, run=run: run(one, ids, new_tokens) for one in (model, twin)]
            tokens = batch_size * (length if name == "prefill" else new_tokens)
            result[name] = _measure(calls, (model, twin), result["rows"][name], tokens, repeats)
    if training:
        copies = [copy.deepcopy(one).train() for one in (model, twin)]
        result["rows"]["training"] = batch_size * length
        tokens = batch_size * length
        with compile_forward(copies if compiled else ()):
            result["training"] = _measure([_make_step(one, ids) for one in copies], copies, tokens, tokens, repeats)
    return result


def sizes(models: Sequence[Any], length: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Return the tokens of a prompt, and of those generated, 0 unless all models generate.

    Raises:
        ValueError: a model can't be measured, or has fewer positions.
    """
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
    longest = min((known for one in models if (known := positions_of(one)) is not None), default=None)
    if longest is not None and length > longest:
        raise ValueError(f"a prompt of length {length} is more than the model's {longest} positions; shorten it")
    if longest is not None and min(length, PROMPT) + written > longest:
        raise ValueError(
            f"{written} new tokens behind a prompt of {min(length, PROMPT)} are more than the model's {longest} positions; "
            "write fewer"
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


def _measure(calls: list[Callable], models, rows: int, tokens: int, repeats: int) -> dict[str, float]:
    device = next(models[0].parameters()).device
    seconds, dense_seconds, ratio = summarize_turns(time_in_turns(*calls, device, repeats))
    least = floor(models[0], rows) * (3 if models[0].training else 1)
    peaks = [peak_memory(call, device) + module_bytes(one) for call, one in zip(calls, models, strict=True)]
    return {
        "tokens_per_second": tokens / seconds,
        "dense_tokens_per_second": tokens / dense_seconds,
        "ratio": ratio,
        "most_tokens_per_second": rows / least,
        "bytes": peaks[0],
        "dense_bytes": peaks[1],
    }


def floor(model, rows: int) -> float:
    """Return the least seconds of a call with ``rows`` tokens."""
    like = next(model.parameters())
    modules = [(site, module_at(model, site.path)) for site in find_sites(model)]
    flops = sum(site_flops(site, module, rows) for site, module in modules)
    read = [m for site, m in modules if m is not None and (site.role != "embed" or is_tied(model))]
    size = sum({id(p): stored_bytes(p) for module in read for p in module.parameters()}.values())
    return max(flops / flops_per_second(like.device, like.dtype), size / bytes_per_second(like.device))


def _prefill(model, ids, new_tokens: int) -> None:
    model(input_ids=ids, use_cache=False)


def _decode(model, ids, new_tokens: int, static: bool) -> None:
    prompt = ids[:, :PROMPT]
    model.generate(
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
