"""What memory a compression takes, told before the work begins: a process that takes too much is killed without a word."""

from __future__ import annotations

import warnings

import psutil
from transformers import PreTrainedModel

from tenfold.compress.block_plan import BlockPlan
from tenfold.models.config import Calibrate

STATES = 2**28  # bytes of hidden states that are held in memory at most
LOGITS = 3  # copies of those of one sample in float32


def check_room(model: PreTrainedModel, works: list[BlockPlan], tokens: int, window: int, settings: Calibrate) -> None:
    """Warn where less memory is free than the compression takes, with what would fit.

    Args:
        tokens: of the text by which sizes are chosen.
        window: tokens in a sample.

    Warns:
        UserWarning: with the bytes that are needed, those that are free, and how many tokens there is room for, if any.
    """
    free, needed = psutil.virtual_memory().available, needed_bytes(model, works, tokens, window, settings)
    if needed <= free:
        return
    fitting = [
        n for n in range(window, tokens, window) if needed_bytes(model, works, n, window, settings) <= free
    ]  # fewer tokens are judged one by one
    way = f"write calibrate: {{survey: {fitting[-1]}}} into the recipe, or close" if fitting else "close"
    warnings.warn(
        f"about {needed / 1e9:.2g} GB of memory are needed and {free / 1e9:.2g} GB are free; {way} other programs",
        stacklevel=3,
    )


def needed_bytes(model: PreTrainedModel, works: list[BlockPlan], tokens: int, window: int, settings: Calibrate) -> int:
    """Return about how many bytes a compression takes beside what is in memory before it.

    What lies outside of the blocks in float32, the hidden states, and the larger one of two: what one block takes, and the logits
    of one sample.
    """
    blocks = tuple(f"{work.path}." for work in works)
    outer = [p for name, p in model.named_parameters() if not name.startswith(blocks)]
    widened = sum((4 - (0 if p.is_meta else p.element_size())) * p.numel() for p in outer)
    logits = 4 * LOGITS * window * model.get_input_embeddings().weight.shape[0]
    return max(0, widened) + STATES + max(logits, *(_block_bytes(work, tokens, settings) for work in works))


def _block_bytes(work: BlockPlan, tokens: int, settings: Calibrate) -> int:
    """Twice the weights in float32; moments in float64; inputs and gradients, token by token, of what is judged by them."""
    shapes = {site.path: site.shape for site in work.sites}
    evident = {path for action in work.actions for path in getattr(action, "evident", ())}
    weights = 2 * 4 * sum(out * inner for out, inner in shapes.values())
    inputs = 2 * 8 * sum(inner**2 for inner in {inner for _, inner in shapes.values()})  # choosing units takes a copy
    outputs = 8 * sum(out**2 for out, _ in shapes.values())
    judged = 2 * tokens * sum(sum(shapes[path]) for path in evident)
    return weights + inputs + (outputs + judged if settings.outputs != "none" else 0)
