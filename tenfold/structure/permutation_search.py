"""Permutation search for placed structures: an order of rows and columns in which a matrix folds well.

``minimise || W[rows][:, columns] - What ||_F^2`` over both permutations and the factors of ``What``.

Reference: TQCompressor, arXiv 2401.16367. Of its search the published code holds a signature only (five iterations,
"annealing" or "random"): all it does is to draw random permutations, and the weights come from a checkpoint. Rebuilt
here is an alternation of two steps that never raise the error:

1. *Fit*: the factors for the order at hand.
2. *Exchange*: choose rows that may trade places, and assign them to these places at the least cost (a linear
   assignment). Columns likewise.

The plain exchange holds ``What`` fixed: place ``s`` costs row ``i`` the distance ``||w_i - What_s||^2``. It stalls
early, because ``What`` was fitted to the rows where they are, and is left to bases without a better one
(:class:`AnyBase`). For sums of Kronecker products the largest factor is eliminated (:class:`KroneckerBase`): ``W`` is
cut into blocks ``x[a, c] (b d)``, the other factors span a space of blocks with projection ``P``, and the best largest
factor leaves

    sum over a, c of  x[a, c]^T (1 - P) x[a, c].

If no two of the chosen rows lie in one block, this sum is linear in their assignment: the exchange is exact although
the largest factor follows every move. One row of every block is drawn anew each time, so the search ends only where no
such draw (a transversal of the blocks) can be improved. That is still a local optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from tenfold.structure.linalg import square_root

LARGEST = 512  # rows in one exchange; of more, so many are drawn: the price of an assignment is nearly cubic in them
MOST = 16  # exchanges of one side in one round: what blocks with many rows would need is too much
HOT, COLD = 0.3, 0.003  # temperatures of annealing, in root mean squares of the changes that swaps make
SIDES: tuple[str, str] = ("rows", "columns")

Orders = dict[str, Tensor]  # side -> which row (column) of W lies at each place


def search(
    structure: Scattered,
    weight: Float[Tensor, "out inner"],
    *,
    rounds: int = 5,
    method: str = "alternate",
    starts: int = 1,
    sweeps: int = 200,
    seed: int = 0,
) -> Factors:
    """Index maps and factors of ``structure`` near to ``weight (out, in)``; never farther than with the identity.

    Args:
        structure: a base with whole maps: of rows, of columns, or of both.
        rounds: of fits and exchanges, from every start.
        method: "alternate"; or "anneal" to swap at random before: slower, and worth it where the base is no Kronecker.
        starts: how many orders are tried: by falling norm, the identity, then random ones. With three factors or more
            the first is the one that the paper's two stages find: a pairing, then a pairing of the pairs.
        sweeps: of annealing; each may swap every chosen row with another one.
        seed: the same seed gives the same result.

    Returns:
        The factors in float64, the maps in int32.

    Raises:
        ImportError: scipy is missing.
        ValueError: the maps are not whole, the weight has another shape, or there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r} of search; choose one of {', '.join(METHODS)}")
    _check(structure, weight)
    assign, kind = _solver(), KroneckerBase if isinstance(structure.base, Kronecker) else AnyBase
    first = kind(structure, weight.detach().double().cpu())
    trials = [first]
    for number, orders in enumerate(islice(_starts(first, rounds, seed), starts)):
        generator = torch.Generator().manual_seed(seed + number)
        trials.append(first.begun(orders))
        METHODS[method](trials[-1], assign, generator, rounds, sweeps)
    found = min(trials, key=lambda trial: trial.lost).factors()
    return {name: value.to(weight.device) for name, value in found.items()}


def _check(structure: Scattered, weight: Tensor) -> None:
    if tuple(weight.shape) != structure.shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)} but {structure} is {structure.shape} (out, in)")
    if structure.base.shape != structure.shape:
        raise ValueError(f"a permutation needs whole maps, but the base is {structure.base.shape} of {structure.shape}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or Inf; mend or leave out the matrix")


def _solver() -> Callable:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as missing:
        raise ImportError("the permutation search needs scipy: pip install 'tenfold[search]'") from missing
    return linear_sum_assignment


def _starts(first: Trial, rounds: int, seed: int) -> Iterator[Orders]:
    """Orders to start from, the most promising ones first."""
    generator = torch.Generator().manual_seed(seed)
    drawn = ({s: torch.randperm(first.lengths[s], generator=generator) for s in first.sides} for _ in repeat(0))
    return chain(first.staged(rounds, seed), [first.by_norm(), {}], drawn)


def alternate(trial: Trial, assign: Callable, generator: torch.Generator, rounds: int, sweeps: int = 0) -> None:
    """Exchanges of rows and of columns at the least cost, each followed by a fit; the error never grows."""
    for _ in range(rounds):
        for side in trial.sides:
            for _ in range(trial.exchanges(side)):
                exchange = trial.exchange(side, generator)
                order = exchange.assigned(assign)
                if exchange.gains(order).sum() > 0:  # the order was found in float32: it may be no gain at all
                    trial.move(side, exchange, order)


