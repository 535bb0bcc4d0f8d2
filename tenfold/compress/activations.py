"""The hidden states of the calibration tokens in front of one block after another, and the moments of its inputs.

There are two streams: what the original model computes, and what the model computes whose blocks so far are compressed. A
stream that nobody reads is not run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenfold.compress.calibration import Batch
from tenfold.compress.moments import MomentAccumulator, Moments, check_finite, checked, like_others
from tenfold.compress.tensor_store import TensorStore
from tenfold.models.distributed import all_reduce_number
from tenfold.models.experts import expert_of
from tenfold.models.precision import in_bfloat16
from tenfold.models.sites import Site, base_model

NO_CHAIN = (
    "the blocks of this model do not follow one another, each once, so that they can't be calibrated one by one; "
    "compress it without --calibrate"
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
        model: is run once with its blocks left out, to see how they are called.
        blocks: paths of the blocks, in the order in which they run.
        batches: of calibration tokens.
        shelf: holds the hidden states.
        skip: positions at the beginning of every window that do not count.
        precision: in which blocks run: ``auto``, ``bfloat16`` or ``float32``; see :class:`tenfold.models.config.Calibrate`.

    Raises:
        ValueError: the blocks do not run one after another, each once a batch, on what the one before it returns.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[str],
        batches: list[Batch],
        shelf: TensorStore | None = None,
        skip: int = 0,
        precision: str = "float32",
    ):
        self.model, self.paths, self.blocks = model, blocks, [model.get_submodule(path) for path in blocks]
        self.batches, self.kept = batches, [counted(batch, skip) for batch in batches]
        self.calls: list[list[Call]] = [[] for _ in blocks]
        self.shelf, self.device, self.form = (
            shelf or TensorStore(),
            _device(model),
            _form(model, self.blocks, batches[0]),
        )
        self.bfloat16 = in_bfloat16(precision, self.device.type)
        for number, batch in enumerate(batches):
            given = {name: value.to(self.device) for name, value in batch.items()}
            with torch.no_grad(), passing(self.blocks, self.form) as seen:
                base_model(model)(**given, **without_cache(model))
            for calls, (_, call) in zip(self.calls, seen, strict=True):
                calls.append(call)
            self.shelf.put(f"first-{number}", seen[0][0])
        self.names = [(f"first-{k}", f"first-{k}") for k in range(len(batches))]
        if not all_reduce_number(sum(int(kept.sum()) for kept in self.kept)):
            raise ValueError(
                f"skip_first {skip} leaves no token of the calibration text; skip fewer, or read longer windows"
            )

    def states(self, batch: int) -> tuple[Tensor, Tensor]:
        """Of the original stream and of the other one."""
        original, now = self.names[batch]
        held = self.shelf.get(original).to(self.device)
        return held, held if now == original else self.shelf.get(now).to(self.device)

    def autocast(self) -> torch.autocast:
        """Products in the precision that was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def run(self, number: int, block: nn.Module, states: Tensor, batch: int) -> Tensor:
        """The output of ``block``, called as block ``number`` was."""
        call = self.calls[number][batch]
        with self.autocast():
            out = block(states, *call.arguments, **call.keywords)
        return out if isinstance(out, Tensor) else out[0]

    @torch.no_grad()
    def advance(self, number: int, original: nn.Module | None = None, now: nn.Module | None = None) -> None:
        """Run the streams through block ``number``.

        Args:
            original: what the original stream goes through; None: both streams are one from here on.
            now: what the other stream goes through, the block as it is unless given.
        """
        for k in range(len(self.batches)):
            x, z = self.states(k)
            self.shelf.put(f"now-{k}", self.run(number, now or self.blocks[number], z, k))
            if original is None:
                self.names[k] = (f"now-{k}", f"now-{k}")
            else:
                self.shelf.put(f"original-{k}", self.run(number, original, x, k))
                self.names[k] = (f"original-{k}", f"now-{k}")
            self.shelf.drop(f"first-{k}")

    @torch.no_grad()
    def moments(
        self,
        number: int,
        block: nn.Module,
        path: str,
        local: nn.Module | None = None,
        original: nn.Module | None = None,
        share: float = 0.0,
    ) -> Moments:
        """Of the inputs ``z`` of the site ``path`` inside ``block``, block ``number``, and of those that it is to answer to.

        ``x = (1 - share) x_local + share x_original``.

        Args:
            local: what ``x_local`` is seen in, on the stream as it is now; None: ``x_local`` is ``z``.
            original: what ``x_original`` is seen in, on the original stream.
        """
        sums, one = None, local is None and share == 0
        for k in range(len(self.batches)):
            before, now = self.states(k)
            z = x = self._input(number, block, path, now, k)
            if local is not None and share < 1:
                x = self._input(number, local, path, now, k)
            if share > 0:
                assert original is not None
                x = (1 - share) * x + share * self._input(number, original, path, before, k)
            check_finite(x, z, path, number, k)
            sums = sums or MomentAccumulator(z.shape[-1], one)
            sums.add(x, z)
        assert sums is not None
        return checked(sums.of_all().moments(), path, number)

    def _input(self, number: int, block: nn.Module, path: str, states: Tensor, batch: int) -> Tensor:
        with stopping_at(block.get_submodule(path)) as seen:
            self.run(number, block, states, batch)
        return rows_of(seen[0], self.kept[batch])

    @torch.no_grad()
    def expert_moments(self, number: int, block: nn.Module, paths: list[str]) -> list[Moments]:
        """Of the inputs of several sites of experts, as they are now: an expert gets other tokens than in the original."""
        sums: dict[str, MomentAccumulator] = {}
        for k, kept in enumerate(self.kept):
            with ExitStack() as hooks:
                for path in paths:
                    hooks.callback(
                        block.get_submodule(path).register_forward_pre_hook(adding(sums, block, path, kept)).remove
                    )
                self.run(number, block, self.states(k)[1], k)
        widths = {path: block.get_submodule(path).weight.shape[1] for path in paths}
        found = [sums.get(path, MomentAccumulator(widths[path], True)).of_all().moments() for path in paths]
        return like_others([checked(one, path, number) for one, path in zip(found, paths, strict=True)])

    def stages(self, number: int, paths: list[str]) -> list[list[str]]:
        """``paths`` inside block ``number`` in the order in which they run, those with one input together.

        Experts come last, in an order that does not depend on which of them the tokens are sent to.
        """
        seen: list[tuple[Tensor, str]] = []  # the tensors too, so that no address is used twice
        block = self.blocks[number]
        with ExitStack() as hooks, torch.no_grad():
            for path in paths:
                hook = block.get_submodule(path).register_forward_pre_hook(
                    lambda module, arguments, path=path: seen.append((arguments[0], path))
                )
                hooks.callback(hook.remove)
            self.run(number, block, self.states(0)[1], 0)
        stages: dict[int, list[str]] = {}
        for states, path in seen:
            stages.setdefault(id(states), []).append(path)
        found = [stage for stage in stages.values() if expert_of(stage[0]) is None]
        return found + experts_stages([path for path in paths if expert_of(path) is not None])


