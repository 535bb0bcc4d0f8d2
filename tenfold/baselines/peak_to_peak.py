"""Width pruning of MLPs by the range of the weights of their hidden units, without data.

The score of unit ``i`` is ``max_j G_ij - min_j G_ij + max_j U_ij - min_j U_ij``, ``G (units, width)`` the gate and ``U`` the up
matrix; without a gate, the second part only. The units of the lowest scores go, equally many in every layer.

Reference: Martra 2025, arXiv 2512.22671.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tenfold.baselines.widths import ROWS, Scores, Widths, prune_widths
from tenfold.models.recipe import Recipe, Shrink
from tenfold.models.sites import weight_of


def prune_by_peak_to_peak(model: PreTrainedModel, recipe: Recipe, text: Any = None) -> dict[str, Any]:
    """Prune the hidden units of the MLPs of ``model`` whose weights range least, in place; see ``prune_widths``.

    Raises:
        ValueError: heads or channels should shrink, too, or see ``tenfold.baselines.widths.prune_widths``.
    """
    shrink = recipe.shrink or Shrink(mlp=1, heads=0, hidden=0)
    if shrink.heads or shrink.hidden:
        raise ValueError("peak-to-peak scores units of MLPs only; shrink mlp alone, or let minitron choose")
    return prune_widths(model, recipe, shrink, score_ranges)


@torch.no_grad()
def score_ranges(widths: Widths, shrinking: list[str]) -> Scores:
    """Return the score ``(units,)`` of every hidden unit of every block."""
    scores: Scores = {}
    for path, sites in widths.blocks.items() if "mlp" in shrinking else ():
        for site in sites:
            if ROWS.get(site.role) == "mlp":
                weight = weight_of(widths.model.get_submodule(site.path)).float()
                scores["mlp", path] = scores.get(("mlp", path), 0) + weight.amax(1) - weight.amin(1)
    return scores