def anneal(trial: Trial, assign: Callable, generator: torch.Generator, rounds: int, sweeps: int) -> None:
    """Random swaps, a worse one with probability ``exp(-growth / temperature)``, then the alternation."""
    for sweep in range(sweeps):
        heat = HOT * (COLD / HOT) ** (sweep / sweeps)
        for side in trial.sides:
            exchange = trial.exchange(side, generator)
            trial.move(side, exchange, exchange.swapped(heat, generator))
    alternate(trial, assign, generator, rounds)


METHODS = {"alternate": alternate, "anneal": anneal}


@dataclass
class Exchange:
    """Rows that may trade places: row ``i`` at place ``s`` costs ``own[i, s] + 2 <items[i], pulls[s]>``, exactly.

    An order names for every place the row that comes there.
    """

    places: tuple[Tensor, ...]  # where the trial keeps them
    items: Tensor  # (n, features)
    pulls: Tensor  # (n, features)
    own: Tensor  # (n, n)

    def gains(self, order: Tensor) -> Tensor:
        """What every place saves of the squared error ``(n,)``; they add up to what the order saves."""
        moved = ((self.items - self.items[order]) * self.pulls).sum(1)
        return self.own.diagonal() - self.own[order, torch.arange(len(order))] + 2 * moved

    def assigned(self, assign: Callable) -> Tensor:
        """The order of least cost, in float32."""
        costs = self.own.float() + 2 * self.items.float() @ self.pulls.float().T
        return torch.from_numpy(assign(costs.T.numpy())[1])

    def swapped(self, heat: float, generator: torch.Generator) -> Tensor:
        """One Metropolis step for every pair of a random pairing: the pairs have no place in common, so gains add."""
        here = torch.arange(len(self.items))
        drawn, order = torch.randperm(len(here), generator=generator), here.clone()
        one, other = drawn[: len(here) // 2], drawn[len(here) // 2 : len(here) // 2 * 2]
        order[one], order[other] = other, one
        gains = self.gains(order)
        gains = gains + gains[order]
        draws = torch.rand(len(order), generator=generator, dtype=gains.dtype)[torch.minimum(here, order)]
        return torch.where(heat * gains.square().mean().sqrt() * draws.log() < gains, order, here)


class AnyBase:
    """An order of ``W``, the best factors known for it, and the squared error ``lost`` that they leave."""

    def __init__(self, structure: Scattered, weight: Tensor, block: dict[str, int] | None = None):
        self.structure, self.weight = structure, weight
        self.lengths = dict(zip(SIDES, structure.shape, strict=True))
        self.block = block or self.lengths  # within blocks of one row the order of rows makes no difference
        self.sides = [side for side in SIDES if getattr(structure, f"map_{side}") and self.block[side] > 1]
        self.begin({})

    def begun(self, orders: Orders) -> Trial:
        """Another trial, with these orders; a side without one stays as it is."""
        trial = copy(self)
        trial.begin(orders)
        return trial

    def begin(self, orders: Orders) -> None:
        identity = {side: torch.arange(length) for side, length in self.lengths.items()}
        self.orders = identity | {side: orders[side].clone() for side in self.sides if side in orders}
        self.current: Factors = {}
        self.fit(sweeps=50)

    def fit(self, sweeps: int = 5) -> None:
        """The closed form where it is the nearest, else alternating least squares from the factors so far."""
        maps = {side: self.orders[side].int() for side in self.sides}
        nearest = self.structure.base.optimal
        if not self.current or nearest:
            start = self.structure.fitted(self.weight, *self.orders.values())
            self.current = start or self.structure.init(1.0, torch.Generator().manual_seed(0), torch.float64)
        self.current = self.current | maps
        if not nearest:
            self.current = self.structure.fit(self.weight, start=self.current, sweeps=sweeps)
        self.lost = float((self.weight - self.structure.dense(self.current)).square().sum())

    def exchanges(self, side: str) -> int:
        """How many make one round."""
        return 1

    def exchange(self, side: str, generator: torch.Generator) -> Exchange:
        """All rows, or all columns: ``||w_i - What_s||^2`` less what does not depend on the order."""
        places = _drawn(self.lengths[side], generator)
        order, made = self.orders[side][places], self.structure.dense(self.current)
        weight, made = (self.weight, made) if side == "rows" else (self.weight.T, made.T)
        return Exchange((places,), weight[order], -made[order], weight.new_zeros(len(places), len(places)))

    def move(self, side: str, exchange: Exchange, order: Tensor) -> None:
        """Trade places, and fit."""
        self.orders[side][exchange.places] = self.orders[side][exchange.places][order]
        self.fit()

    def by_norm(self) -> Orders:
        """Every side by falling norm."""
        return {s: self.weight.norm(dim=1 - SIDES.index(s)).argsort(descending=True, stable=True) for s in self.sides}

    def staged(self, rounds: int, seed: int) -> list[Orders]:
        """Orders found in steps, where there is a way to."""
        return []

    def factors(self) -> Factors:
        """The factors and maps of the structure."""
        return self.current


class KroneckerBase(AnyBase):
    """A sum of Kronecker products, its largest factor ``(A x C)`` eliminated; all others together are ``(B x D)``.

    In here rows are numbered ``(a, b)`` and columns ``(c, d)``: ``groups["rows"] (A, B)`` and ``groups["columns"]
    (C, D)`` say which row and column of ``W`` is where, and ``blocks (A, C, B, D)`` is ``W`` in this order.
    """

    def __init__(self, structure: Scattered, weight: Tensor):
        base: Any = structure.base  # a Kronecker
        sizes = [a * c for a, c in zip(base.outs, base.ins, strict=True)]
        self.axes = sorted(range(len(sizes)), key=lambda k: k != sizes.index(max(sizes)))  # the largest one first
        self.sizes = {"rows": base.outs, "columns": base.ins}
        outs, ins = ([s[k] for k in self.axes[1:]] for s in self.sizes.values())
        self.small = Kronecker(outs=(math.prod(outs + ins), *outs), ins=(1, *ins), terms=base.terms)
        super().__init__(structure, weight, {"rows": math.prod(outs), "columns": math.prod(ins)})

    def _grouped(self, order: Tensor, side: str) -> Tensor:
        """``(A, B)``, from an order of the base."""
        return order.reshape(self.sizes[side]).permute(self.axes).flatten(1)

    def _flat(self, groups: Tensor, side: str) -> Tensor:
        """The order of the base, from ``(A, B)``."""
        sizes = [self.sizes[side][k] for k in self.axes]
        return groups.reshape(sizes).permute([self.axes.index(k) for k in range(len(sizes))]).flatten()

    @cached_property
    def source(self) -> Tensor:
        """``W``, from which the blocks of every start are cut."""
        return self._settled(self._settled(self.weight, "rows").T, "columns").T

    def _settled(self, weight: Tensor, side: str) -> Tensor:
        """``weight`` with rows that stay brought into groups ``(a, b)``, and the groups made few.

        Only sums over ``a`` count, so the root of the Gram matrix of the groups says as much as they do: 50257 rows of
        an embedding become as many as it has columns.
        """
        if side in self.sides:
            return weight
        flat = weight[self._grouped(torch.arange(len(weight)), side)].flatten(1)
        few = flat if len(flat) <= flat.shape[1] else square_root(flat.T @ flat)
        return few.reshape(-1, weight.shape[1])

    def begin(self, orders: Orders) -> None:
        identity = {side: orders.get(side, torch.arange(length)) for side, length in self.lengths.items()}
        self.groups = {side: self._grouped(order, side).clone() for side, order in identity.items()}
        moved = self.source
        for axis, side in enumerate(SIDES):
            if side in self.sides:
                moved = moved.index_select(axis, self.groups[side].flatten())
        self.blocks = self._cut(moved)
        self.inner: Factors = {}
        self.fit()

    def _cut(self, matrix: Tensor) -> Tensor:
        """The blocks ``(A, C, B, D)`` of ``matrix (a b, c d)``."""
        b, d = self.block.values()
        return matrix.reshape(len(matrix) // b, b, -1, d).transpose(1, 2).contiguous()

    def fit(self, sweeps: int = 3) -> None:
        """The smaller factors, by a fit to the root of ``gram = sum over a, c of x[a, c] x[a, c]^T (B D, B D)``.

        The root has as few rows as a block has entries and the same best factors as all the blocks below each other.
        """
        blocks = self.blocks.flatten(2).flatten(0, 1)
        gram = blocks.T @ blocks
        root = square_root(gram).reshape(self.small.shape)
        self.inner = self.small.fit(root, start=None if self.small.optimal else self.inner or None, sweeps=sweeps)
        _, values, basis = torch.linalg.svd(self._spanning(), full_matrices=False)
        basis = basis[values > 1e-10 * values[0]]
        self.rest = torch.eye(len(gram), dtype=gram.dtype) - basis.T @ basis
        self.lost = float((self.rest * gram).sum())

    def _spanning(self) -> Tensor:
        """The Kronecker products of the smaller factors ``(terms, B D)``."""
        parts = [self.inner[name] for name in self.small.factor_names[1:]]
        return torch.stack([reduce(torch.kron, term).flatten() for term in zip(*parts, strict=True)])

    def exchanges(self, side: str) -> int:
        """Twice the rows of a block, and more where one exchange can't hold a row of every block."""
        return min(MOST, 2 * self.block[side] * max(1, len(self.groups[side]) // LARGEST))

    def exchange(self, side: str, generator: torch.Generator) -> Exchange:
        """One row ``x (c d)`` of every block: at ``(a, b)`` it costs ``x^T Q[b, b] x + 2 x^T sum Q[b, b'] x[a, b']``.

        ``Q = 1 - P``, and the sum is over the rows ``b'`` of the block that stay.
        """
        blocks, rest = self._seen(side)
        groups = _drawn(len(blocks), generator)
        slots = torch.randint(blocks.shape[2], groups.shape, generator=generator)
        items = blocks[groups, :, slots]  # (n, C, D)
        own = torch.stack([rest[b, :, b] for b in range(len(rest))])  # (B, D, D)
        pulls = torch.bmm(blocks[groups].flatten(2), rest[slots].flatten(2).mT) - items @ own[slots]
        costs = torch.einsum("nde,bde->nb", items.mT @ items, own)
        return Exchange((groups, slots), items.flatten(1), pulls.flatten(1), costs[:, slots])

    def _seen(self, side: str) -> tuple[Tensor, Tensor]:
        """``blocks (A, C, B, D)`` and ``Q (B, D, B, D)``; for columns ``(C, A, D, B)`` and ``(D, B, D, B)``."""
        rest = self.rest.reshape(*self.block.values(), *self.block.values())
        return (self.blocks, rest) if side == "rows" else (self.blocks.permute(1, 0, 3, 2), rest.permute(1, 0, 3, 2))

    def move(self, side: str, exchange: Exchange, order: Tensor) -> None:
        """Trade places, and fit."""
        groups, slots = exchange.places
        blocks, _ = self._seen(side)
        blocks[groups, :, slots] = exchange.items[order].reshape(len(order), blocks.shape[1], -1)
        self.groups[side][groups, slots] = self.groups[side][groups, slots][order]
        self.fit()

    def by_norm(self) -> Orders:
        """The longest rows first in their blocks, so that one row of every block holds most of its energy."""
        return {s: self._flat(order.reshape(self.block[s], -1).T, s) for s, order in super().by_norm().items()}

    def staged(self, rounds: int, seed: int) -> list[Orders]:
        """For three factors or more: the last one split off, then the table that is left folded by itself.

        Reference: the stages 0 and 2 of TQCompressor, whose two orders of the features are one.
        """
        (*outs, b), (*ins, d) = self.sizes.values()
        if len(outs) == 1:
            return []

        def stage(outs: Sequence[int], ins: Sequence[int], weight: Tensor) -> Factors:
            (out, inner), base = weight.shape, Kronecker(outs=tuple(outs), ins=tuple(ins))
            placed = replace(self.structure, base=base, out_features=out, in_features=inner)
            return search(placed, weight, rounds=rounds, seed=seed)

        pairs = stage((math.prod(outs), b), (math.prod(ins), d), self.weight)
        folded = stage(outs, ins, pairs["outer"][0])
        sizes = zip(SIDES, (b, d), strict=True)
        return [{s: pairs[s].reshape(-1, n)[folded[s].long()].flatten().long() for s, n in sizes if s in self.sides}]

    def factors(self) -> Factors:
        """The factors and maps of the structure; the factors of one term have the same norm."""
        self.fit(sweeps=200)
        ordered = self.weight[self.groups["rows"].flatten()][:, self.groups["columns"].flatten()]
        outer = self._cut(ordered).flatten(2).flatten(0, 1) @ torch.linalg.pinv(self._spanning(), rtol=1e-10)
        found = [outer.T, *(self.inner[name] for name in self.small.factor_names[1:])]
        base: Any = self.structure.base
        named = {base.factor_names[k]: value for k, value in zip(self.axes, _balanced(found), strict=True)}
        shaped = {name: named[name].reshape(base.factor_shapes()[name]) for name in base.factor_names}
        scale = {"scale": outer.new_ones(base.terms)} if base.scaled else {}
        return (
            shaped | scale | {side: self._flat(self.groups[side], side).int() for side in self.structure.index_shapes()}
        )


Trial = AnyBase | KroneckerBase


def _drawn(count: int, generator: torch.Generator) -> Tensor:
    """All numbers below ``count``, or as many random ones as one exchange may hold."""
    return torch.arange(count) if count <= LARGEST else torch.randperm(count, generator=generator)[:LARGEST]


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same products, with factors ``(terms, ...)`` of one norm each."""
    norms = torch.stack([factor.flatten(1).norm(dim=1) for factor in factors])
    shared = norms.prod(0) ** (1 / len(factors)) / norms.clamp_min(1e-300)
    return [factor.flatten(1) * share[:, None] for factor, share in zip(factors, shared, strict=True)]
