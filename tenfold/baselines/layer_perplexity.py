"""Depth pruning by perplexity: remove the block whose removal raises the perplexity least, and repeat with those that are left.

With the blocks ``b_1 ... b_n`` that are left, block ``i`` costs the cross entropy of the text by the model of ``b_1 ... b_{i-1},
b_{i+1} ... b_n``. One pass through all blocks stores the states in front of each, from which a candidate continues:
``n^2 / 2`` passes through a block a round instead of ``n^2``, and the head ``n`` times. The states are those of one batch.

Reference: SLEB, arXiv 2402.09025.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from tenfold.baselines.drop_layers import count_excess, drop_one_by_one
from tenfold.compression.activations import Activations
from tenfold.compression.calibration import Calibration, select_batches, settings_of, split_for_processes, sum_losses
from tenfold.models.distributed import all_reduce_number, shard_items
from tenfold.models.recipe import Recipe
from tenfold.models.text_mode import is_causal_lm


def drop_layers_by_perplexity(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Remove the blocks from ``model``, in place, one at a time, without which the perplexity is least.

    The perplexity is that of ``calibrate: {fisher_tokens: ...}`` tokens of the calibration text.

    Returns:
        ``dropped``: the paths of the blocks in the order of removal; ``losses``: ``{path: nats a token without this block}`` per
        round.

    Raises:
        ValueError: the model is no causal language model, a loss is not finite, or see ``count_excess``.
    """
    if not is_causal_lm(model) or model.get_output_embeddings() is None:
        raise ValueError(
            f"a {type(model).__name__} has no perplexity; take a causal language model, or drop-layers, which needs none"
        )
    paths, excess = count_excess(model, recipe)
    training, rounds = model.training, list[dict[str, float]]()
    settings = settings_of(recipe)
    batches = shard_items(select_batches(split_for_processes(text.batches), settings.fisher_tokens))
    activations = Activations(model.eval(), paths, batches, skip=settings.skip_first, precision=settings.precision)

    def choose(left: list[str]) -> str:
        numbers = measure_without_each(activations, [paths.index(path) for path in left])
        rounds.append({paths[number]: loss for number, loss in numbers.items()})
        return min(left, key=rounds[-1].__getitem__)

    dropped = drop_one_by_one(model, paths, excess, choose)
    model.train(training)
    return {"losses": rounds, "dropped": dropped}


@torch.no_grad()
def measure_without_each(activations: Activations, left: list[int]) -> dict[int, float]:
    """Return ``{number of a block: nats a token}`` of the model with the blocks ``left`` except this one.

    Args:
        activations: in front of the first block.
        left: numbers of blocks, in the order in which they run.

    Raises:
        ValueError: a loss is not finite.
    """
    sums, tokens = dict.fromkeys(left, 0.0), 0
    for k in range(len(activations.batches)):
        batch, before = activations.to_device(activations.batches[k]), [activations.states(k)[0]]
        read = batch["attention_mask"].bool()
        mask = (activations.masks[k].to(read.device).view_as(read) & read)[:, 1:] & read[:, :-1]
        tokens += int(mask.sum())
        with activations.autocast():
            for number in left[:-1]:
                before.append(activations.run_block(number, activations.blocks[number], before[-1], k))
            for place, without in enumerate(left):
                states = before[place]
                for number in left[place + 1 :]:
                    states = activations.run_block(number, activations.blocks[number], states, k)
                logits = activations.run_head(states, batch)
                sums[without] += sum_losses(logits, batch["input_ids"], mask)[0]
    tokens = max(1.0, all_reduce_number(tokens))
    losses = {number: all_reduce_number(value) / tokens for number, value in sums.items()}
    for number, loss in losses.items():
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss without block {number} is NaN or Inf; mend its weights, or try --dtype float32 or other text"
            )
    return losses
