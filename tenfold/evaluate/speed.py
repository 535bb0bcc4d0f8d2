"""Tokens per second and memory of a folded model and of its dense twin, in turns in one run, beside the floor of the machine."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tenfold.evaluate.machine import bytes_per_second, flops_per_second, footprint, peak, stored, turns
from tenfold.models.cost import site_flops
from tenfold.models.reading import context_of
from tenfold.models.replace import densify
from tenfold.models.sites import find_sites, is_tied, module_at


def bench(
    model,
    batch: int = 1,
    length: int | None = None,
    new_tokens: int = 16,
    repeats: int = 5,
    against=None,
    training: bool = False,
    compiled: bool = False,
) -> dict[str, Any]:
    """Reading a prompt, writing tokens and, if asked for, a step of training, for ``model`` and another one, turn by turn.

    Args:
        batch: sequences at once.
        length: tokens of the prompt; the model's context less ``new_tokens``, 512 at most, unless given.
        new_tokens: tokens written one at a time with a cache.
        repeats: counted turns; one more warms up.
        against: the other model; the dense twin unless given.
        training: also forward, backward and AdamW on the prompts, of copies.
        compiled: both under torch.compile, decoding with a static cache; layers keep no matrix then.

    Returns:
        For ``prefill``, ``decode`` and ``training``: ``tokens_per_second``, ``dense_tokens_per_second`` (medians) and ``ratio``,
        the median of the ratios turn by turn, which noise of the machine touches least; ``most_tokens_per_second``: no more are
        possible for the FLOPs of the cheapest plans at the rate of a large matrix product, or for the bytes of the matrices at
        the rate of a large copy (attention itself is left out); ``bytes`` and ``dense_bytes``: the model and the most that one
        call holds beside it, after the first. ``kept``: how many layers multiply by a kept matrix at some numbers of rows, and
        are dense layers then.
    """
    model.eval()
    twin = (densify(copy.deepcopy(model)) if against is None else against).eval()
    longest = min(context_of(one) for one in (model, twin))
    length = length or min(longest - new_tokens, 512)
    device = next(model.parameters()).device
    words = min(one.get_input_embeddings().weight.shape[0] for one in (model, twin))
    ids = torch.randint(0, words, (batch, length), device=device)
    result = {
        "rows": {"prefill": batch * length, "decode": batch},
        "device": str(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "kept": 0 if compiled else sum(bool(getattr(layer, "keeps", None)) for layer in model.modules()),
        "compiled": compiled,
    }
    with torch.no_grad(), traced((model, twin) if compiled else ()):
        for name, run in (("prefill", _prefill), ("decode", _static if compiled else _decode)):
            calls = [lambda one=one, run=run: run(one, ids, new_tokens) for one in (model, twin)]
            tokens = batch * (length if name == "prefill" else new_tokens)
            result[name] = _measured(calls, (model, twin), result["rows"][name], tokens, repeats)
    if training:
        copies = [copy.deepcopy(one).train() for one in (model, twin)]
        result["rows"]["training"] = batch * length
        tokens = batch * length
        with traced(copies if compiled else ()):
            result["training"] = _measured([_step(one, ids) for one in copies], copies, tokens, tokens, repeats)
    return result


@contextmanager
def traced(models: Sequence[Any]) -> Iterator[None]:
    """``models`` under torch.compile meanwhile."""
    for one in models:
        one.forward = torch.compile(one.forward)  # hides the method of the class
    try:
        with torch._dynamo.config.patch(recompile_limit=64):  # of all models together: they share their code
            yield
    finally:
        for one in models:
            del one.forward


def _measured(calls: list[Callable], models, rows: int, tokens: int, repeats: int) -> dict[str, float]:
    device = next(models[0].parameters()).device
    pairs = turns(*calls, device, repeats)
    least = floor(models[0], rows) * (3 if models[0].training else 1)
    held = [peak(call, device) + footprint(one) for call, one in zip(calls, models, strict=True)]
    return {
        "tokens_per_second": tokens / statistics.median(ours for ours, _ in pairs),
        "dense_tokens_per_second": tokens / statistics.median(dense for _, dense in pairs),
        "ratio": statistics.median(dense / ours for ours, dense in pairs),
        "most_tokens_per_second": rows / least,
        "bytes": held[0],
        "dense_bytes": held[1],
    }


def floor(model, rows: int) -> float:
    """Seconds that one call with ``rows`` tokens takes at least."""
    like = next(model.parameters())
    modules = [(site, module_at(model, site.path)) for site in find_sites(model)]
    flops = sum(site_flops(site, module, rows) for site, module in modules)
    read = [m for site, m in modules if m is not None and (site.role != "embed" or is_tied(model))]
    held = sum({id(p): stored(p) for module in read for p in module.parameters()}.values())
    return max(flops / flops_per_second(like.device, like.dtype), held / bytes_per_second(like.device))


def _prefill(model, ids, new_tokens: int) -> None:
    model(input_ids=ids, use_cache=False)


def _decode(model, ids, new_tokens: int, **more: Any) -> None:
    prompt = ids[:, :8]
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        pad_token_id=0, **more,
    )  # fmt: skip


def _static(model, ids, new_tokens: int) -> None:
    _decode(model, ids, new_tokens, cache_implementation="static")


def _step(model, ids) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
