"""Progress of a run: ``progress(items, phase)`` wraps the list that is worked through.

tqdm and rich's ``track`` are such functions: they show the phase as their description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Progress = Callable[..., Iterable]


class Phase(str):
    """Name of a phase.

    Args:
        passes: the expected time, in forward passes of a token through all blocks.
    """

    passes: float

    def __new__(cls, name: str, passes: float):
        phase = super().__new__(cls, name)
        phase.passes = passes
        return phase


def no_progress(items: Iterable, phase: str = "") -> Iterable:
    """Return ``items`` and show nothing."""
    return items


def estimate_phases(surveyed: int, tokens: int, gradients: bool, behind: float = 0.0) -> tuple[Phase, Phase, Phase]:
    """Return the phases of a run over the blocks: forward, backward, fits.

    Args:
        surveyed: tokens by which sizes are chosen.
        tokens: tokens that the fits read.
        gradients: whether the backward phase computes gradients.
        behind: tokens that measure divergences, times the mean number of blocks that they run through.
    """
    # block passes per token, fitted to two recipes on models of 8 and 135 million parameters; only the time left depends on it
    first, second, third = surveyed, (5 if gradients else 2) * surveyed + 1.3 * behind, 2.3 * tokens
    return Phase("forward", first), Phase("backward", second), Phase("fits", third)
