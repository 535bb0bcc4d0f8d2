"""Hidden units of MLPs by the range of their weights, without data.

The score of unit ``i`` is ``max_j G_ij - min_j G_ij + max_j U_ij - min_j U_ij``, ``G (units, width)`` the gate and ``U`` the up
matrix; an MLP without a gate has the second part only. The lowest go, equally many in every layer.

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
    """Prune the hidden units of the MLPs of ``model``, in place, whose weights range least.

    Args:
        text: is not read.

    Returns:
        ``widths``, see :func:`tenfold.baselines.widths.prune_widths`.

    Raises:
        ValueError: heads or channels shall shrink, too, and what :func:`tenfold.baselines.widths.prune_widths` raises.
    """
    shrink = recipe.shrink or Shrink(mlp=1)
    if shrink.heads or shrink.hidden:
        raise ValueError("peak-to-peak scores units of MLPs only; shrink mlp alone, or let minitron choose")
    return prune_widths(model, recipe, shrink, peak_to_peak)


@torch.no_grad()
def peak_to_peak(widths: Widths, shrinking: list[str]) -> Scores:
    """Return the score ``(units,)`` of every hidden unit of every block."""
    scores: Scores = {}
    for path, sites in widths.blocks.items() if "mlp" in shrinking else ():
        for site in sites:
            if ROWS.get(site.role) == "mlp":
                weight = weight_of(widths.model.get_submodule(site.path)).float()
                scores["mlp", path] = scores.get(("mlp", path), 0) + weight.amax(1) - weight.amin(1)
    return scores
