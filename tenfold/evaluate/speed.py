"""Tokens per second of a folded model and of its dense twin, measured in turn in one run."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch

from tenfold.evaluate.machine import turns
from tenfold.models.reading import context_of
from tenfold.models.replace import densify


@torch.no_grad()
def bench(model, batch: int = 1, length: int | None = None, new_tokens: int = 16, repeats: int = 5) -> dict[str, Any]:
    """Reading a prompt and writing tokens, for ``model`` and for its dense twin, turn by turn.

    Args:
        batch: sequences at once.
        length: tokens of the prompt; the model's context less ``new_tokens``, 512 at most, unless given.
        new_tokens: tokens written one at a time with a cache.
        repeats: counted turns; one more warms up.

    Returns:
        For ``prefill`` and ``decode``: ``tokens_per_second``, ``dense_tokens_per_second`` (medians) and ``ratio``, the
        median of the ratios turn by turn, which noise of the machine touches least; ``kept``: how many layers multiply by a
        kept matrix at some numbers of rows, and are dense layers then.
    """
    model.eval()
    twin = densify(copy.deepcopy(model)).eval()
    longest = context_of(model)
    length = length or min(longest - new_tokens, 512)
    device = next(model.parameters()).device
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (batch, length), device=device)
    measured = {"prefill": (_prefill, batch * length), "decode": (_decode, batch * new_tokens)}
    return {
        "rows": {"prefill": batch * length, "decode": batch},
        "device": str(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "kept": sum(bool(getattr(layer, "keeps", None)) for layer in model.modules()),
        **{
            name: _ratio(run, model, twin, ids, new_tokens, tokens, repeats) for name, (run, tokens) in measured.items()
        },
    }


def _ratio(run: Callable, model, twin, ids, new_tokens: int, tokens: int, repeats: int) -> dict[str, float]:
    pairs = turns(lambda: run(model, ids, new_tokens), lambda: run(twin, ids, new_tokens), ids.device, repeats)
    return {
        "tokens_per_second": tokens / statistics.median(ours for ours, _ in pairs),
        "dense_tokens_per_second": tokens / statistics.median(dense for _, dense in pairs),
        "ratio": statistics.median(dense / ours for ours, dense in pairs),
    }


def _prefill(model, ids, new_tokens: int) -> None:
    model(input_ids=ids, use_cache=False)


def _decode(model, ids, new_tokens: int) -> None:
    prompt = ids[:, :8]
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
