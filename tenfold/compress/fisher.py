"""What the original model tells of every block: the moments of its inputs, and how much every output matters.

The forward pass leaves the hidden states in front of every block on the shelf. The backward pass takes the blocks one at a
time, the last one first, each from those states and the gradient that the block behind it has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold.compress.activations import (
    Streams,
    adding,
    kept_here,
    passing,
    rows_of,
    without_cache,
)
from tenfold.compress.evidence import Evidence
from tenfold.compress.moments import MomentAccumulator, Moments, checked, like_others
from tenfold.models.distributed import all_reduce, all_reduce_number, num_processes
from tenfold.models.experts import expert_of
from tenfold.models.sites import shape_of
from tenfold.models.text_mode import is_causal_lm

AT_ONCE = 128  # tokens that are drawn at once


@dataclass
class BlockStatistics:
    """What a backward pass tells of one block.

    Args:
        moments: of the inputs of its stages, by their numbers.
        matters: ``{path: G}`` of its sites and of itself.
        evidence: ``{path: [(inputs, gradients at the outputs)]}`` of its sites, one pair a batch.
    """

    moments: dict[int, Moments]
    matters: dict[str, Tensor]
    evidence: Evidence


class FisherPass:
    """Forward and backward through the original model.

    ``G (out, out)`` is the mean over tokens of ``g g^T``, ``g`` the gradient of the loss at a site's output. For a language
    model the loss is the cross entropy of tokens that the model itself draws, so that ``G`` is a block of the Fisher
    information: an error ``E`` of the site costs about ``1/2 tr(G E C E^T)`` nats a token, ``C`` the second moment of its
    inputs. A model without logits is probed with random directions of its last hidden states.

    Reference: Martens and Grosse 2015 (K-FAC), arXiv 1503.05671.
    """

    def __init__(self, streams: Streams, seed: int = 0, clip: bool = False):
        self.streams, self.seed, self.clip = streams, seed, clip
        for k in range(len(streams.batches)):
            streams.shelf.put(f"before-0-{k}", streams.states(k)[0])
            streams.shelf.drop(f"first-{k}")
        self.stand_before(0)
        self.tokens = int(all_reduce_number(sum(int(kept.sum()) for kept in streams.kept)))

    def stand_before(self, number: int) -> None:
        """In front of block ``number``, where a run that was interrupted has been already."""
        self.streams.names = [(f"before-{number}-{k}",) * 2 for k in range(len(self.streams.batches))]

    @torch.no_grad()
    def forward(self, number: int, stages: list[list[str]]) -> None:
        """Behind block ``number``; what it gets stays.

        Raises:
            ValueError: it returns NaN or Inf; the first of its sites that gets any is named.
        """
        streams = self.streams
        for k in range(len(streams.batches)):
            out = streams.run(number, streams.blocks[number], streams.states(k)[0], k)
            if not bool(torch.isfinite(out).all()):
                self._blame(number, stages, k)
            streams.shelf.put(f"before-{number + 1}-{k}", out)
        self.stand_before(number + 1)

    def _blame(self, number: int, stages: list[list[str]], batch: int) -> None:
        sums: dict[str, MomentAccumulator] = {}
        hooks = _Hooks(self.streams.model, [stage[0] for stage in stages], set(), sums, {}, {})
        with hooks.on(self.streams.kept[batch]):
            states = self.streams.shelf.get(f"before-{number}-{batch}").to(self.streams.device)
            self.streams.run(number, self.streams.blocks[number], states, batch)
        where = f"{number}, batch {batch} of the calibration text,"
        for path in sums:
            checked(sums[path].moments(), path, where)
        raise ValueError(f"block {where} returns NaN or Inf; mend its weights, or try --dtype float32 or other text")

    @torch.no_grad()
    def nats(self, samples: int = 8) -> float | None:
        """Behind the last block: what the model needs for a token of the text, over so many samples of every process.

        None where it predicts no next token.
        """
        streams, found, tokens, left = self.streams, 0.0, 0, samples
        if not is_causal_lm(streams.model) or streams.model.get_output_embeddings() is None:
            return None
        for k, batch in enumerate(streams.batches):
            states = streams.states(k)[0]
            for row in range(min(left, len(states))):
                given = {name: value[row : row + 1].to(streams.device) for name, value in batch.items()}
                with passing(streams.blocks, streams.form, states[row : row + 1]), streams.autocast():
                    logits = streams.model(**given, **without_cache(streams.model)).logits[0, :-1]
                read = given["attention_mask"][0].bool()
                ids, both = given["input_ids"][0, 1:], read[1:] & read[:-1]
                found += float(cross_entropy(logits[both].float(), ids[both], reduction="sum"))
                tokens += int(both.sum())
            left -= len(states)
            if left <= 0:
                break
        return all_reduce_number(found) / max(1.0, all_reduce_number(tokens))

    def turn(self) -> None:
        """Behind the last block: the gradient of the loss at what it returns."""
        streams = self.streams
        for k, batch in enumerate(streams.batches):
            states, found = streams.states(k)[0], []
            for row in range(len(states)):  # one sequence at a time: the logits of a batch are large
                given = {name: value[row : row + 1] for name, value in batch.items()}
                # by its tokens, so that what is drawn depends neither on who runs it nor on what runs beside it
                read = given["input_ids"][given["attention_mask"].bool()].cpu().numpy()
                generator = torch.Generator().manual_seed(self.seed + crc32(read.tobytes()))
                given = {name: value.to(streams.device) for name, value in given.items()}
                found.append(self._turned(states[row : row + 1], given, generator))
            streams.shelf.put(f"gradient-{len(streams.blocks)}-{k}", torch.cat(found))

    def _turned(self, states: Tensor, given: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        leaf = states.clone().requires_grad_()
        with torch.enable_grad(), passing(self.streams.blocks, self.streams.form, leaf), self.streams.autocast():
            ends, by = _gradient(self.streams.model(**given), given["attention_mask"].bool().cpu(), generator)
            return torch.autograd.grad(ends, leaf, by)[0]

    def backward(
        self, number: int, path: str, stages: list[list[str]], weighed: set[str] | None, evident: set[str] = frozenset()
    ) -> BlockStatistics:
        """Through block ``number``, which is ``path``; :meth:`leave` it then.

        Args:
            stages: its sites; those that read the same together.
            weighed: for which of them ``G`` is wanted; None: there is no gradient.
            evident: for which of these the gradients themselves are wanted.
        """
        streams, block, gradients = self.streams, self.streams.blocks[number], weighed is not None
        weighed = weighed or set()
        sums: dict[str, MomentAccumulator] = {}
        found: dict[str, Tensor] = {}
        kind = torch.bfloat16 if streams.bfloat16 else torch.float32
        evidence: Evidence = {path: [] for path in evident if gradients}
        hooks = _Hooks(streams.model, [stage[0] for stage in stages], weighed, sums, found, evidence, self.clip, kind)
        for k in range(len(streams.batches)):
            states = streams.shelf.get(f"before-{number}-{k}").to(streams.device).requires_grad_(gradients)
            with torch.set_grad_enabled(gradients), hooks.on(streams.kept[k]):
                out = streams.run(number, block, states, k)
                if gradients:
                    behind = streams.shelf.get(f"gradient-{number + 1}-{k}").to(streams.device)
                    rows = rows_of(behind, streams.kept[k])
                    found[path] = found.get(path, 0) + (rows.T @ rows).cpu().double()
                    streams.shelf.put(f"gradient-{number}-{k}", torch.autograd.grad(out, states, behind)[0])
        first = [stage[0] for stage in stages]
        widths = {path: shape_of(streams.model.get_submodule(path))[1] for path in first}
        seen = [
            checked(sums.get(path, MomentAccumulator(widths[path], True)).of_all().moments(), path, number)
            for path in first
        ]
        matters = self._over_all(found, path, weighed)
        experts = [k for k, path in enumerate(first) if expert_of(path) is not None]
        known = dict(enumerate(seen)) | dict(zip(experts, like_others([seen[k] for k in experts]), strict=True))
        shapes = {path: shape_of(streams.model.get_submodule(path))[0] for path in weighed}
        return BlockStatistics(known, _with_unseen(matters, shapes), evidence)

    def leave(self, number: int) -> None:
        """Drop what is not needed once block ``number`` is done."""
        for k in range(len(self.streams.batches)):
            self.streams.shelf.drop(f"before-{number}-{k}")
            self.streams.shelf.drop(f"gradient-{number + 1}-{k}")

    def _over_all(self, found: dict[str, Tensor], block: str, weighed: set[str]) -> dict[str, Tensor]:
        """Means over the tokens of all processes; a site that no process saw has none."""
        if num_processes() > 1:
            sizes = {path: shape_of(self.streams.model.get_submodule(path))[0] for path in sorted(weighed)}
            sizes |= {block: len(found[block])} if block in found else {}  # every process has tokens
            for path, size in sizes.items():
                value, seen = (
                    found.get(path, torch.zeros(size, size, dtype=torch.float64)),
                    all_reduce_number(path in found),
                )
                if seen:
                    found[path] = all_reduce(value)
        return {path: value / max(1, self.tokens) for path, value in found.items()}


def _with_unseen(matters: dict[str, Tensor], shapes: dict[str, int]) -> dict[str, Tensor]:
    """An expert that saw no token matters as the others do on average: the text says nothing against it."""
    for path in sorted(shapes.keys() - matters.keys()):
        part, size = f".{path.rpartition('.')[2]}", shapes[path]
        others = [value for name, value in matters.items() if expert_of(name) is not None and name.endswith(part)]
        alike = [value for value in others if len(value) == size]
        if alike:
            matters[path] = torch.stack(alike).mean(0)
        elif others:
            mean = sum(float(value.diagonal().mean()) for value in others) / len(others)
            matters[path] = mean * torch.eye(size, dtype=torch.float64)
    return matters


def _gradient(out, kept: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the model returns, and the gradient of the loss by it: of cross entropy ``softmax - one hot``, in place."""
    logits = getattr(out, "logits", None)
    if logits is None:
        states = out.last_hidden_state
        by = torch.zeros_like(states)
        by[kept] = torch.randn((int(kept.sum()), states.shape[-1]), generator=generator).to(states)
        return states, by
    by = logits.detach().float().softmax(-1)
    if not bool(torch.isfinite(by).all()):
        raise ValueError(
            "the logits of the original model hold NaN or Inf; mend the weights of its head, or try --dtype float32"
        )
    for some in kept.nonzero().split(AT_ONCE):  # drawing takes three times the memory of what it draws from
        rows = tuple(some.to(by.device).T)
        drawn = torch.multinomial(by[rows].cpu(), 1, generator=generator)[:, 0]
        by[(*rows, drawn.to(by.device))] -= 1.0
    by[~kept] = 0.0
    return logits, by.to(logits.dtype)


