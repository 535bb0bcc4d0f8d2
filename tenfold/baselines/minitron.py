"""Width pruning by activations: hidden units, heads and channels with small activations go, and nothing compensates for them.

| width | activation ``a (samples, tokens, how many)`` |
|---|---|
| ``mlp`` | absolute value of the input of the output matrix |
| ``heads`` | norm of the output of a head; the scores of the query heads of a group are added up |
| ``hidden`` | absolute value of the output of a norm in a block; the scores of all norms are added up |

The score is ``(sum over samples of (mean over tokens of a)^2)^(1/2)``: the mean over the sequence, the L2 norm over the batch.

Reference: Muralidharan et al. 2024 (Minitron), arXiv 2407.14679, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.baselines.widths import Scores, Widths, prune_widths
from tenfold.compression.activations import cache_options, token_mask
from tenfold.compression.calibration import Calibration, settings_of, split_for_processes
from tenfold.models.config import Calibrate
from tenfold.models.distributed import all_reduce, shard_items
from tenfold.models.precision import in_bfloat16
from tenfold.models.recipe import Recipe, Shrink
from tenfold.models.sites import base_model

Activation = Callable[[Tensor, Tensor], Tensor]  # of the input and the output of a module


def prune_by_activations(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Prune the widths of ``model`` with the smallest activations, in place; see ``tenfold.baselines.widths.prune_widths``.

    By default hidden units of the MLPs and channels lose the same fraction, and heads stay.
    """
    shrink = recipe.shrink or Shrink(mlp=1, heads=0, hidden=1)
    score = partial(score_activations, text=text, settings=settings_of(recipe))
    return prune_widths(model, recipe, shrink, score)


@torch.no_grad()
def score_activations(widths: Widths, shrinking: list[str], text: Calibration, settings: Calibrate) -> Scores:
    """Return the scores along the widths ``shrinking``.

    Args:
        settings: of which ``skip_first`` and ``precision`` are used.

    Raises:
        ValueError: a score is not finite.
    """
    model, squares, training = widths.model, dict[tuple[str, str], Tensor](), widths.model.training
    mask = torch.empty(0)

    def add(module, arguments, out: Tensor, key: tuple[str, str], activation: Activation) -> None:
        found = activation(arguments[0], out).view(*mask.shape, -1) * mask[..., None]
        mean = found.sum(1, dtype=torch.float64) / mask.sum(1, keepdim=True).clamp_min(1)
        squares[key] = squares.get(key, 0) + mean.square().sum(0).cpu()

    with ExitStack() as stack:
        for width, path, module, activation in _list_activations(widths):
            if width in shrinking:
                hook = partial(add, key=(width, path), activation=activation)
                stack.callback(module.register_forward_hook(hook).remove)
        stack.callback(model.train, training)
        kind = model.device.type
        stack.enter_context(torch.autocast(kind, torch.bfloat16, enabled=in_bfloat16(settings.precision, kind)))
        model.eval()
        for batch in shard_items(split_for_processes(text.batches)):
            mask = token_mask(batch, settings.skip_first).view_as(batch["attention_mask"]).to(model.device)
            base_model(model)(**{name: value.to(model.device) for name, value in batch.items()}, **cache_options(model))
    scores: Scores = {}
    for (width, path), found in squares.items():
        score = all_reduce(found).sqrt()
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"the activations of {path} are NaN or Inf; try --dtype float32 or other text")
        score = score.view(widths.heads.groups, -1).sum(1) if width == "heads" else score
        key = (width, "" if width == "hidden" else path)
        scores[key] = scores.get(key, 0) + score
    return scores


def _list_activations(widths: Widths) -> Iterator[tuple[str, str, nn.Module, Activation]]:
    """Yield ``(width, path, module, activation)``; the path is that of the block, or of the norm."""
    size = widths.heads.size
    for path, sites in widths.blocks.items():
        by_role = {site.role: widths.model.get_submodule(site.path) for site in sites}
        yield "mlp", path, by_role["mlp.out"], lambda x, out: x.float().abs()
        yield "heads", path, by_role["attn.out"], lambda x, out: x.float().unflatten(-1, (-1, size)).norm(dim=-1)
        for inner, module in widths.model.get_submodule(path).named_modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.shape == (widths.full["hidden"],):
                yield "hidden", f"{path}.{inner}", module, lambda x, out: out.float().abs()
