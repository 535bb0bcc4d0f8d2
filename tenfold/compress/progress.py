"""How a caller is told what is being done: ``progress(items, phase)`` wraps the list that is worked through.

tqdm and rich's ``track`` are such functions: they take the phase for their description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Progress = Callable[..., Iterable]


class Phase(str):
    """The name of a phase; ``share`` is what part of the whole run's time it is expected to take, None where unknown."""

    share: float | None

    def __new__(cls, name: str, share: float | None = None):
        phase = super().__new__(cls, name)
        phase.share = share
        return phase


def untold(items: Iterable, phase: str = "") -> Iterable:
    """Tell nobody."""
    return items


def phases_of(surveyed: int, tokens: int, gradients: bool, behind: float = 0.0) -> tuple[Phase, Phase, Phase]:
    """Return the phases of a run over the blocks: forward, backward, fits.

    Args:
        surveyed: tokens that the sizes are chosen by.
        tokens: tokens that the fits read.
        gradients: whether the survey goes backward for gradients too.
        behind: tokens that go through the blocks behind a block, in the mean, to see how predictions move, times these blocks.
    """
    # passes through a block for every token, and what is worked out of them: of two recipes on two models of 8 and 135 million
    # parameters; only the time left depends on it
    passes = {"forward": surveyed, "backward": (5 if gradients else 2) * surveyed + 1.3 * behind, "fits": 2.3 * tokens}
    whole = sum(passes.values())
    forward, backward, fits = (Phase(name, value / whole) for name, value in passes.items())
    return forward, backward, fits
