"""Permutation search for scattered structures: an order of rows and columns in which a matrix factorises well.

``minimise || W[rows][:, columns] - What ||_F^2`` over both permutations and the factors of ``What``.

Reference: TQCompressor, arXiv 2401.16367. The published code only draws random permutations, its search is a signature (five
iterations, "annealing" or "random"), and the weights come from a checkpoint. This module alternates two steps that never raise
the error:

1. *Fit*: the factors for the current order.
2. *Exchange*: choose rows that may trade places, and assign them to these places at the least cost (a linear assignment).
   Columns likewise.

The plain exchange keeps ``What`` fixed: at place ``s`` row ``i`` costs the distance ``||w_i - What_s||^2``. It stalls early,
because ``What`` was fitted to the current order, and serves bases without a better one (``Trial``). For sums of Kronecker
products the largest factor is eliminated (``KroneckerTrial``): ``W`` is cut into blocks ``x[a, c] (b d)``, the other
factors span a space of blocks with projection ``P``, and the optimal largest factor leaves

    sum over a, c of  x[a, c]^T (1 - P) x[a, c].

If no two of the chosen rows lie in one block, this sum is linear in their assignment: the exchange is exact although the largest
factor follows every move. Every exchange draws one row of each block, so the search ends in a local optimum over such draws
(transversals of the blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import chain, islice, repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors
from tenfold.structure.combinators import Scattered
from tenfold.structure.kronecker import Kronecker
from tenfold.structure.linalg import roots

LARGEST = 512  # rows in one exchange, drawn at random if there are more: an assignment costs nearly their cube
MOST = 16  # exchanges of one side in one round
SIDES: tuple[str, str] = ("rows", "columns")

Orders = dict[str, Tensor]  # side -> which row (column) of W lies at each place


def search(
    structure: Scattered,
    weight: Float[Tensor, "out inner"],
    *,
    rounds: int = 5,
    starts: int = 1,
    seed: int = 0,
) -> Factors:
    """Return index maps and factors of ``structure`` near ``weight (out, in)``, at least as near as with the identity.

    Args:
        structure: a base with full-length maps: of rows, of columns, or of both.
        rounds: number of rounds of exchanges and fits, from every start.
        starts: number of initial orders: by decreasing norm, the identity, then random ones. With three factors or more the
            first is that of the paper's two stages: a pairing, then a pairing of the pairs.
        seed: of all random draws.

    Returns:
        The factors in float64, the maps in int32.

    Raises:
        ImportError: scipy is missing.
        ValueError: the maps are not of full length, or the weight has the wrong shape.
    """
    if tuple(weight.shape) != structure.shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)} but {structure} is {structure.shape} (out, in)")
    if structure.base.shape != structure.shape:
        raise ValueError(f"a permutation needs whole maps, but the base is {structure.base.shape} of {structure.shape}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or Inf; mend or leave out the matrix")
    try:
        from scipy.optimize import linear_sum_assignment as assign
    except ImportError as missing:
        raise ImportError("the permutation search needs scipy: pip install 'tenfold[search]'") from missing
    kind = KroneckerTrial if isinstance(structure.base, Kronecker) else Trial
    first, generator = kind(structure, weight.detach().double().cpu()), torch.Generator().manual_seed(seed)
    drawn = ({s: torch.randperm(first.lengths[s], generator=generator) for s in first.sides} for _ in repeat(0))
    starting = chain(first.search_stages(rounds, seed), [first.sort_by_norm(), {}], drawn)
    trials = [first]
    for number, orders in enumerate(islice(starting, starts)):
        trials.append(first.restart(orders))
        _alternate(trials[-1], assign, torch.Generator().manual_seed(seed + number), rounds)
    best = min(trials, key=lambda trial: trial.error).factors()
    return {name: value.to(weight.device) for name, value in best.items()}


def _alternate(trial: Trial, assign: Callable, generator: torch.Generator, rounds: int) -> None:
    """Exchange rows and columns at the least cost, each time followed by a fit; the error never grows."""
    for _ in range(rounds):
        for side in trial.sides:
            for _ in range(trial.count_exchanges(side)):
                exchange = trial.draw_exchange(side, generator)
                order = exchange.assign_rows(assign)
                if exchange.gains(order).sum() > 0:  # found in float32, the order may be worse
                    trial.move(side, exchange, order)


@dataclass
class Exchange:
    """Rows that may trade places: row ``i`` at place ``s`` costs ``own[i, s] + 2 <items[i], pulls[s]>``, exactly.

    An order gives the row for every place.
    """

    places: tuple[Tensor, ...]  # indices into the order of the trial
    items: Tensor  # (n, features)
    pulls: Tensor  # (n, features)
    own: Tensor  # (n, n)

    def gains(self, order: Tensor) -> Tensor:
        """Return by how much every place lowers the squared error ``(n,)``; the gain of the order is their sum."""
        moved = ((self.items - self.items[order]) * self.pulls).sum(1)
        return self.own.diagonal() - self.own[order, torch.arange(len(order))] + 2 * moved

    def assign_rows(self, assign: Callable) -> Tensor:
        """Return the order of least cost, in float32."""
        costs = self.own.float() + 2 * self.items.float() @ self.pulls.float().T
        return torch.from_numpy(assign(costs.T.numpy())[1])


class Trial:
    """An order of ``W``, the best known factors for it, and their squared ``error``."""

    def __init__(self, structure: Scattered, weight: Tensor, block: dict[str, int] | None = None):
        self.structure, self.weight = structure, weight
        self.lengths = dict(zip(SIDES, structure.shape, strict=True))
        self.block = block or self.lengths  # with blocks of one row the order of rows makes no difference
        self.sides = [side for side in SIDES if getattr(structure, f"map_{side}") and self.block[side] > 1]
        self.reset({})

    def restart(self, orders: Orders) -> Trial:
        """Return another trial, with these orders; sides without one keep the identity."""
        trial = copy(self)
        trial.reset(orders)
        return trial

    def reset(self, orders: Orders) -> None:
        identity = {side: torch.arange(length) for side, length in self.lengths.items()}
        self.orders = identity | {side: orders[side].clone() for side in self.sides if side in orders}
        self.current: Factors = {}
        self.fit(sweeps=50)

    def fit(self, sweeps: int = 5) -> None:
        """Update the factors: the closed form if it is optimal, else ALS from the current ones."""
        maps = {side: self.orders[side].int() for side in self.sides}
        optimal = self.structure.base.optimal
        if not self.current or optimal:
            start = self.structure.fit_at(self.weight, *self.orders.values())
            self.current = start or self.structure.init(1.0, torch.Generator().manual_seed(0), torch.float64)
        self.current = self.current | maps
        if not optimal:
            self.current = self.structure.fit(self.weight, start=self.current, sweeps=sweeps)
        self.error = float((self.weight - self.structure.dense(self.current)).square().sum())

    def count_exchanges(self, side: str) -> int:
        return 1

    def draw_exchange(self, side: str, generator: torch.Generator) -> Exchange:
        """Return the exchange of all rows (columns): ``||w_i - What_s||^2`` without what no order changes."""
        places = _draw_indices(self.lengths[side], generator)
        order, made = self.orders[side][places], self.structure.dense(self.current)
        weight, made = (self.weight, made) if side == "rows" else (self.weight.T, made.T)
        return Exchange((places,), weight[order], -made[order], weight.new_zeros(len(places), len(places)))

    def move(self, side: str, exchange: Exchange, order: Tensor) -> None:
        self.orders[side][exchange.places] = self.orders[side][exchange.places][order]
        self.fit()

    def sort_by_norm(self) -> Orders:
        return {s: self.weight.norm(dim=1 - SIDES.index(s)).argsort(descending=True, stable=True) for s in self.sides}

    def search_stages(self, rounds: int, seed: int) -> list[Orders]:
        return []

    def factors(self) -> Factors:
        return self.current


class KroneckerTrial(Trial):
    """A sum of Kronecker products, its largest factor ``(A x C)`` eliminated; all others together are ``(B x D)``.

    Rows are numbered ``(a, b)`` and columns ``(c, d)``: ``groups["rows"] (A, B)`` and ``groups["columns"] (C, D)`` are the rows
    and columns of ``W`` at each place, and ``blocks (A, C, B, D)`` is ``W`` in this order.
    """

    def __init__(self, structure: Scattered, weight: Tensor):
        base: Any = structure.base  # a Kronecker
        sizes = [a * c for a, c in zip(base.outs, base.ins, strict=True)]
        self.axes = sorted(range(len(sizes)), key=lambda k: k != sizes.index(max(sizes)))  # the largest one first
        self.sizes = {"rows": base.outs, "columns": base.ins}
        outs, ins = ([s[k] for k in self.axes[1:]] for s in self.sizes.values())
        self.small = Kronecker(outs=(math.prod(outs + ins), *outs), ins=(1, *ins), terms=base.terms)
        super().__init__(structure, weight, {"rows": math.prod(outs), "columns": math.prod(ins)})

    def _group(self, order: Tensor, side: str) -> Tensor:
        """Return groups ``(A, B)`` from an order of the base."""
        return order.reshape(self.sizes[side]).permute(self.axes).flatten(1)

    def _ungroup(self, groups: Tensor, side: str) -> Tensor:
        """Return the order of the base from groups ``(A, B)``."""
        sizes = [self.sizes[side][k] for k in self.axes]
        return groups.reshape(sizes).permute([self.axes.index(k) for k in range(len(sizes))]).flatten()

    @cached_property
    def source(self) -> Tensor:
        """``W``, from which the blocks of every start are cut."""
        return self._reduce_fixed(self._reduce_fixed(self.weight, "rows").T, "columns").T

    def _reduce_fixed(self, weight: Tensor, side: str) -> Tensor:
        """Return ``weight`` with the rows of a side without map in groups ``(a, b)``, reduced to few groups.

        Only sums over ``a`` count, so the root of the Gram matrix of the groups is equivalent: 50257 rows of an embedding become
        as many as it has columns.
        """
        if side in self.sides:
            return weight
        flat = weight[self._group(torch.arange(len(weight)), side)].flatten(1)
        few = flat if len(flat) <= flat.shape[1] else roots(flat.T @ flat, 0.0)[0]
        return few.reshape(-1, weight.shape[1])

    def reset(self, orders: Orders) -> None:
        identity = {side: orders.get(side, torch.arange(length)) for side, length in self.lengths.items()}
        self.groups = {side: self._group(order, side).clone() for side, order in identity.items()}
        moved = self.source
        for axis, side in enumerate(SIDES):
            if side in self.sides:
                moved = moved.index_select(axis, self.groups[side].flatten())
        self.blocks = self._cut(moved)
        self.inner: Factors = {}
        self.fit()

    def _cut(self, matrix: Tensor) -> Tensor:
        """Return the blocks ``(A, C, B, D)`` of ``matrix (a b, c d)``."""
        b, d = self.block.values()
        return matrix.reshape(len(matrix) // b, b, -1, d).transpose(1, 2).contiguous()

    def fit(self, sweeps: int = 3) -> None:
        """Update the smaller factors by a fit to the root of ``gram = sum over a, c of x[a, c] x[a, c]^T (B D, B D)``.

        The root has as few rows as a block has elements and the same optimum as all the blocks below each other.
        """
        blocks = self.blocks.flatten(2).flatten(0, 1)
        gram = blocks.T @ blocks
        root = roots(gram, 0.0)[0].reshape(self.small.shape)
        self.inner = self.small.fit(root, start=None if self.small.optimal else self.inner or None, sweeps=sweeps)
        _, values, basis = torch.linalg.svd(self._products(), full_matrices=False)
        basis = basis[values > 1e-10 * values[0]]
        self.complement = torch.eye(len(gram), dtype=gram.dtype) - basis.T @ basis  # 1 - P
        self.error = float((self.complement * gram).sum())

    def _products(self) -> Tensor:
        """Return the Kronecker products of the smaller factors ``(terms, B D)``."""
        parts = [self.inner[name] for name in self.small.factor_names[1:]]
        return torch.stack([reduce(torch.kron, term).flatten() for term in zip(*parts, strict=True)])

    def count_exchanges(self, side: str) -> int:
        return min(MOST, 2 * self.block[side] * max(1, len(self.groups[side]) // LARGEST))

    def draw_exchange(self, side: str, generator: torch.Generator) -> Exchange:
        """Return the exchange of one row ``x (c d)`` of every block.

        At ``(a, b)`` it costs ``x^T Q[b, b] x + 2 x^T sum Q[b, b'] x[a, b']`` with ``Q = 1 - P``, the sum over the rows ``b'``
        of the block that stay.
        """
        blocks, rest = self._view_from(side)
        groups = _draw_indices(len(blocks), generator)
        slots = torch.randint(blocks.shape[2], groups.shape, generator=generator)
        items = blocks[groups, :, slots]  # (n, C, D)
        own = torch.stack([rest[b, :, b] for b in range(len(rest))])  # (B, D, D)
        pulls = torch.bmm(blocks[groups].flatten(2), rest[slots].flatten(2).mT) - items @ own[slots]
        costs = torch.einsum("nde,bde->nb", items.mT @ items, own)
        return Exchange((groups, slots), items.flatten(1), pulls.flatten(1), costs[:, slots])

    def _view_from(self, side: str) -> tuple[Tensor, Tensor]:
        """Return ``blocks (A, C, B, D)`` and ``Q (B, D, B, D)``; for columns ``(C, A, D, B)`` and ``(D, B, D, B)``."""
        rest = self.complement.reshape(*self.block.values(), *self.block.values())
        return (self.blocks, rest) if side == "rows" else (self.blocks.permute(1, 0, 3, 2), rest.permute(1, 0, 3, 2))

    def move(self, side: str, exchange: Exchange, order: Tensor) -> None:
        groups, slots = exchange.places
        blocks, _ = self._view_from(side)
        blocks[groups, :, slots] = exchange.items[order].reshape(len(order), blocks.shape[1], -1)
        self.groups[side][groups, slots] = self.groups[side][groups, slots][order]
        self.fit()

    def sort_by_norm(self) -> Orders:
        """Return orders with the longest rows first in their blocks, so that one row of a block holds most of its energy."""
        orders = super().sort_by_norm()
        return {side: self._ungroup(order.reshape(self.block[side], -1).T, side) for side, order in orders.items()}

    def search_stages(self, rounds: int, seed: int) -> list[Orders]:
        """Split off the last of three or more factors, then factorise the remaining table."""
        (*outs, b), (*ins, d) = self.sizes.values()
        if len(outs) == 1:
            return []

        def search_stage(outs: Sequence[int], ins: Sequence[int], weight: Tensor) -> Factors:
            (out, inner), base = weight.shape, Kronecker(outs=tuple(outs), ins=tuple(ins))
            scattered = replace(self.structure, base=base, out_features=out, in_features=inner)
            return search(scattered, weight, rounds=rounds, seed=seed)

        pairs = search_stage((math.prod(outs), b), (math.prod(ins), d), self.weight)
        table = search_stage(outs, ins, pairs["outer"][0])
        sizes = zip(SIDES, (b, d), strict=True)
        return [{s: pairs[s].reshape(-1, n)[table[s].long()].flatten().long() for s, n in sizes if s in self.sides}]

    def factors(self) -> Factors:
        """Return the factors and maps of the structure; the factors of one term have the same norm."""
        self.fit(sweeps=200)
        ordered = self.weight[self.groups["rows"].flatten()][:, self.groups["columns"].flatten()]
        outer = self._cut(ordered).flatten(2).flatten(0, 1) @ torch.linalg.pinv(self._products(), rtol=1e-10)
        factors = [outer.T, *(self.inner[name] for name in self.small.factor_names[1:])]
        base: Any = self.structure.base
        named = {base.factor_names[k]: value for k, value in zip(self.axes, _equalise_norms(factors), strict=True)}
        shaped = {name: named[name].reshape(base.factor_shapes()[name]) for name in base.factor_names}
        scale = {"scale": outer.new_ones(base.terms)} if base.scaled else {}
        maps = {side: self._ungroup(self.groups[side], side).int() for side in self.structure.index_shapes()}
        return shaped | scale | maps


def _draw_indices(count: int, generator: torch.Generator) -> Tensor:
    """Return all integers below ``count``, or as many random ones as one exchange may hold."""
    return torch.arange(count) if count <= LARGEST else torch.randperm(count, generator=generator)[:LARGEST]


def _equalise_norms(factors: list[Tensor]) -> list[Tensor]:
    """Return factors ``(terms, ...)`` with the same products and one norm per term."""
    norms = torch.stack([factor.flatten(1).norm(dim=1) for factor in factors])
    scales = norms.prod(0) ** (1 / len(factors)) / norms.clamp_min(1e-300)
    return [factor.flatten(1) * scale[:, None] for factor, scale in zip(factors, scales, strict=True)]
