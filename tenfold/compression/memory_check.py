"""Check of the memory that a compression needs, before it begins: a process that takes too much is killed silently."""

from __future__ import annotations

import warnings

import psutil
from transformers import PreTrainedModel

from tenfold.compression.actions import BlockPlan
from tenfold.models.config import Calibrate
from tenfold.models.sites import shape_of

STATES = 2**28  # bytes of hidden states that are held in memory at most
LOGITS = 3  # copies of the logits of one sample in float32


def check_memory(model: PreTrainedModel, plans: list[BlockPlan], tokens: int, window: int, settings: Calibrate) -> int:
    """Return the bytes that the compression needs beside what is in memory before it; warn if fewer are free.

    These are what is outside of the blocks in float32, the hidden states, and the larger of one block and the logits of a sample.

    Args:
        tokens: by which sizes are chosen; the warning names the number that would fit, if any.
        window: tokens in a sample.
    """
    blocks = tuple(f"{plan.path}." for plan in plans)
    outer = [p for name, p in model.named_parameters() if not name.startswith(blocks)]
    widened = sum((4 - (0 if p.is_meta else p.element_size())) * p.numel() for p in outer)
    logits = 4 * LOGITS * window * shape_of(model.get_input_embeddings())[0]
    free = psutil.virtual_memory().available

    def needed(tokens: int) -> int:
        return max(0, widened) + STATES + max(logits, *(_block_bytes(plan, tokens, settings) for plan in plans))

    if needed(tokens) > free:
        fitting = [n for n in range(window, tokens, window) if needed(n) <= free]
        advice = f"write calibrate: {{fisher_tokens: {fitting[-1]}}} into the recipe, or close" if fitting else "close"
        warnings.warn(
            f"about {needed(tokens) / 1e9:.2g} GB of memory are needed and {free / 1e9:.2g} GB are free; {advice} other programs",
            stacklevel=3,
        )
    return needed(tokens)


def _block_bytes(plan: BlockPlan, tokens: int, settings: Calibrate) -> int:
    """Return the bytes of the weights in float32, twice, of moments in float64, and of the evidence token by token."""
    shapes = {site.path: site.shape for site in plan.sites}
    evidence_paths = {path for action in plan.actions for path in action.evidence_paths}
    weights = 2 * 4 * sum(out * inner for out, inner in shapes.values())
    inputs = 2 * 8 * sum(inner**2 for inner in {inner for _, inner in shapes.values()})  # choosing units takes a copy
    outputs = 8 * sum(out**2 for out, _ in shapes.values())
    judged = 2 * tokens * sum(sum(shapes[path]) for path in evidence_paths)
    return weights + inputs + (outputs + judged if settings.output_metric != "none" else 0)
