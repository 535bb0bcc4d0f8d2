"""The hidden states of the calibration tokens in front of one block after another, and the moments of its inputs.

Two streams run side by side: what the original model computes, and what the model computes whose blocks so far are
compressed. Both are needed: a compressed site shall give the original outputs from the inputs that it now gets.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenfold.compress.calibration import Batch
from tenfold.models.sites import Site, base_model


@dataclass
class Moments:
    """What is known of the inputs of one site, the original ones ``x`` and those that it now gets, ``z``, in float64.

    Args:
        second: mean of ``z z^T (in, in)``.
        cross: mean of ``x z^T (in, in)``; ``second`` itself where the streams are one.
        mean: mean of ``z (in,)``.
        mean_original: mean of ``x (in,)``.
        tokens: how many vectors were seen.
    """

    second: Tensor
    cross: Tensor
    mean: Tensor
    mean_original: Tensor
    tokens: int


class Sums:
    """Sums over rows of ``x`` and ``z (n, in)``: products in float32, sums in float64."""

    def __init__(self, width: int, one: bool):
        self.second, self.mean = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.cross, self.other = (self.second, self.mean) if one else (self.second.clone(), self.mean.clone())
        self.one, self.tokens = one, 0

    def add(self, x: Tensor, z: Tensor) -> None:
        self.second += (z.T @ z).to(self.second)
        self.mean += z.sum(0).to(self.mean)
        if not self.one:
            self.cross += (x.T @ z).to(self.cross)
            self.other += x.sum(0).to(self.other)
        self.tokens += len(z)

    def moments(self) -> Moments:
        """Means instead of sums."""
        return Moments(
            *(v / max(1, self.tokens) for v in (self.second, self.cross, self.mean, self.other)), self.tokens
        )


@dataclass
class Call:
    """How a block was called with one batch, its hidden states left out."""

    arguments: tuple
    keywords: dict


class _Stop(Exception):
    """The input that was wanted has been seen."""


class Streams:
    """Both streams of every batch, in front of one block after another.

    Args:
        model: is run once as it is, to see how its blocks are called.
        blocks: paths of the blocks, in the order in which they run.
        batches: of calibration tokens.
    """

    def __init__(self, model: nn.Module, blocks: list[str], batches: list[Batch]):
        self.blocks = [model.get_submodule(path) for path in blocks]
        self.kept = [batch["attention_mask"].flatten().bool() for batch in batches]
        self.calls: list[list[Call]] = [[] for _ in blocks]
        self.original: list[Tensor] = []
        device = next(model.parameters()).device
        for batch in batches:
            self._record(model, {name: value.to(device) for name, value in batch.items()})
        self.first = list(self.original)
        self.now = list(self.original)

    @torch.no_grad()
    def _record(self, model: nn.Module, batch: Batch) -> None:
        seen: list[Tensor] = []
        made: list[Tensor] = []

        def before(number: int):
            def hook(module, arguments, keywords):
                states, call = _split(arguments, keywords)
                seen.append(states)
                self.calls[number].append(call)

            return hook

        hooks = [block.register_forward_pre_hook(before(k), with_kwargs=True) for k, block in enumerate(self.blocks)]
        try:
            base_model(model)(**batch, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
        finally:
            for hook in hooks:
                hook.remove()
        self.original.append(seen[0])
        self.chained = all(one is other for one, other in zip(made, seen[1:], strict=False))

    def run(self, number: int, block: nn.Module, states: Tensor, batch: int) -> Tensor:
        """The output of ``block``, called as block ``number`` was."""
        call = self.calls[number][batch]
        out = block(states, *call.arguments, **call.keywords)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, number: int, original: nn.Module | None = None) -> None:
        """Both streams through block ``number``; ``original`` is the block as it was, None: as it is."""
        for k in range(len(self.now)):
            self.now[k] = self.run(number, self.blocks[number], self.now[k], k)
            if original is None:
                self.original[k] = self.now[k]
            else:
                self.original[k] = self.run(number, original, self.original[k], k)

    @torch.no_grad()
    def check_chain(self) -> None:
        """Raise ValueError unless every block runs once a batch, on what the one before it returns."""
        if any(len(calls) != len(self.kept) for calls in self.calls) or not self.chained:
            raise ValueError(
                "the blocks of this model do not follow one another, each once, so that they can't be calibrated one by one; "
                "compress it without --calibrate"
            )

    def rewind(self) -> None:
        """Both streams in front of the first block again."""
        self.original, self.now = list(self.first), list(self.first)

    @torch.no_grad()
    def moments(self, number: int, block: nn.Module, original: nn.Module | None, path: str) -> Moments:
        """Of the inputs of the site ``path`` inside ``block``, block ``number`` as it is now.

        Args:
            original: the block as it was, which the original stream goes through; None: ``block`` and that stream only.
        """
        sums = None
        for k in range(len(self.now)):
            x = self._input(number, original or block, path, self.original[k], k)
            z = x if original is None else self._input(number, block, path, self.now[k], k)
            sums = sums or Sums(x.shape[-1], original is None)
            sums.add(x, z)
        assert sums is not None
        found = sums.moments()
        if not bool(torch.isfinite(found.second).all() & torch.isfinite(found.cross).all()):
            raise ValueError(
                f"the inputs of {path} in block {number} hold NaN or Inf; try --dtype float32 or other text"
            )
        return found

    def _input(self, number: int, block: nn.Module, path: str, states: Tensor, batch: int) -> Tensor:
        with stopping_at(block.get_submodule(path)) as seen:
            self.run(number, block, states, batch)
        return seen[0].flatten(0, -2)[self.kept[batch]].float()

    def stages(self, number: int, paths: list[str]) -> list[list[str]]:
        """``paths`` inside block ``number`` in the order in which they run, those with one input together."""
        seen: list[tuple[int, str]] = []
        block = self.blocks[number]
        hooks = [
            block.get_submodule(path).register_forward_pre_hook(
                lambda module, arguments, path=path: seen.append((id(arguments[0]), path))
            )
            for path in paths
        ]
        kept: list[Tensor] = []  # so that no address is used twice
        hooks += [block.get_submodule(p).register_forward_pre_hook(lambda m, a: kept.append(a[0])) for p in paths]
        try:
            with torch.no_grad():
                self.run(number, block, self.now[0], 0)
        finally:
            for hook in hooks:
                hook.remove()
        stages: dict[int, list[str]] = {}
        for key, path in seen:
            stages.setdefault(key, []).append(path)
        return list(stages.values())


def _split(arguments: tuple, keywords: dict) -> tuple[Tensor, Call]:
    if arguments:
        return arguments[0], Call(arguments[1:], keywords)
    rest = dict(keywords)
    return rest.pop("hidden_states"), Call((), rest)


@contextmanager
def stopping_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """Run until ``module`` is called; its input is in the list."""
    seen: list[Tensor] = []

    def hook(module, arguments):
        seen.append(arguments[0])
        raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    except _Stop:
        pass
    finally:
        handle.remove()


def blocks_of(sites: list[Site]) -> dict[str, list[Site]]:
    """``{path of a block: its sites}`` in the order of the model."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        if site.layer is not None:
            block = re.match(rf"(.*?\.|){site.layer}(?=\.)", site.path)
            assert block is not None
            found.setdefault(block[0], []).append(site)
    return found


def twin(block: nn.Module) -> nn.Module:
    """A copy that stays as the block is now."""
    return copy.deepcopy(block).requires_grad_(False)