def adding(sums: dict[str, MomentAccumulator], model: nn.Module, path: str, kept: Tensor):
    """A hook that adds the inputs of the site ``path`` of ``model``, as far as they are ``kept``, to its sums."""

    def hook(module, arguments) -> None:
        rows = rows_of(arguments[0].detach(), kept_here(model, path, kept))
        sums.setdefault(path, MomentAccumulator(rows.shape[-1], True)).add(rows, rows)

    return hook


def rows_of(states: Tensor, kept: Tensor) -> Tensor:
    """The vectors that count ``(n, in)``, in float32; without a copy where all do."""
    rows = states.flatten(0, -2)
    return (rows if bool(kept.all()) else rows[kept]).float()


def kept_here(model: nn.Module, path: str, kept: Tensor) -> Tensor:
    """Which of the rows count that the site ``path`` has just got: an expert gets some of the tokens."""
    rows = getattr(model.get_submodule(path.rpartition(".")[0]), "rows", None)
    return kept if rows is None else kept[rows.cpu()]


def experts_stages(paths: list[str]) -> list[list[str]]:
    """The stages of the sites of experts: what reads the expert's tokens, then what reads their hidden units."""
    stages: dict[str, list[str]] = {}
    for path in paths:
        expert, _, part = path.rpartition(".")
        stages.setdefault(path if part == "down" else expert, []).append(path)
    return list(stages.values())


def without_cache(model: nn.Module) -> dict[str, bool]:
    """A decoder is told to keep no keys and values: blocks that are run again would find them."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def counted(batch: Batch, skip: int) -> Tensor:
    """Which tokens count ``(samples * window,)``: no padding, and not the first ``skip`` of a window."""
    kept = batch["attention_mask"].bool().clone()
    kept[:, :skip] = False
    return kept.flatten()


@contextmanager
def passing(blocks: list[nn.Module], form: type, last: Tensor | None = None) -> Iterator[list[tuple[Tensor, Call]]]:
    """``blocks`` do nothing but note how they are called; the last one returns ``last`` if that is given."""
    seen: list[tuple[Tensor, Call]] = []

    def forward(*arguments, **keywords):
        states, call = _split(arguments, keywords)
        seen.append((states, call))
        # a new tensor, so that one can see whether the next block gets this very one
        passed = last if last is not None and len(seen) == len(blocks) else states.view_as(states)
        made.append(passed)
        return passed if form is Tensor else (passed, None, None)

    made: list[Tensor] = []
    for block in blocks:
        block.forward = forward  # hides the method of the class
    try:
        yield seen
    finally:
        for block in blocks:
            del block.forward
    if len(seen) != len(blocks) or any(one is not other for one, (other, _) in zip(made, seen[1:], strict=False)):
        raise ValueError(NO_CHAIN)


def _form(model: nn.Module, blocks: list[nn.Module], batch: Batch) -> type:
    """Whether the model expects a tensor or a tuple from its blocks."""
    given = {name: value[:1].to(_device(model)) for name, value in batch.items()}
    for form in (Tensor, tuple):
        try:
            with torch.no_grad(), passing(blocks, form):
                base_model(model)(**given, **without_cache(model))
            return form
        except (ValueError, IndexError, RuntimeError, AttributeError, TypeError):
            continue
    raise ValueError(NO_CHAIN)


def _device(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters() if not p.is_meta)


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
