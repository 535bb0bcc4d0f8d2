"""Forecast of a compression: which rule takes which matrices, and how much memory and time that needs. It reads no weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel

from tenfold.compression.blockwise import BlockwiseCompression
from tenfold.compression.calibration import Calibration, settings_of
from tenfold.evaluation.timing import time_call
from tenfold.models.cost import inspect
from tenfold.models.precision import in_bfloat16
from tenfold.models.recipe import Recipe, Rule
from tenfold.models.sites import dtype_of, find_sites

HEALING_PASSES = 4  # of a token: the teacher forward, the student forward and twice as much backward
ROWS = 1024  # of the matrix product that is timed


def forecast(
    model: PreTrainedModel,
    recipe: Recipe,
    text: Calibration | None,
    device: torch.device,
    healed_tokens: int = 0,
) -> dict[str, Any]:
    """Return what compressing ``model``, on the meta device, by ``recipe`` without stages would do.

    Args:
        healed_tokens: that the result is then trained on.

    Returns:
        ``sites``: number and parameters of the matrices by role and rule; ``parameters`` of the model and ``kept``, what a
        recipe without activations leaves of them, None where the budget decides; ``memory`` in bytes; and ``seconds`` of every
        phase, where these are known.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    rate = _measure_rate(model, settings_of(recipe).precision, device) / 2  # multiply-adds a second
    seconds, memory, kept = dict[str, float](), whole * dtype_of(model).itemsize, None
    changed = {site.path for site in find_sites(model)}
    if text is None:
        kept = inspect(model, recipe)["parameters"]["total"] if recipe.replace else None
    elif recipe.replace and not recipe.transform:
        run = BlockwiseCompression(model, recipe, text)
        inside = sum(site.calls * site.shape[0] * site.shape[1] for plan in run.plans for site in plan.sites)
        seconds, memory = {str(phase): phase.passes * inside / rate for phase in run.phases}, run.memory
        changed -= {site.path for plan in run.plans for site in plan.sites}
        changed |= {site.path for plan in run.plans for action in plan.actions for site in action.sites}
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for site in find_sites(model):
        rule = next((rule for rule in recipe.replace if site.path in changed and rule.matches(site)), None)
        key = (site.role, recipe.transform or "stays" if rule is None else _describe_rule(rule))
        counts[key] += 1
        sizes[key] += site.shape[0] * site.shape[1]
    if healed_tokens:
        seconds["healing"] = HEALING_PASSES * healed_tokens * whole / rate
        memory = max(memory, 20 * whole)  # in float32: the teacher, the student, its gradients and two moments
    sites = [{"role": r, "rule": rule, "matrices": counts[r, rule], "parameters": sizes[r, rule]} for r, rule in counts]
    return {"sites": sites, "parameters": whole, "kept": kept, "memory": memory, "seconds": seconds}


def _describe_rule(rule: Rule) -> str:
    return f"prune: {rule.prune}" if rule.prune else " or ".join(spec["kind"] for spec in rule.structures)


def _measure_rate(model: PreTrainedModel, precision: str, device: torch.device) -> float:
    """Return the FLOPs a second of a matrix product of the size of the widest matrix in the blocks."""
    out, inner = max((site.shape for site in find_sites(model) if site.layer is not None), key=lambda s: s[0] * s[1])
    dtype = torch.bfloat16 if in_bfloat16(precision, device.type) else torch.float32
    x, w = (torch.ones(rows, inner, dtype=dtype, device=device) for rows in (ROWS, out))
    time_call(lambda: x @ w.T, device)
    return 2 * ROWS * out * inner / time_call(lambda: x @ w.T, device, 4)
