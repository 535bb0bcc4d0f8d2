"""Rotation of the residual stream after which the matrices that read and write it are nearer to their structures.

The rules of the recipe then compress the rotated model. The rotation is sought in the Frobenius norm, where a round is one closed
form per matrix and one orthogonal Procrustes problem; the paper seeks it in the metric of the inputs, and rotates every
block by itself, with matrices on the residual connections that an ordinary checkpoint can't hold.

Reference: ProcrustesGPT, arXiv 2506.02818.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tenfold.compression.calibration import Calibration
from tenfold.models.invariances.residual_rotation import (
    best_rotation,
    fuse_norms,
    rotate_residual,
    stream_matrices,
)
from tenfold.models.invariances.stream import READS, WRITES, prenorms
from tenfold.models.plan import make_plan
from tenfold.models.recipe import Recipe

ROUNDS = 30


def rotate_stream(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Rotate the residual stream of ``model``, in place, towards the structures of the rules.

    Returns:
        ``errors``: the squared error of all structures after every round, relative to the first.

    Raises:
        ValueError: the stream can't be rotated, or no rule has a structure at it.
    """
    layer_norm = prenorms(model)[0].mean
    rules = [rule for rule in recipe.replace if not rule.prune]
    entries = make_plan(model, recipe.model_copy(update={"replace": rules})).entries if rules else {}
    at_stream = [one for one in entries.values() if one.site.layer is not None and one.site.role in (*READS, *WRITES)]
    structures = {one.site.path: one.structure for one in at_stream}
    if not structures:
        raise ValueError(f"no rule of recipe {recipe.name} has a structure at the residual stream to rotate towards")
    fuse_norms(model)
    matrices = stream_matrices(model, structures)
    rotation, losses = best_rotation(matrices, layer_norm=layer_norm, rounds=ROUNDS, sweeps=3)
    rotate_residual(model, rotation)
    return {"errors": [loss / losses[0] for loss in losses]}
