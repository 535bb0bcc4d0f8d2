"""Source and destination of the weights: one block at a time is loaded, in float32.

Half precision is too coarse for statistics, and slow on a CPU. ``InMemoryWeights`` has the whole model in memory,
``StreamedWeights`` reads a checkpoint on disk through ``tenfold.models.lazy_checkpoint.LazyCheckpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from tenfold.compression.tensor_store import release_memory
from tenfold.models.lazy_checkpoint import LazyCheckpoint
from tenfold.models.sites import dtype_of


class InMemoryWeights:
    """All weights in memory, in the dtype of the checkpoint.

    ``at`` and ``outside`` are contexts in which the weights of a block, and those outside of all blocks, are there in float32;
    ``finish_block`` takes the compressed weights of a block.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[str]):
        self.model, self.dtype = model, dtype_of(model)
        self.inside = {id(p) for path in blocks for p in model.get_submodule(path).parameters()}

    def at(self, path: str) -> AbstractContextManager[None]:
        return cast_to_float32(self.model.get_submodule(path), self.dtype)

    def outside(self) -> AbstractContextManager[None]:
        return cast_to_float32(self.model, self.dtype, lambda p: id(p) not in self.inside)

    def finish_block(self, number: int, path: str) -> None:
        round_parameters(self.model.get_submodule(path), self.dtype)


class StreamedWeights:
    """Checkpoint on disk: blocks are read when they are needed, and ``save_block`` writes the finished ones."""

    def __init__(self, lazy: LazyCheckpoint, save_block: Callable[[int, str], None]):
        self.lazy, self.save_block = lazy, save_block

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        self.lazy.load(path)
        try:
            yield
        finally:
            self.lazy.drop(path)
            release_memory()

    def outside(self) -> AbstractContextManager[None]:
        return cast_to_float32(self.lazy.model, self.lazy.dtype, lambda p: not p.is_meta)

    def finish_block(self, number: int, path: str) -> None:
        round_parameters(self.lazy.model.get_submodule(path), self.lazy.dtype)
        self.save_block(number, path)


Weights = InMemoryWeights | StreamedWeights


@contextmanager
def cast_to_float32(
    module: nn.Module, dtype: torch.dtype, which: Callable[[nn.Parameter], bool] = lambda p: True
) -> Iterator[None]:
    """Cast the parameters ``which`` of ``module`` to float32; afterwards back, and new ones to ``dtype``."""
    types, before = {}, {id(p) for p in module.parameters()}
    for parameter in module.parameters():
        if parameter.is_floating_point() and which(parameter):
            types[id(parameter)] = parameter.dtype
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in module.parameters():
            if id(parameter) in types:
                parameter.data = parameter.data.to(types[id(parameter)])
            elif id(parameter) not in before and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def round_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Round to ``dtype``, in which they are saved, so that the blocks behind are fitted to what will be read."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