def clipped(rows: Tensor, least: float = 0.1, most: float = 10.0) -> Tensor:
    """Scale the vectors ``rows (tokens, width)`` so that their norms are ``least`` to ``most`` times the mean norm.

    Vectors of zeros stay, and do not count for the mean.

    Reference: KFAC-SVD (Thoma et al., ICML 2026), its published code.
    """
    norms = rows.norm(dim=1, keepdim=True)
    mean = norms.sum() / (norms > 0).sum().clamp_min(1)
    return rows * torch.where(norms > 0, norms.clamp(least * mean, most * mean) / norms, 0.0)


@dataclass
class _Hooks:
    """Add up the inputs of the sites ``first``, and the gradients at the outputs of the sites ``weighed``."""

    model: nn.Module
    first: list[str]
    weighed: set[str]
    sums: dict[str, MomentAccumulator]
    found: dict[str, Tensor]
    evidence: Evidence
    clip: bool = False
    kind: torch.dtype = torch.float32  # of the evidence

    @contextmanager
    def on(self, kept: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for path in self.first:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(adding(self.sums, self.model, path, kept)).remove)
            for path in self.weighed:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_hook(self._outputs(path, kept)).remove)
            yield

    def _outputs(self, path: str, kept: Tensor) -> Callable:
        def hook(module, arguments, out) -> None:
            here, inputs = kept_here(self.model, path, kept), arguments[0].detach()
            out.register_hook(lambda gradient: self._add(path, rows_of(inputs, here), rows_of(gradient, here)))

        return hook

    def _add(self, path: str, inputs: Tensor, rows: Tensor) -> None:
        if path in self.evidence:
            self.evidence[path].append((inputs.to(self.kind), rows.to(self.kind)))
        rows = clipped(rows) if self.clip else rows
        self.found[path] = self.found.get(path, 0) + (rows.T @ rows).cpu().double()
