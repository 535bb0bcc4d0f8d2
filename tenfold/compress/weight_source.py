"""Where the weights of a block come from and where they go: one block at a time is at work, in float32.

Half precision is too coarse for statistics, and slow on a CPU. :class:`InMemoryWeights` has the whole model in memory;
:class:`tenfold.models.lazy_checkpoint.LazyCheckpoint` behind :class:`StreamedWeights` has a checkpoint on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from tenfold.compress.tensor_store import hand_back
from tenfold.models.lazy_checkpoint import LazyCheckpoint
from tenfold.models.sites import dtype_of


class Weights(Protocol):
    """What the compressor asks for."""

    def at(self, path: str) -> AbstractContextManager[None]:
        """The weights of the block ``path`` are there in float32, and as they were afterwards."""
        ...

    def outside(self) -> AbstractContextManager[None]:
        """The weights outside of the blocks are there in float32."""
        ...

    def keep(self, number: int, path: str) -> None:
        """Block ``number``, which is ``path``, is finished."""
        ...


class InMemoryWeights:
    """All weights are in memory, in the type of the checkpoint."""

    def __init__(self, model: PreTrainedModel, blocks: list[str]):
        self.model, self.blocks, self.usual = model, blocks, dtype_of(model)
        self.inside = {id(p) for path in blocks for p in model.get_submodule(path).parameters()}

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        block = self.model.get_submodule(path)
        with in_float32(block, self.usual):
            yield

    @contextmanager
    def outside(self) -> Iterator[None]:
        with in_float32(self.model, self.usual, lambda p: id(p) not in self.inside):
            yield

    def keep(self, number: int, path: str) -> None:
        round_to(self.model.get_submodule(path), self.usual)


@contextmanager
def in_float32(
    module: nn.Module, usual: torch.dtype, which: Callable[[nn.Parameter], bool] = lambda p: True
) -> Iterator[None]:
    """The parameters ``which`` of ``module`` in float32; afterwards in their own type again, new ones in the ``usual``."""
    types = {}
    for parameter in module.parameters():
        if parameter.is_floating_point() and which(parameter):
            types[id(parameter)] = parameter.dtype
            parameter.data = parameter.data.float()
    before = {id(p) for p in module.parameters()}
    try:
        yield
    finally:
        for parameter in module.parameters():
            if id(parameter) in types:
                parameter.data = parameter.data.to(types[id(parameter)])
            elif id(parameter) not in before and parameter.is_floating_point():
                parameter.data = parameter.data.to(usual)


def round_to(module: nn.Module, dtype: torch.dtype) -> None:
    """What is saved in ``dtype`` shall count as it will be read, for the blocks behind it."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


class StreamedWeights:
    """A checkpoint on disk: a block is read when it is needed, and what ``finished`` takes has been dealt with."""

    def __init__(self, lazy: LazyCheckpoint, blocks: list[str], finished: Callable[[int, str], None]):
        self.lazy, self.blocks, self.finished = lazy, blocks, finished

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        self.lazy.load(path)
        try:
            yield
        finally:
            self.lazy.drop(path)
            hand_back()

    @contextmanager
    def outside(self) -> Iterator[None]:
        with in_float32(self.lazy.model, self.lazy.dtype, lambda p: not p.is_meta):
            yield

    def keep(self, number: int, path: str) -> None:
        round_to(self.lazy.model.get_submodule(path), self.lazy.dtype)
        self.finished(number, path)
