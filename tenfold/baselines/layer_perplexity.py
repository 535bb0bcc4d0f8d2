"""Depth by perplexity: the block goes whose removal raises the perplexity least, then the next one of those that are left.

With the blocks ``b_1 ... b_n`` that are left, block ``i`` costs the cross entropy of the text by the model of ``b_1 ... b_{i-1},
b_{i+1} ... b_n``. One pass through all blocks leaves the states in front of each, so that a candidate runs from there on:
``n^2 / 2`` passes through a block a round instead of ``n^2``, and the head ``n`` times. The states are those of one batch.

Reference: SLEB, arXiv 2402.09025.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.baselines.drop_layers import drop_one_by_one, list_of_blocks, to_drop
from tenfold.compress.activations import Streams, passing, without_cache
from tenfold.compress.blockwise import enough, part_of
from tenfold.compress.calibration import Calibration
from tenfold.models.config import Calibrate
from tenfold.models.distributed import all_reduce_number, shard_items
from tenfold.models.recipe import Recipe
from tenfold.models.text_mode import is_causal_lm


def drop_layers_by_perplexity(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Take the blocks out of ``model``, in place, one at a time, without which the perplexity is least.

    The text is the part of the calibration text that ``calibrate: {survey: ...}`` says, in tokens.

    Returns:
        ``dropped``: the paths of the blocks in the order in which they went; ``losses``: for every round ``{path: nats a token
        without this block}``.

    Raises:
        ValueError: the model is no causal language model, a loss is no number, or as :func:`to_drop`.
    """
    if not is_causal_lm(model) or model.get_output_embeddings() is None:
        raise ValueError(
            f"a {type(model).__name__} has no perplexity; take a causal language model, or drop-layers, which needs none"
        )
    paths = list_of_blocks(model)
    excess = to_drop(model, recipe, paths)
    was, rounds = model.training, list[dict[str, float]]()
    settings = recipe.calibrate or Calibrate()
    samples = shard_items(part_of(enough(text.batches), settings.survey))
    streams = Streams(model.eval(), paths, samples, skip=settings.skip_first, precision=settings.precision)

    def choose(left: list[str]) -> str:
        numbers = losses_without_each(streams, [paths.index(path) for path in left])
        rounds.append({paths[number]: loss for number, loss in numbers.items()})
        return min(left, key=rounds[-1].__getitem__)

    dropped = drop_one_by_one(model, paths, excess, choose)
    model.train(was)
    return {"losses": rounds, "dropped": dropped}


@torch.no_grad()
def losses_without_each(streams: Streams, left: list[int]) -> dict[int, float]:
    """Return ``{number of a block: nats a token}`` of the model that has the blocks ``left`` but this one.

    Args:
        streams: in front of the first block.
        left: numbers of blocks, in the order in which they run.

    Raises:
        ValueError: a loss is no number.
    """
    sums, tokens = dict.fromkeys(left, 0.0), 0
    for k in range(len(streams.batches)):
        counted, before = _counted(streams, k), [streams.states(k)[0]]
        tokens += int(counted.sum())
        with streams.autocast():
            for number in left[:-1]:
                before.append(streams.run(number, streams.blocks[number], before[-1], k))
            for place, without in enumerate(left):
                states = before[place]
                for number in left[place + 1 :]:
                    states = streams.run(number, streams.blocks[number], states, k)
                sums[without] += _loss(streams, k, states, counted)
    tokens = max(1.0, all_reduce_number(tokens))
    losses = {number: all_reduce_number(value) / tokens for number, value in sums.items()}
    for number, loss in losses.items():
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss without block {number} is NaN or Inf; mend its weights, or try --dtype float32 or other text"
            )
    return losses


def _counted(streams: Streams, batch: int) -> Tensor:
    """Which tokens are predicted and count ``(samples, tokens - 1)``."""
    mask = streams.batches[batch]["attention_mask"].bool()
    return (streams.kept[batch].view_as(mask) & mask)[:, 1:] & mask[:, :-1]


def _loss(streams: Streams, batch: int, states: Tensor, counted: Tensor) -> float:
    """The sum of the cross entropies of the tokens that count, ``states`` being what the last block returns."""
    given = {name: value.to(streams.device) for name, value in streams.batches[batch].items()}
    with passing(streams.blocks, streams.form, states):
        logits = streams.model(**given, **without_cache(streams.model)).logits
    counted = counted.to(streams.device)
    near = logits[:, :-1][counted].float()
    return float(torch.nn.functional.cross_entropy(near, given["input_ids"][:, 1:][counted], reduction="sum"))
