"""Permutation search for placed structures: an order of rows and columns in which a matrix folds well.

``minimise || W[rows][:, columns] - What ||_F^2`` over both permutations and the factors of ``What``.

Reference: TQCompressor, arXiv 2401.16367. Of its search the published code holds a signature only (five iterations,
"annealing" or "random"); all it does is to draw random permutations, and the weights come from a checkpoint. Rebuilt
here is an alternation of two steps that never raise the error:

1. *Fit*: the factors for the order at hand.
2. *Exchange*: choose rows that may trade places, and assign them to these places at the least cost (a linear
   assignment). Columns likewise.

The plain exchange holds ``What`` fixed: place ``s`` costs row ``i`` the distance ``||w_i - What_s||^2``. It stalls early,
because ``What`` was fitted to the rows where they are; only bases without a formula of their own are left with it
(:class:`AnyBase`). For sums of Kronecker products the largest factor is eliminated (:class:`KroneckerBase`): ``W`` is cut
into blocks ``x[a, c] (b d)``, the other factors span a space of blocks with projection ``P``, and the best largest factor
leaves

    sum over a, c of  x[a, c]^T (1 - P) x[a, c].

If no two of the chosen rows lie in one block, then this sum is linear in their assignment: the exchange is exact although
the largest factor follows every move. One row of every block is drawn anew each time, so the search ends only where no
such draw (a transversal of the blocks) can be improved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from tenfold.structure.base import Factors
from tenfold.structure.combinators import Placed
from tenfold.structure.kronecker import Kronecker

LARGEST = 2048  # rows in one exchange; of more so many are drawn, for an assignment costs up to the cube of them
SIDES = ("rows", "columns")

Orders = dict[str, Tensor]  # side -> which row (column) of W lies at each place


def search(
    structure: Placed,
    weight: Tensor,
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
        method: "alternate", or "anneal", which swaps at random first, ever more rarely for the worse.
        starts: how many orders are tried. The first is by falling norm (with three factors or more: the nearest pairing,
            then a pairing of the pairs, as in the paper's two stages), then come the identity and random ones.
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
    assign, weight = _solver(), weight.double()
    first = (KroneckerBase if isinstance(structure.base, Kronecker) else AnyBase)(structure, weight)
    trials = [first]
    for number, orders in enumerate(islice(_starts(first, rounds, seed), starts)):
        generator = torch.Generator().manual_seed(seed + number)
        trials.append(first.begun(orders))
        METHODS[method](trials[-1], assign, generator, rounds, sweeps)
    return min(trials, key=lambda trial: trial.lost).factors()


def _check(structure: Placed, weight: Tensor) -> None:
    if tuple(weight.shape) != structure.shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)} but {structure} is {structure.shape} (out, in)")
    if structure.base.shape != structure.shape:
        raise ValueError(f"a permutation needs whole maps, but the base is {structure.base.shape} of {structure.shape}")


def _solver() -> Callable:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as missing:
        raise ImportError("the permutation search needs scipy: pip install 'tenfold[search]'") from missing
    return linear_sum_assignment


# where to start ---------------------------------------------------------------------------------------------------


def _starts(first: Trial, rounds: int, seed: int) -> Iterator[Orders]:
    """Orders to start from, the most promising ones first."""
    generator = torch.Generator().manual_seed(seed)
    staged = first.staged(rounds, seed)
    drawn = ({side: torch.randperm(len(o), generator=generator) for side, o in first.orders.items()} for _ in repeat(0))
    return chain([] if staged is None else [staged], [first.sorted(), first.orders], drawn)
