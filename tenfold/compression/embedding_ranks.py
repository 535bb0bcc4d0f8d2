"""Fewer dimensions for the embeddings of rare tokens, in a model whose output head is tied to its embedding.

The tokens are sorted by the mean probability ``p_v`` that the model predicts for them, and parted into tiers. The rows ``w_v`` of
the embedding of one tier lie in a subspace, ``w_v ~ left_v right``, that minimises

    ``sum_v p_v^a (w_v - left_v right) C (w_v - left_v right)^T``,

the mean squared error of the logits for ``a = 1`` where ``C`` is the second moment of the states that the head reads. Its sum
over the tiers gives their ranks at one size of the embedding. What every size loses is measured: the divergence of the
predictions of the original model with such an embedding, at its input and in its head, on tokens that ``p`` and ``C`` are not
from.

Reference: GroupReduce, arXiv 1806.06950 (low rank by frequency).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.compression.activations import Activations
from tenfold.compression.allocation import TradeoffCurve, allocate_by_loss
from tenfold.compression.divergence import ROWS, batches_with_tokens, divergence
from tenfold.compression.weight_source import Weights
from tenfold.models.distributed import all_reduce, all_reduce_number
from tenfold.models.plan import SitePlan
from tenfold.models.recipe import Budget
from tenfold.models.sites import FACTORIZED, Site, find_sites, is_tied
from tenfold.models.surgery import finish, install
from tenfold.structure import Dense, Factors, LowRank, Scattered, Stacked, Structure
from tenfold.structure.linalg import roots, svd

TIERS = 8  # of as many tokens each
SIZES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # shares of the embedding's parameters, whose losses are measured
DAMPING = 0.01  # of the mean variance, added to that of every direction
POWER = 0.7  # a: mean probabilities rate rare tokens too low, whose own states are few (research/log.md)
RARE = 1e-4  # of the mean weight, which no token's weight is below


def find_embedding(model: PreTrainedModel, budget: Budget | None) -> Site | None:
    """Return the embedding whose rows may lose dimensions: it is whole, the head is tied to it, and the budget counts it."""
    counted = budget is not None and budget.shapes == "free" and budget.of in ("model", "sites", "bytes")
    if not counted or model.get_output_embeddings() is None or not is_tied(model):
        return None
    embeddings = [site for site in find_sites(model) if site.role == "embed"]
    whole = len(embeddings) == 1 and not isinstance(model.get_submodule(embeddings[0].path), FACTORIZED)
    return embeddings[0] if whole else None


class EmbeddingRanks:
    """Choice among tiers of the embedding of one model: statistics, the loss of every option, and the factors.

    Args:
        site: result of ``find_embedding``.
    """

    def __init__(self, model: PreTrainedModel, site: Site, weights: Weights):
        self.model, self.site, self.weights = model, site, weights

    @torch.no_grad()
    def collect(self, activations: Activations, tokens: int) -> dict[str, Tensor]:
        """Return what ``options`` and ``fit`` go by.

        ``weights (vocabulary,)`` are ``p^a``; ``root`` is ``C^(1/2)``, damped, and ``inverse`` its inverse; with ``U S V^T`` the
        decomposition of the weighted rows ``p^(a/2) w C^(1/2)`` of tier ``k``, ``basis_k`` is ``V``, and ``squares[k]`` ``S^2``.

        Args:
            activations: with the states behind the last block.
            tokens: about how many are left out at the beginning, to measure on; none where there are no others.
        """
        size, width = self.site.shape
        total, moment = torch.zeros(size, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        count, last = batches_with_tokens(activations, tokens), len(activations.blocks)
        head: Any = self.model.get_output_embeddings()
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        try:
            with self.weights.outside():
                for k in range(count if count < len(activations.batches) else 0, len(activations.batches)):
                    states, batch = activations.load(f"before-{last}-{k}"), activations.batches[k]
                    mask = activations.masks[k].reshape(batch["attention_mask"].shape)
                    for sample in range(len(states)):  # one at a time: logits are large
                        at = mask[sample].to(states.device)
                        logits = activations.run_head(states[sample : sample + 1], activations.to_device(batch, sample))
                        for some in logits[0][at].split(ROWS):
                            total += some.float().softmax(-1).sum(0).double().cpu()
                        rows = seen.pop().flatten(0, -2)[at].float()
                        moment += (rows.T @ rows).double().cpu()
        finally:
            handle.remove()
        weights, moment = all_reduce(total) ** POWER, all_reduce(moment)
        moment += DAMPING * moment.diagonal().mean() * torch.eye(width, dtype=moment.dtype)
        root, inverse = roots(moment / moment.trace() * width)
        found = {"weights": (weights / weights.mean()).clamp_min(RARE), "root": root, "inverse": inverse}
        squares = []
        for k, tier in enumerate(_order(found).tensor_split(TIERS)):
            _, values, vectors = svd(found["weights"][tier].sqrt()[:, None] * (self._rows(tier) @ root), width)
            found[f"basis_{k}"] = vectors.T
            squares.append(values.square())
        return found | {"squares": torch.stack(squares)}

    def options(self, statistics: dict[str, Tensor]) -> list[Structure]:
        """Return the structure of least error of every size: the ranks of the tiers come from one allocation."""
        (size, width), curves, found = self.site.shape, list[TradeoffCurve](), list[Structure]()
        for k, rows in enumerate(torch.arange(size).tensor_split(TIERS)):
            tails = [*statistics["squares"][k].flip(0).cumsum(0).flip(0).tolist(), 0.0]
            ranks = range(1, max(2, len(rows) * width // (len(rows) + width)))
            parts: list[Structure] = [LowRank(out_features=len(rows), in_features=width, rank=rank) for rank in ranks]
            parts.append(Dense(out_features=len(rows), in_features=width))
            losses = np.array([tails[rank] for rank in ranks] + [0.0])
            curves.append(TradeoffCurve(str(k), np.array([part.numel for part in parts]), losses, parts))
        for share in SIZES:
            parts = list(allocate_by_loss(curves, share * size * width).values())
            dense = list(takewhile(lambda part: isinstance(part, Dense), parts))
            if len(dense) > 1:  # tiers of frequent tokens that are left whole are one
                rows = sum(part.shape[0] for part in dense)
                parts = [Dense(out_features=rows, in_features=width), *parts[len(dense) :]]
            base = Stacked(parts=tuple(parts))
            found.append(Scattered(base=base, out_features=size, in_features=width, map_columns=False))
        return found

    @property
    def weight(self) -> Tensor:
        """The matrix of the embedding."""
        return self.model.get_submodule(self.site.path).get_parameter("weight")

    def _rows(self, tokens: Tensor) -> Tensor:
        return self.weight.detach()[tokens.to(self.weight.device)].cpu().double()

    def fit(self, structure: Any, statistics: dict[str, Tensor]) -> Factors:
        """Return the factors of ``structure``, optimal in every tier."""
        order, parts = _order(statistics), structure.base.parts
        factors: Factors = {"rows": order.int()}
        tiers = order.tensor_split(TIERS)
        whole = TIERS - len(parts) + 1 if isinstance(parts[0], Dense) else 0  # tiers in the first part
        groups = [torch.cat(tiers[:whole]), *tiers[whole:]] if whole else tiers
        for k, (part, tokens) in enumerate(zip(parts, groups, strict=True)):
            if isinstance(part, Dense):
                factors[f"part_{k}_matrix"] = self._rows(tokens).float()
                continue
            basis = statistics[f"basis_{TIERS - len(parts) + k}"][:, : part.rank]
            factors[f"part_{k}_left"] = (self._rows(tokens) @ (statistics["root"] @ basis)).float()
            factors[f"part_{k}_right"] = (basis.T @ statistics["inverse"]).float()
        return factors

    @torch.no_grad()
    def curve(self, activations: Activations, statistics: dict[str, Tensor], tokens: int) -> TradeoffCurve:
        """Return the options with their measured losses, on about ``tokens`` tokens."""
        count, losses = range(batches_with_tokens(activations, tokens)), list[float]()
        with self.weights.outside():
            options = self.options(statistics)
        states: list[list[Tensor]] = [[] for _ in count]
        for structure in options:
            with self.weights.outside(), self._with(structure, statistics):
                for k in count:
                    states[k].append(activations.run_to_first_block(activations.batches[k])[0][0])
        for number, path in enumerate(activations.paths):
            block = activations.blocks[number]
            with self.weights.at(path):
                states = [[activations.run_block(number, block, x, k) for x in row] for k, row in enumerate(states)]
        last = len(activations.blocks)
        originals = [activations.load(f"before-{last}-{k}") for k in count]
        for j, structure in enumerate(options):
            losses.append(self._divergence(activations, originals, [row[j] for row in states], structure, statistics))
        whole = self.site.shape[0] * self.site.shape[1]
        costs = np.array([structure.numel for structure in options] + [whole])
        indices = np.array([structure.index_numel for structure in options] + [0])
        return TradeoffCurve(self.site.path, costs, np.array([*losses, 0.0]), [*options, None], indices=indices)

    def _divergence(self, activations: Activations, originals, states, structure: Structure, statistics) -> float:
        """Return ``KL(original || with the structure)`` in nats a token, from states behind the last block."""
        summed, tokens = 0.0, 0
        for k, (original, other) in enumerate(zip(originals, states, strict=True)):
            batch = activations.batches[k]
            mask = activations.masks[k].reshape(batch["attention_mask"].shape)
            with self.weights.outside():
                logits = [
                    activations.run_head(x[None], activations.to_device(batch, n)) for n, x in enumerate(original)
                ]
                with self._with(structure, statistics):
                    for n, x in enumerate(other):
                        at = mask[n].to(x.device)
                        found = activations.run_head(x[None], activations.to_device(batch, n))
                        summed, tokens = summed + divergence(logits[n][0][at], found[0][at]), tokens + int(at.sum())
        return all_reduce_number(summed) / max(1, all_reduce_number(tokens))

    @contextmanager
    def _with(self, structure: Structure, statistics: dict[str, Tensor]) -> Iterator[None]:
        """Put the matrix of ``structure`` in the place of the embedding's within the context."""
        weight, before = self.weight, self.weight.data
        weight.data = structure.dense(self.fit(structure, statistics)).to(before)
        try:
            yield
        finally:
            weight.data = before

    def install(self, structure: Structure | None, statistics: dict[str, Tensor], recipe: str) -> None:
        """Put ``structure`` in the place of the embedding and of its head; nothing where it is None."""
        if structure is not None:
            with self.weights.outside():
                factors = self.fit(structure, statistics)
            install(self.model, SitePlan(self.site, structure, bias=False), factors)
            finish(self.model, recipe)


def _order(statistics: dict[str, Tensor]) -> Tensor:
    """Return the tokens, the likeliest first."""
    return statistics["weights"].argsort(descending=True, stable=True)
