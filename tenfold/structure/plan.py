"""Plans: in what order the operands of a contraction are multiplied, two at a time, and what that costs; and to carry them out.

FLOPs follow opt_einsum: 2 for a multiply-add, 1 for a product that is not summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from math import inf
from string import ascii_letters
from types import MappingProxyType

import torch
from torch import Tensor

from tenfold.structure import products
from tenfold.structure.pair import Copies, Target, lies_of, multiply, pair_of, product
from tenfold.structure.search import LARGEST_SEARCH, Places, path_of, size_of
from tenfold.structure.traced import is_traced
from tenfold.structure.worth import Cost, Worth

ROWS = "(rows)"  # the label of the leading index of x; no diagram can hold it
SMALL = 2**14  # numbers of the larger operand below which einsum begins sooner than it would take longer
Product = tuple[bool, bool, bool]
HURRY = ContextVar("hurry", default=True)  # whether the time counts that it takes to see how tensors lie
CLEARLY = 0.8  # of the price of the order of the fewest FLOPs: what another one may cost, since prices are rough


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
    limit = CLEARLY * least.cost.price(worth)
    best = _planned(inputs, output, sizes, worth, limit)
    return best if best.steps and best.cost.price(worth) < limit else least


@lru_cache(maxsize=4096)
def plan_of(inputs: tuple[tuple[str, ...], ...], output: tuple[str, ...], sizes: tuple[tuple[str, int], ...]) -> Plan:
    """The pairwise order with the fewest FLOPs for one contraction of labelled operands."""
    return _planned(inputs, output, sizes)


def _planned(inputs, output, sizes, worth: Worth | None = None, limit: float = inf) -> Plan:
    """Without steps, if all orders are dearer than ``limit``."""
    letters = {label: ascii_letters[k] for k, (label, _) in enumerate(sizes)}
    size = {letters[label]: number for label, number in sizes}
    terms = ["".join(letters[label] for label in labels) for labels in inputs]
    target = "".join(letters[label] for label in output)
    places = Places(terms, target, size, letters.get(ROWS))
    path, steps, costs, numbers, lie = path_of(places, worth, limit), [], [], [], list(terms)
    for number, chosen in enumerate(path):
        taken = [terms[k] for k in chosen]
        terms = [term for k, term in enumerate(terms) if k not in chosen]
        kept = target if number == len(path) - 1 else places.kept(taken, terms)
        terms.append(kept)
        union = set("".join(taken))
        flops = size_of(union, size) * (len(taken) - 1 + (len(union) > len(kept)))
        equation = ",".join(taken[k] for k in _order(chosen)) + "->" + kept
        steps.append((tuple(sorted(chosen, reverse=True)), equation, product_of(equation)))
        made, copied, skinny = lies_of(equation, [lie.pop(k) for k in steps[-1][0]], size, number < len(path) - 1)
        lie.append(made)
        numbers.append(size_of(kept, size))
        moved = sum(size_of(term, size) for term in [*taken, kept])
        costs.append(Cost(flops, moved, copied, 1, skinny))
    if path and lie != [target]:
        costs[-1] += Cost(copied=size_of(target, size))
    return Plan(tuple(steps), tuple(costs), tuple(numbers))


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


@contextmanager
def unhurried() -> Iterator[None]:
    """What is called inside is written down and repeated, so that only the calls of torch that it comes down to count."""
    token = HURRY.set(False)
    try:
        yield
    finally:
        HURRY.reset(token)


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
    simple = is_traced() or len(operands) == 1
    simple = simple or (max(map(torch.numel, operands)) < SMALL and HURRY.get())
    pair = None if simple else pair_of(equation)
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

    def drop(self) -> None:
        """Forget what the plan makes."""
        self.values.pop(self.count + len(self.made) - 1)

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


class Gathered:
    """Gradients of the operands of a plan that is carried out for one part of its first operand after the other.

    Args:
        whole: the values of all parts together: of it those are taken that are made without the first operand.
        onto: the gradient of a part is added to what is at its place.
    """

    def __init__(self, whole: Values, needs: list[bool], onto: bool = False):
        self.whole, self.needs, self.onto, self.found = whole, needs, onto, {}

    def add(self, values: Values, gradient: Tensor, place: Tensor) -> None:
        """Those of a part; that of the part itself goes to ``place``."""
        into = {k: Target(value, add=True) for k, value in self.found.items()} | {0: Target(place, self.onto)}
        found = values.back_moving(gradient, self.needs, into)
        # a sum that is the same everywhere can't be added to
        self.found = {k: value.contiguous() if 0 in value.stride() else value for k, value in found.items() if k}

    def rest(self) -> list[Tensor | None]:
        """The gradients of the other operands."""
        return self.whole.back_fixed(self.found, self.needs)[1:]
