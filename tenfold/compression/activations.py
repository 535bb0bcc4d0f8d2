"""Hidden states of the calibration tokens in front of one block after another, and the moments of the inputs of its sites.

There are two sets of states: those of the original model, and those of the model whose blocks so far are compressed. Where
nothing needs the original ones, only the others are computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.compression.calibration import Batch
from tenfold.compression.moments import Moments, check_finite
from tenfold.compression.tensor_store import TensorStore
from tenfold.models.distributed import all_reduce_number
from tenfold.models.experts import expert_of
from tenfold.models.precision import in_bfloat16
from tenfold.models.sites import Site, base_model, shape_of

NO_CHAIN = (
    "the blocks of this model do not follow one another, each once, so that they can't be calibrated one by one; "
    "compress it without --calibrate"
)


Call = tuple[tuple, dict]  # arguments and keywords of a block for one batch, without its hidden states


class _Stop(Exception):
    """All inputs that were to be captured have been seen."""


class Activations:
    """Hidden states of every batch, original and compressed, in front of one block after another.

    Args:
        model: is run once with its blocks bypassed, to record how they are called.
        blocks: paths of the blocks, in the order in which they run.
        batches: of calibration tokens.
        store: of the hidden states.
        skip: positions at the beginning of every window that do not count.
        precision: of the blocks: ``auto``, ``bfloat16`` or ``float32``; see ``tenfold.models.config.Calibrate``.

    Raises:
        ValueError: the blocks do not run one after another, each once per batch, on the output of the one before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[str],
        batches: list[Batch],
        store: TensorStore | None = None,
        skip: int = 0,
        precision: str = "float32",
    ):
        self.model, self.paths, self.blocks = model, blocks, [model.get_submodule(path) for path in blocks]
        self.batches, self.masks = batches, [token_mask(batch, skip) for batch in batches]
        self.num_tokens = sum(int(mask.sum()) for mask in self.masks)  # of this process
        self.calls: list[list[Call]] = [[] for _ in blocks]
        self.store = store or TensorStore()
        self.device = next(p.device for p in model.parameters() if not p.is_meta)
        self.form = _output_form(model, self.blocks, self.to_device(batches[0], 0))
        self.bfloat16 = in_bfloat16(precision, self.device.type)
        for number, batch in enumerate(batches):
            seen = self.run_to_first_block(batch)
            for calls, (_, call) in zip(self.calls, seen, strict=True):
                calls.append(call)
            self.store.put(f"first-{number}", seen[0][0])
        self.keys = [(f"first-{k}", f"first-{k}") for k in range(len(batches))]
        if not all_reduce_number(self.num_tokens):
            raise ValueError(
                f"skip_first {skip} leaves no token of the calibration text; skip fewer, or read longer windows"
            )

    def to_device(self, batch: Batch, row: int | None = None) -> Batch:
        """Return ``batch``, or one ``row`` of it, on the device of the model."""
        rows = slice(None) if row is None else slice(row, row + 1)
        return {name: value[rows].to(self.device) for name, value in batch.items()}

    def load(self, key: str) -> Tensor:
        """Return stored states on the device of the model."""
        return self.store.get(key).to(self.device)

    def states(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the original and the compressed hidden states of a batch."""
        original, compressed = self.keys[batch]
        states = self.load(original)
        return states, states if compressed == original else self.load(compressed)

    def autocast(self) -> torch.autocast:
        """Return the context in which blocks run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    @torch.no_grad()
    def run_to_first_block(self, batch: Batch) -> list[tuple[Tensor, Call]]:
        """Return the states in front of the first block, and how each block is called."""
        with bypass_blocks(self.blocks, self.form) as seen:
            base_model(self.model)(**self.to_device(batch), **cache_options(self.model))
        return seen

    def run_block(self, number: int, block: nn.Module, states: Tensor, batch: int) -> Tensor:
        """Return the output of ``block`` for ``states``, called like block ``number`` for this batch."""
        arguments, keywords = self.calls[number][batch]
        with self.autocast():
            out = block(states, *arguments, **keywords)
        return out if isinstance(out, Tensor) else out[0]

    def run_head(self, states: Tensor, batch: Batch) -> Tensor:
        """Return the logits over the vocabulary for ``states`` behind the last block.

        Of a model that predicts no tokens (a base model, a classifier) return the last hidden states.
        """
        head: Any = self.model.get_output_embeddings()
        model = base_model(self.model) if head is None else self.model
        with bypass_blocks(self.blocks, self.form, states), self.autocast():
            out = model(**batch, **cache_options(self.model))
        if head is None:
            return out.last_hidden_state
        found = (out[name] for name in out if name.endswith("logits"))  # BertForPreTraining has two
        return next(logits for logits in found if logits.shape[-1] == shape_of(head)[0])

    @torch.no_grad()
    def advance(self, number: int, original: nn.Module | None = None, compressed: nn.Module | None = None) -> None:
        """Run the states through block ``number``.

        Args:
            original: for the original states; None: only the compressed ones are computed from here on.
            compressed: for the compressed states; the block as it is unless given.
        """
        for k in range(len(self.batches)):
            x, z = self.states(k)
            self.store.put(f"now-{k}", self.run_block(number, compressed or self.blocks[number], z, k))
            if original is None:
                self.keys[k] = (f"now-{k}", f"now-{k}")
            else:
                self.store.put(f"original-{k}", self.run_block(number, original, x, k))
                self.keys[k] = (f"original-{k}", f"now-{k}")
            self.store.drop(f"first-{k}")

    @torch.no_grad()
    def sum_moments(
        self,
        number: int,
        block: nn.Module,
        paths: list[str],
        local: nn.Module | None = None,
        original: nn.Module | None = None,
        share: float = 0.0,
    ) -> list[Moments]:
        """Return the moments of the inputs ``z`` of the sites ``paths`` inside ``block``, which is block ``number``.

        The inputs whose outputs they should reproduce are ``x = (1 - share) x_local + share x_original``.

        Args:
            local: the block that gives ``x_local`` on the compressed states; None: ``x_local`` is ``z``.
            original: the block that gives ``x_original`` on the original states.

        Raises:
            ValueError: an input is not finite.
        """
        same = local is None and share == 0
        sums = [Moments(shape_of(block.get_submodule(path))[1], same) for path in paths]
        for k in range(len(self.batches)):
            before, states = self.states(k)
            found = self._capture_rows(number, block, paths, states, k)
            near = found if local is None or share == 1 else self._capture_rows(number, local, paths, states, k)
            far = self._capture_rows(number, original, paths, before, k) if share > 0 and original else found
            for path, one in zip(paths, sums, strict=True):
                if path in found:  # otherwise it is of an expert without tokens
                    x = (1 - share) * near[path] + share * far[path] if share > 0 else near[path]
                    where = f"{path} in block {number}, batch {k} of the calibration text,"
                    check_finite(x.sum() + found[path].sum(), where)
                    one.add(x, found[path])
        return sums

    def _capture_rows(
        self, number: int, block: nn.Module, paths: list[str], states: Tensor, batch: int
    ) -> dict[str, Tensor]:
        """Return the inputs ``(n, in)`` of the sites ``paths``; the block stops once all have been reached."""
        seen: dict[str, Tensor] = {}

        def hook(module, arguments, path: str) -> None:
            seen[path] = select_rows(arguments[0], expert_mask(block, path, self.masks[batch]))
            if len(seen) == len(paths):
                raise _Stop

        with suppress(_Stop), ExitStack() as hooks:
            for path in paths:
                handle = block.get_submodule(path).register_forward_pre_hook(partial(hook, path=path))
                hooks.callback(handle.remove)
            self.run_block(number, block, states, batch)
        return seen

    def find_input_groups(self, number: int, sites: list[Site]) -> list[list[str]]:
        """Return the paths of ``sites``, in block ``number``, in the order in which they run, grouped by their input.

        Experts come last, in an order that does not depend on the routing.
        """
        seen: list[tuple[Tensor, str]] = []  # holds the tensors, so that no id is reused

        def hook(module, arguments, path: str) -> None:
            seen.append((arguments[0], path))

        with ExitStack() as hooks, torch.no_grad():
            for path in (site.path for site in sites):
                handle = self.model.get_submodule(path).register_forward_pre_hook(partial(hook, path=path))
                hooks.callback(handle.remove)
            self.run_block(number, self.blocks[number], self.states(0)[1], 0)
        groups: dict[int, list[str]] = {}
        for states, path in seen:
            groups.setdefault(id(states), []).append(path)
        experts: dict[str, list[str]] = {}
        for path in (site.path for site in sites if expert_of(site.path) is not None):
            expert, _, part = path.rpartition(".")
            experts.setdefault(path if part == "down" else expert, []).append(path)
        return [group for group in groups.values() if expert_of(group[0]) is None] + list(experts.values())


def select_rows(states: Tensor, mask: Tensor) -> Tensor:
    """Return the vectors ``(n, in)`` at the tokens in ``mask``, in float32; without a copy where all count."""
    rows = states.flatten(0, -2)
    return (rows if bool(mask.all()) else rows[mask]).float()


def expert_mask(model: nn.Module, path: str, mask: Tensor) -> Tensor:
    """Return ``mask`` for the rows that the site ``path`` has just received: an expert receives some of the tokens."""
    rows = getattr(model.get_submodule(path.rpartition(".")[0]), "rows", None)
    return mask if rows is None else mask[rows.cpu()]


def cache_options(model: PreTrainedModel) -> dict[str, bool]:
    """Return the keywords that turn off the key-value cache, which blocks that run twice would fill twice."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def token_mask(batch: Batch, skip: int) -> Tensor:
    """Return which tokens count ``(samples * window,)``: no padding, and not the first ``skip`` of a window."""
    mask = batch["attention_mask"].bool().clone()
    mask[:, :skip] = False
    return mask.flatten()


@contextmanager
def bypass_blocks(
    blocks: list[nn.Module], form: type, last: Tensor | None = None
) -> Iterator[list[tuple[Tensor, Call]]]:
    """Replace ``blocks`` by the identity and record their inputs; the last one returns ``last`` if given.

    Args:
        form: Tensor or tuple: what a block returns.
    """
    seen: list[tuple[Tensor, Call]] = []
    returned: list[Tensor] = []

    def forward(*arguments, **keywords):
        if arguments:
            states, arguments = arguments[0], arguments[1:]
        else:
            states = keywords.pop("hidden_states")
        seen.append((states, (arguments, keywords)))
        # a new tensor, so that one can see whether the next block receives this very one
        returned.append(last if last is not None and len(seen) == len(blocks) else states.view_as(states))
        return returned[-1] if form is Tensor else (returned[-1], None, None)

    for block in blocks:
        block.forward = forward  # hides the method of the class
    try:
        yield seen
    finally:
        for block in blocks:
            del block.forward
    if len(seen) != len(blocks) or any(one is not two for one, (two, _) in zip(returned, seen[1:], strict=False)):
        raise ValueError(NO_CHAIN)


def _output_form(model: PreTrainedModel, blocks: list[nn.Module], sample: Batch) -> type:
    """Return whether the model expects a Tensor or a tuple from its blocks."""
    for form in (Tensor, tuple):
        try:
            with torch.no_grad(), bypass_blocks(blocks, form):
                base_model(model)(**sample, **cache_options(model))
            return form
        except (ValueError, IndexError, RuntimeError, AttributeError, TypeError):
            continue
    raise ValueError(NO_CHAIN)


def freeze_copy(block: nn.Module) -> nn.Module:
    """Return a copy of ``block`` that no later change reaches."""
    return copy.deepcopy(block).requires_grad_(False)
