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
from tenfold.models.recipe import Recipe, Rule
from tenfold.models.sites import Site, count_parameters, find_sites
from tenfold.structure import Structure

ROUNDS = 30


def rotate_stream(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Rotate the residual stream of ``model``, in place, towards the structures of the rules.

    Returns:
        ``errors``: the squared error of all structures after every round, relative to the first.

    Raises:
        ValueError: the stream can't be rotated, or no rule has a structure at it.
    """
    layer_norm = prenorms(model)[0].mean
    at_stream = [site for site in find_sites(model) if site.layer is not None and site.role in (*READS, *WRITES)]
    rules = [(site, rule) for site in at_stream if (rule := find_rule(recipe, site)) is not None]
    structures = {site.path: structure_for(model, recipe, rule, site.shape) for site, rule in rules}
    if not structures:
        raise ValueError(f"no rule of recipe {recipe.name} has a structure at the residual stream to rotate towards")
    fuse_norms(model)
    matrices = stream_matrices(model, structures)
    rotation, losses = best_rotation(matrices, layer_norm=layer_norm, rounds=ROUNDS, sweeps=3)
    rotate_residual(model, rotation)
    return {"errors": [loss / losses[0] for loss in losses]}


def find_rule(recipe: Recipe, site: Site) -> Rule | None:
    """Return the rule that factorises ``site``, None where none does."""
    rule = next((rule for rule in recipe.replace if rule.matches(site)), None)
    return None if rule is None or rule.prune else rule


def structure_for(model: PreTrainedModel, recipe: Recipe, rule: Rule, shape: tuple[int, int]) -> Structure:
    """Return the structure of ``rule`` for a matrix ``(out, in)``: of the size in the rule, or at a uniform ratio.

    With that all matrices that are factorised keep the same ratio.
    """
    if not Structure.family(rule.spec["kind"]).is_open(rule.spec):
        return Structure.for_shape(*shape, rule.spec)
    budget, ratio = recipe.budget, rule.keep or 0.5
    if rule.keep is None and budget is not None:
        inside = [site for site in find_sites(model) if site.layer is not None]
        sites = [site for site in inside if any(rule.matches(site) for rule in recipe.replace)]
        compressed = sum(site.shape[0] * site.shape[1] for site in sites)
        whole = compressed if budget.of == "sites" else count_parameters(model, budget.of)
        ratio = 1 - (1 - budget.keep) * whole / compressed
        if ratio <= 0:
            raise ValueError(
                f"keep {budget.keep} of the {budget.of} leaves nothing of the matrices that are compressed; keep more than "
                f"{1 - compressed / whole:.3f}"
            )
    return Structure.within(*shape, rule.spec, ratio * shape[0] * shape[1])
