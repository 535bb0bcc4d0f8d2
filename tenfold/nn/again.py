"""Matrices that are made in training and used again by the next micro-batch, until an optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from tenfold.structure import Factors

_ALL: WeakSet[Again] = WeakSet()


@lru_cache(maxsize=1)
def _watch() -> None:
    """Hear of every step of every optimizer of torch, also of one that writes to factors behind torch's back."""

    def tell(*_) -> None:
        for one in _ALL:
            one.step()

    register_optimizer_step_post_hook(tell)


@dataclass
class Kept:
    """A matrix, and the address, version and type of every factor that it was made of.

    The factors are held, too: else a new one could lie at the address of one that is gone.
    """

    matrix: Tensor
    made_of: list[tuple]
    held: list[Tensor]
    trained: bool  # else no step of an optimizer, which may be another model's, changes them


class Again:
    """What one layer has made of its factors since the last step: :attr:`kept` for evaluation, and what follows in training.

    It is given again while gradients are being summed (a factor has one), if no factor was written to or moved and no optimizer
    of torch has made a step. Who did not sum over micro-batches in the step before holds no matrix longer than from the way
    forward to the way back.
    """

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self._made: dict[tuple, Tensor] = {}
        self._of: list[tuple] = []
        self._held: list[Tensor] = []  # else a new factor could lie at the address of one that is gone
        self._summed = False  # in the last step that this layer took part in
        self._summing: bool | None = None  # in this one; None: not called yet

    def step(self) -> None:
        """An optimizer has made a step: nothing is true any more."""
        if self._summing is not None:  # else it is an optimizer of another model
            self._summed, self._summing = self._summing, None
        self._made, self._of, self._held = {}, [], []
        if self.kept is not None and self.kept.trained:
            self.kept = None

    def keep(self, made: Kept) -> Kept:
        """For evaluation, until a step or a change of a factor."""
        _watch()
        _ALL.add(self)
        self.kept = made
        return made

    def matrices(self, factors: Factors) -> dict[tuple, Tensor]:
        """Those that may be used with ``factors``, and the place for those that are made now."""
        _watch()
        _ALL.add(self)
        summing = any(value.is_leaf and value.grad is not None for value in factors.values())
        self._summing = self._summing or summing
        if not self._summed or torch.is_autocast_enabled(next(iter(factors.values())).device.type):
            return {}  # autocast computes with copies of the factors
        now = [(value.data_ptr(), value._version, value.dtype) for value in factors.values()]
        if now != self._of or not summing:
            self._made, self._of = {}, now
            self._held = [value.detach() for value in factors.values()]
        return self._made
