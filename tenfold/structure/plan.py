"""Plans: in what order the operands of a contraction are multiplied, two at a time, and what that costs; and to carry them out.

FLOPs follow opt_einsum: 2 for a multiply-add, 1 for a product that is not summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache, cached_property, lru_cache
from math import prod
from string import ascii_letters
from types import MappingProxyType
from typing import NamedTuple

import opt_einsum
import torch
from torch import Tensor

from tenfold.structure import products
from tenfold.structure.pair import Copies, Target, is_skinny, lies_of, multiply, pair_of, product, skinny
from tenfold.structure.worth import Worth

SMALL = 2**14  # numbers of the larger operand below which einsum begins sooner than it would take longer
Product = tuple[bool, bool, bool]
LARGEST_SEARCH = 10  # operands whose order of the fewest FLOPs is searched for; with more, opt_einsum's heuristics
LARGEST_LAID = 6  # operands of which an order is priced with what it copies; of more without
CLEARLY = 0.8  # of the price of the order of the fewest FLOPs: what another one may cost, since prices are rough


@dataclass(frozen=True)
class Cost:
    """Of one contraction or many: FLOPs by opt_einsum's count; numbers that are read and written, and those that are put into
    another order in memory; contractions; numbers that skinny products read and write, which costs as much as a copy.
    """

    flops: int = 0
    moved: int = 0
    copied: int = 0
    calls: int = 0
    skinny: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.moved + other.moved, self.copied + other.copied, self.calls + other.calls,
            self.skinny + other.skinny,
        )  # fmt: skip

    def times(self, number: int) -> Cost:
        return Cost(*(number * value for value in astuple(self)))

    def price(self, worth: Worth) -> float:
        """What it is expected to take, in FLOPs."""
        return (
            self.flops + worth.moved * self.moved + worth.copied * (self.copied + self.skinny) + worth.call * self.calls
        )


def cost_of_product(rows: int, out: int, inner: int) -> Cost:
    """Of ``x (rows, in) @ W.T`` with a dense ``W (out, in)``."""
    return Cost(2 * rows * out * inner, rows * (out + inner) + out * inner, 0, 1)


@dataclass(frozen=True)
class Plan:
    """Pairwise contractions ``(i, j), equation, product`` on a list of operands: pop ``i`` and ``j``, append the result.

    Args:
        steps: where one is a product of two matrices, ``product`` says how (:func:`product_of`).
        costs: of every step.
        numbers: in the result of every step.
    """

    steps: tuple[tuple[tuple[int, ...], str, Product | None], ...]
    costs: tuple[Cost, ...]
    numbers: tuple[int, ...]

    @cached_property
    def taken(self) -> list[tuple[int, ...]]:
        """What every step takes, where operands and results are numbered in this order."""
        count = sum(len(chosen) for chosen, *_ in self.steps) - len(self.steps) + 1
        alive, found = list(range(count)), []
        for number, (chosen, *_) in enumerate(self.steps):
            found.append(tuple(alive.pop(k) for k in chosen))
            alive.append(count + number)
        return found

    @cached_property
    def moving(self) -> list[bool]:
        """Of every operand and result, whether the first operand is in it."""
        moving = [k == 0 for k in range(len(self.taken) + 1 if len(self.taken[0]) == 2 else 1)]
        for taken in self.taken:
            moving.append(any(moving[k] for k in taken))
        return moving

    @cached_property
    def passing(self) -> int:
        """How many numbers with the first operand in them lie between the steps."""
        first = len(self.moving) - len(self.steps)
        return sum(number for k, number in enumerate(self.numbers[:-1]) if self.moving[first + k])

    @cached_property
    def cost(self) -> Cost:
        """Of all steps."""
        return sum(self.costs, Cost())

    @property
    def cost_back(self) -> Cost:
        """Of :meth:`Values.back`: two products for one, and all but the last one is made again."""
        return sum(self.costs[:-1], self.cost.times(2))


@lru_cache(maxsize=4096)
def cheapest_plan(
    inputs: tuple[tuple[str, ...], ...], output: tuple[str, ...], sizes: tuple[tuple[str, int], ...], worth: Worth
) -> Plan:
    """The pairwise order of the lowest price, if it is clearly lower than that of the fewest FLOPs, else that one."""
    least = plan_of(inputs, output, sizes)
    if not 2 < len(inputs) <= LARGEST_SEARCH:
        return least
    best = _planned(inputs, output, sizes, worth)
    return best if best.cost.price(worth) < CLEARLY * least.cost.price(worth) else least


@lru_cache(maxsize=4096)
def plan_of(inputs: tuple[tuple[str, ...], ...], output: tuple[str, ...], sizes: tuple[tuple[str, int], ...]) -> Plan:
    """The pairwise order with the fewest FLOPs for one contraction of labelled operands."""
    return _planned(inputs, output, sizes, None)


def _planned(inputs, output, sizes, worth: Worth | None) -> Plan:
    letters = {label: ascii_letters[k] for k, (label, _) in enumerate(sizes)}
    size = {letters[label]: number for label, number in sizes}
    terms = ["".join(letters[label] for label in labels) for labels in inputs]
    target = "".join(letters[label] for label in output)
    path, steps, costs, numbers, lie = _path(terms, target, size, worth), [], [], [], list(terms)
    for number, chosen in enumerate(path):
        taken = [terms[k] for k in chosen]
        terms = [term for k, term in enumerate(terms) if k not in chosen]
        kept = target if number == len(path) - 1 else _kept(taken, terms, target)
        terms.append(kept)
        union = set("".join(taken))
        flops = _size(union, size) * (len(taken) - 1 + (len(union) > len(kept)))
        equation = ",".join(taken[k] for k in _order(chosen)) + "->" + kept
        steps.append((tuple(sorted(chosen, reverse=True)), equation, product_of(equation)))
        made, copied = lies_of(equation, [lie.pop(k) for k in steps[-1][0]], size, number < len(path) - 1)
        lie.append(made)
        numbers.append(_size(kept, size))
        moved = sum(_size(term, size) for term in [*taken, kept])
        costs.append(Cost(flops, moved, copied, 1, skinny(equation, size)))
    if lie != [target]:
        costs[-1] += Cost(copied=_size(target, size))
    return Plan(tuple(steps), tuple(costs), tuple(numbers))


def _path(terms: list[str], target: str, size: dict[str, int], worth: Worth | None) -> list[tuple[int, ...]]:
    if len(terms) == 1:
        return [(0,)]
    if len(terms) <= LARGEST_SEARCH:
        return [tuple(pair) for pair in opt_einsum.paths.ssa_to_linear(_best_order(terms, target, size, worth))]
    shapes = [tuple(size[letter] for letter in term) for term in terms]
    path = opt_einsum.contract_path(",".join(terms) + "->" + target, *shapes, shapes=True, optimize="auto")[0]
    return [tuple(pair) for pair in path]


class Found(NamedTuple):
    """The best order of a subset of operands; of equals the one that moves less."""

    price: float = 0.0
    moved: int = 0
    pairs: tuple[tuple[int, int], ...] = ()  # of subsets, in order
    term: str = ""
    lie: str = ""


def _best_order(
    terms: list[str], target: str, size: dict[str, int], worth: Worth | None = None
) -> list[tuple[int, int]]:
    """The order of the lowest price, by dynamic programming over subsets (bit masks) of the operands.

    Without ``worth`` it is that of the fewest FLOPs; opt_einsum's exact search errs there, by up to a factor of 4, where a label
    is shared by more than two operands. With it a subset counts with the layout that its own best order leaves, though another
    one might have left a better one. Results are numbered on from the operands, as in opt_einsum's "ssa" paths.
    """
    everything = 2 ** len(terms) - 1
    bit = {letter: 1 << k for k, letter in enumerate(size)}  # sets of labels are masks, too, which is faster
    labels = {subset: sum(bit[x] for x in _labels_of(subset, terms, target)) for subset in range(1, everything + 1)}

    @cache
    def count(some: int) -> int:
        return _size((letter for letter in size if some & bit[letter]), size)

    def joined(one: int, other: int) -> Found:
        union, kept, both = labels[one] | labels[other], labels[one | other], labels[one] & labels[other]
        flops, moved = (
            count(union) * (2 if union != kept else 1),
            count(labels[one]) + count(labels[other]) + count(kept),
        )
        first, second = best(one), best(other)
        pairs = (*first.pairs, *second.pairs, (one, other))
        price, term, lie, whole = flops, "", "", one | other == everything
        if worth is not None:
            if one.bit_count() > 1 == other.bit_count():
                first, second = second, first  # as a plan takes them: a result before an operand
            term = target if whole else "".join(x for x in dict.fromkeys(first.term + second.term) if kept & bit[x])
            sides = [count(labels[one] & ~both), count(labels[other] & ~both), count(both & ~kept)]
            lie, copied = term, moved if is_skinny(sides) else 0
            if len(terms) <= LARGEST_LAID:
                lie, more = lies_of(f"{second.term},{first.term}->{term}", [second.lie, first.lie], size, not whole)
                copied += more + (count(kept) if whole and lie != target else 0)
            price = Cost(flops, moved, copied, 1).price(worth)
        return Found(price + first.price + second.price, moved + first.moved + second.moved, pairs, term, lie)

    @cache
    def best(subset: int) -> Found:
        if subset.bit_count() == 1:
            own = terms[subset.bit_length() - 1]
            return Found(term=own, lie=own)
        halves = (half for half in range(1, subset // 2 + 1) if half & subset == half)
        return min(joined(half, subset - half) for half in halves)

    number = {1 << k: k for k in range(len(terms))}
    for one, other in best(everything).pairs:
        number[one | other] = len(number)
    return [(number[one], number[other]) for one, other in best(everything).pairs]


def _labels_of(subset: int, terms: list[str], target: str) -> frozenset[str]:
    """What the contraction of ``subset`` keeps: the labels that the target or an operand outside it needs."""
    inside, outside = ("".join(t for k, t in enumerate(terms) if (subset >> k & 1) == side) for side in (1, 0))
    return frozenset(inside) if subset.bit_count() == 1 else frozenset(inside) & frozenset(outside + target)


def _size(labels, size: dict[str, int]) -> int:
    return prod(size[label] for label in labels)


def _order(chosen) -> list[int]:
    return sorted(range(len(chosen)), key=lambda k: -chosen[k])


def product_of(equation: str) -> Product | None:
    """Whether the second of two matrices comes first, and which of them are transposed, in ``(a, s) (s, b)``.

    None where their contraction is no such product.
    """
    (*terms, kept) = equation.replace("->", ",").split(",")
    if [len(term) for term in (*terms, kept)] != [2, 2, 2] or len(set("".join(terms))) != 3 or kept[0] == kept[1]:
        return None
    (summed,) = set("".join(terms)) - set(kept)
    if any(term.count(summed) != 1 for term in terms):
        return None
    swapped = kept[0] in terms[1]
    first, second = terms[::-1] if swapped else terms
    return swapped, first[0] == summed, second[1] == summed


def _kept(taken: list[str], others: list[str], target: str) -> str:
    needed = set("".join(others) + target)
    return "".join(dict.fromkeys(letter for letter in "".join(taken) if letter in needed))


@cache
def reversed_of(equation: str, which: int) -> tuple[str, Product | None, tuple[int, ...]]:
    """The equation and product that make the gradient of operand ``which`` of ``(gradient of the result, other operand)``.

    And the axes of the operand that are summed in it alone: along these its gradient is the same everywhere.
    """
    (*terms, kept) = equation.replace("->", ",").split(",")
    others = [term for k, term in enumerate(terms) if k != which]
    known = "".join(letter for letter in terms[which] if letter in "".join([kept, *others]))
    turned = ",".join([kept, *others]) + "->" + known
    return turned, product_of(turned), tuple(k for k, letter in enumerate(terms[which]) if letter not in known)


def contracted(
    equation: str,
    how: Product | None,
    operands: list[Tensor],
    copies: Sequence[Copies | None] = (None, None),
    into: Target | None = None,
    between: bool = False,
) -> Tensor:
    """One contraction of one or two operands; a product of matrices goes without einsum, which takes longer to begin.

    Args:
        copies, into: see :func:`tenfold.structure.pair.multiply`.
        between: the result goes no further than to the next contraction, and may lie in memory as that likes it.
    """
    if how is not None:
        return product(*_turned(how, *operands), into, between)
    small = torch.compiler.is_compiling() or len(operands) == 1 or max(map(torch.numel, operands)) < SMALL
    pair = None if small else pair_of(equation)
    if pair is not None:
        one, other = operands
        return multiply(pair, one, other, copies, into, between)
    made = torch.einsum(equation, *operands)
    return made if into is None else into.take(made)


def run(plan: Plan, operands: list[Tensor], bias: Tensor | None = None) -> Tensor:
    """Carry out ``plan`` on ``operands``; ``bias`` belongs to a result of two axes, and is added in the last product."""
    operands = list(operands)
    for chosen, equation, how in plan.steps[:-1]:
        operands.append(contracted(equation, how, [operands.pop(k) for k in chosen], between=True))
    chosen, equation, how = plan.steps[-1]
    last = [operands.pop(k) for k in chosen]
    if bias is None or how is None:
        return contracted(equation, how, last)
    return products.product(*_turned(how, *last), bias)


def _turned(how: Product, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    swapped, *transposed = how
    one, other = (other, one) if swapped else (one, other)
    return one.T if transposed[0] else one, other.T if transposed[1] else other


class Values:
    """The operands of ``plan`` and what its steps make of them, each once it is asked for.

    Operands and results are numbered in this order. ``whole`` has made already what is made without the first operand, of the
    same other operands.
    """

    def __init__(self, plan: Plan, operands: list[Tensor], whole: Values | None = None):
        self.values: dict[int, Tensor] = dict(enumerate(operands)) | ({} if whole is None else whole.fixed())
        self.copies: Copies = {} if whole is None else whole.copies  # of what is made without the first operand
        self.count, self.moving = len(operands), plan.moving
        self.made = [(step[1:], taken) for step, taken in zip(plan.steps, plan.taken, strict=True)]

    def of(self, number: int, into: Target | None = None) -> Tensor:
        """Operand or result ``number``."""
        if number not in self.values:
            (equation, how), taken = self.made[number - self.count]
            between = number < self.count + len(self.made) - 1
            copies = [None if self.moving[k] else self.copies for k in taken]
            self.values[number] = contracted(equation, how, [self.of(k) for k in taken], copies, into, between)
        return self.values[number]

    def result(self, into: Target | None = None) -> Tensor:
        """What the plan makes."""
        return self.of(self.count + len(self.made) - 1, into)

    def fixed(self) -> dict[int, Tensor]:
        """What is made without the first operand, by number."""
        numbers = range(self.count, len(self.moving))
        return {number: self.of(number) for number in numbers if not self.moving[number]}

    def passing(self) -> dict[int, Tensor]:
        """What lies between the steps and has the first operand in it, by number, as far as it was made; without the result."""
        return {
            k: self.values[k] for k in range(self.count, len(self.moving) - 1) if self.moving[k] and k in self.values
        }

    def back(self, gradient: Tensor, needs: list[bool]) -> list[Tensor | None]:
        """The gradients of the operands that are needed, for one of the result; results in between are dropped on the way."""
        return self.back_fixed(self.back_moving(gradient, needs), needs)

    def back_moving(
        self, gradient: Tensor, needs: list[bool], into: Mapping[int, Target] = MappingProxyType({})
    ) -> dict[int, Tensor]:
        """Likewise, but no further than to what is made without the first operand; by number."""
        found = {self.count + len(self.made) - 1: gradient}
        self.pull(found, needs, [k for k in range(self.count, len(self.moving)) if self.moving[k]], into)
        return found

    def back_fixed(self, found: dict[int, Tensor], needs: list[bool]) -> list[Tensor | None]:
        """The rest of the way, from what :meth:`back_moving` has found."""
        self.pull(found, needs, [k for k in range(self.count, len(self.moving)) if not self.moving[k]], {})
        return [found.get(k) for k in range(self.count)]

    def pull(
        self, found: dict[int, Tensor], needs: list[bool], numbers: Sequence[int], into: Mapping[int, Target]
    ) -> None:
        """Replace the gradients of the results ``numbers``, last one first, by those of what they are made of."""
        wanted = list(needs)  # of every number, whether its gradient is needed
        for _, taken in self.made:
            wanted.append(any(wanted[k] for k in taken))
        for number in reversed(numbers):
            (equation, _), taken = self.made[number - self.count]
            self.values.pop(number, None)
            if not wanted[number]:
                continue
            above, passing = found.pop(number), Copies()
            for which, k in enumerate(taken):
                if wanted[k]:
                    turned, how, alone = reversed_of(equation, which)
                    rest, target = [other for other in taken if other != k], into.get(k)
                    copies = [passing, *(passing if self.moving[other] else self.copies for other in rest)]
                    others, between = [above, *(self.of(other) for other in rest)], k >= self.count
                    found[k] = contracted(turned, how, others, copies, None if alone else target, between)
                    if alone:
                        found[k] = self._everywhere(found[k], alone, k)
                        found[k] = found[k] if target is None else target.take(found[k])

    def _everywhere(self, value: Tensor, axes: tuple[int, ...], number: int) -> Tensor:
        for axis in axes:
            value = value.unsqueeze(axis)
        return value.expand(self.of(number).shape)
