"""Contract labelled tensors: choose the order of pairwise products by price, run it, and differentiate it.

A *term* is a string with one character per axis, in memory order. Every pairwise product becomes one (batched) matrix product. An
operand is copied only if its axes can't be viewed as matrices, and an intermediate result keeps the layout that its product
wrote. Layouts, and thereby copies, are known before anything runs, so that the search can price them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import inf, prod

import opt_einsum
import torch
from torch import Tensor

from tenfold.structure.cost_model import HardwareCosts, OpCounts
from tenfold.structure.few_rows import linear

ROWS = "(rows)"  # label of the leading axis of x; no spec can use it
OPEN = "#"  # its character in terms: plans are reused for other numbers of rows
EXACT = 10  # operands up to which the search is exhaustive; above it opt_einsum's heuristics are used
THIN = 16  # columns below which a batch of products is slower than a copy and a single product
MAX_PRICE_RATIO = 0.8  # to the order of the fewest FLOPs, which is preferred unless clearly dearer: prices are rough
Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Matrices:
    """Conversion of an operand into a batch of matrices."""

    dropped: tuple[int, ...]  # axes to sum first
    order: tuple[int | None, ...]  # the axes of ``(batch, rows, columns)``; None: the operand is repeated along it
    shape: tuple[int, ...]  # of the result


@dataclass(frozen=True)
class Product:
    """One product of two terms, ``(batch, rows, summed) @ (batch, summed, columns)``."""

    left: Matrices
    right: Matrices
    swapped: bool  # whether the second operand is on the left
    repeated: tuple[int, tuple[int, ...]]  # the operand (0 or 1) and its axes along which the other one is repeated
    made: str  # the term of the result
    shape: tuple[int, ...]  # of the result
    counts: OpCounts


def multiply(product: Product, one: Tensor, other: Tensor) -> Tensor:
    """Return the product of two operands, its axes in the order of ``product.made``."""
    side, axes = product.repeated
    repeats = [(one, other)[side].shape[axis] for axis in axes]
    first, second = (other, one) if product.swapped else (one, other)
    left = _to_matrices(product.left, first, repeats if side == int(not product.swapped) else [])
    right = _to_matrices(product.right, second, repeats if side == int(product.swapped) else [])
    made = linear(left, right.mT) if left.dim() == 2 else torch.bmm(left, right)
    return made.view(product.shape)


def _to_matrices(how: Matrices, value: Tensor, repeats: list[int]) -> Tensor:
    value = value.sum(how.dropped) if how.dropped else value
    value = value.permute([axis for axis in how.order if axis is not None])
    if repeats:
        for place, axis in enumerate(how.order):
            if axis is None:
                value = value.unsqueeze(place)
        sizes, own = list(repeats), list(value.shape)
        value = value.expand([sizes.pop(0) if axis is None else own[place] for place, axis in enumerate(how.order)])
    return value.reshape(how.shape)


@lru_cache(maxsize=16384)
def product_of(one: str, other: str, kept: str, sizes: Sizes) -> Product:
    """Plan the product of two terms that keeps the labels ``kept``, copying as few elements as possible."""
    size, given = dict(sizes), (one, other)

    def count(labels: str) -> int:
        return prod([size[x] for x in labels])

    def extents(*groups: str) -> tuple[int, ...]:
        return tuple(-1 if OPEN in labels else count(labels) for labels in groups)

    terms = tuple("".join(x for x in term if x in kept or x in others) for term, others in (given, given[::-1]))
    numbers = tuple(map(count, terms))
    larger = terms[numbers[1] > numbers[0]]
    batch = "".join(x for x in larger if x in terms[0] and x in terms[1] and x in kept)
    summed = "".join(x for x in larger if x in terms[0] and x in terms[1] and x not in kept)
    free = tuple("".join(x for x in term if x not in batch + summed) for term in terms)

    def copied(side: int, outer: str, rest: str) -> int:
        term = terms[side]
        is_view = all(group in term for group in (outer, rest, summed)) and (term[-1:] not in outer or not term)
        return 0 if is_view else numbers[side]

    # leading labels of one operand may join the batch, the other operand repeated along them: (copies, side, labels)
    options = [(sum(copied(k, batch, free[k]) for k in range(2)), 0, "")]
    for side in range(2):
        for split in range(1, len(free[side])):
            some, rest = free[side][:split], free[side][split:]
            if count(rest) < THIN and count(some) * numbers[1 - side] > numbers[side]:
                continue  # thin products, each of which reads the whole other operand
            outer = "".join(x for x in terms[side] if x in batch + some)
            repeats = numbers[1 - side] * count(some) if batch else copied(1 - side, "", free[1 - side])
            options.append((copied(side, outer, rest) + repeats, side, some))
    copies, side, some = min(options, key=lambda option: option[0])
    outer = "".join(x for x in terms[side] if x in batch + some)
    rest = tuple("".join(x for x in labels if x not in some) for labels in free)
    swapped = bool(some and not batch and side == 0)  # the repeated operand on the left: prefix, its own labels, suffix
    first, second = (1, 0) if swapped else (0, 1)
    made = outer + rest[first] + rest[second]
    orders = {first: outer + rest[first] + summed, second: outer + summed + rest[second]}
    shapes = {first: extents(rest[first], summed), second: extents(summed, rest[second])}
    matrices = [
        Matrices(
            tuple(axis for axis, x in enumerate(given[k]) if x not in terms[k]),
            tuple(terms[k].index(x) if x in terms[k] else None for x in orders[k]),
            (*(extents(outer) if outer else ()), *shapes[k]),
        )
        for k in (first, second)
    ]
    axes = tuple(given[side].index(x) for x in outer if x in some)
    union = count("".join(set(one + other)))
    counts = OpCounts(union * (1 + (len(set(one + other)) > len(made))), sum(numbers) + count(made), copies, 1)
    return Product(matrices[0], matrices[1], swapped, (side, axes), made, extents(*made), counts)


@dataclass(frozen=True)
class Plan:
    """Sequence of pairwise products. Operands are numbered from 0, results after them."""

    terms: tuple[str, ...]  # of the operands and of every result
    steps: tuple[tuple[int, int], ...]  # the numbers of the two operands of each product
    products: tuple[Product, ...]  # one per step
    target: str  # the order of the axes of the final result
    sizes: Sizes  # of all labels

    @property
    def inputs(self) -> int:
        return len(self.terms) - len(self.steps)

    @property
    def counts(self) -> OpCounts:
        total = sum((product.counts for product in self.products), OpCounts())
        return total if self.terms[-1] == self.target else total + OpCounts(copied=_numel(self.target, self.sizes))

    @property
    def backward_counts(self) -> OpCounts:
        """Operation counts of ``gradients``: two products per step, and all steps but the last recomputed."""
        each = [product.counts for product in self.products]
        return sum(each[:-1], sum(each, sum(each, OpCounts())))

    @property
    def moving_numel(self) -> int:
        """Number of elements in the intermediate results that depend on operand 0."""
        moving, total = {0}, 0
        for number, taken in enumerate(self.steps[:-1], self.inputs):
            if moving & set(taken):
                moving.add(number)
                total += _numel(self.terms[number], self.sizes)
        return total


def _numel(term: str, sizes: Sizes) -> int:
    return prod([number for label, number in sizes if label in term])


def run(plan: Plan, operands: Sequence[Tensor]) -> Tensor:
    """Contract ``operands``; the result has the axes of the plan's target."""
    if not plan.steps:
        (term,), (value,) = plan.terms, operands
        alone = tuple(k for k, x in enumerate(term) if x not in plan.target)
        value, term = (value.sum(alone) if alone else value), "".join(x for x in term if x in plan.target)
        return value.permute([term.index(x) for x in plan.target])
    return _permute(_values(plan, operands)[-1], plan.terms[-1], plan.target)


def _values(plan: Plan, operands: Sequence[Tensor], last: bool = True) -> list[Tensor]:
    values = list(operands)
    for (one, other), product in zip(plan.steps[: None if last else -1], plan.products, strict=False):
        values.append(multiply(product, values[one], values[other]))
    return values


def _permute(value: Tensor, term: str, target: str) -> Tensor:
    return value if term == target else value.permute([term.index(x) for x in target])


def gradients(plan: Plan, operands: Sequence[Tensor], gradient: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of the operands where ``needs`` is true, given that of the result."""
    if not plan.steps:
        (term,) = plan.terms
        return [_expand(gradient, plan.target, term, operands[0]) if needs[0] else None]
    values, needed = _values(plan, operands, last=False), list(needs)
    for pair in plan.steps:
        needed.append(any(needed[k] for k in pair))
    found: dict[int, tuple[Tensor, str]] = {len(plan.terms) - 1: (gradient, plan.target)}
    for number in range(len(plan.terms) - 1, plan.inputs - 1, -1):
        if not needed[number]:
            continue
        upstream, term = found.pop(number)
        pair = plan.steps[number - plan.inputs]
        for k, other in (pair, pair[::-1]):
            if needed[k]:
                labels = plan.terms[k]
                known = "".join(x for x in labels if x in term + plan.terms[other])
                product = product_of(term, plan.terms[other], known, plan.sizes)
                found[k] = multiply(product, upstream, values[other]), product.made
                if len(known) < len(labels):
                    found[k] = _expand(*found[k], labels, values[k]), labels
        del upstream
        if number < len(values):
            values[number] = values[number].new_empty(0)  # free memory
    return [_permute(*found[k], plan.terms[k]) if needs[k] else None for k in range(plan.inputs)]


def _expand(value: Tensor, term: str, target: str, like: Tensor) -> Tensor:
    """Return ``value`` with the axes of ``target``, repeated along those that it lacks."""
    value = value.permute([term.index(x) for x in target if x in term])
    for axis, label in enumerate(target):
        if label not in term:
            value = value.unsqueeze(axis)
    return value.expand(like.shape)


@lru_cache(maxsize=4096)
def plan_of(
    inputs: tuple[tuple[str, ...], ...],
    output: tuple[str, ...],
    sizes: tuple[tuple[str, int], ...],
    costs: HardwareCosts | None = None,
) -> Plan:
    """Return the order of the fewest FLOPs for operands with labels ``inputs``, or with ``costs`` one of a lower price."""
    letters = {label: OPEN if label == ROWS else opt_einsum.get_symbol(k) for k, (label, _) in enumerate(sizes)}
    terms = ["".join(letters[label] for label in labels) for labels in inputs]
    target, named = "".join(letters[label] for label in output), tuple((letters[label], n) for label, n in sizes)
    least = _build_plan(_search_order(terms, target, named, None, inf), terms, target, named)
    if costs is None or not 2 < len(terms) <= EXACT:
        return least
    limit = MAX_PRICE_RATIO * least.counts.price(costs)
    order = _search_order(terms, target, named, costs, limit)
    best = _build_plan(order, terms, target, named) if order is not None else least
    return best if best.counts.price(costs) < limit else least


def _build_plan(order: list[tuple[int, int]] | None, terms: list[str], target: str, sizes: Sizes) -> Plan:
    made, products, left = list(terms), [], dict(enumerate(terms))
    for one, other in order or ():
        first, second = left.pop(one), left.pop(other)
        kept = "".join(sorted(set(first + second) & set("".join(left.values()) + target)))
        products.append(product_of(first, second, kept, sizes))
        left[len(made)] = products[-1].made
        made.append(products[-1].made)
    return Plan(tuple(made), tuple(order or ()), tuple(products), target, sizes)


def _search_order(terms: list[str], target: str, sizes: Sizes, costs: HardwareCosts | None, limit: float):
    """Search the best pairwise order by dynamic programming over subsets of the operands (bit masks).

    opt_einsum's exact search errs by up to a factor of 4 if more than two operands share a label. Every subset has the layout
    that its own cheapest order leaves. Partial orders above ``limit`` are pruned; the result is None if all are.
    """
    if len(terms) == 1:
        return []
    if len(terms) > EXACT:
        shapes = [tuple(dict(sizes)[x] for x in term) for term in terms]
        path = opt_einsum.contract_path(",".join(terms) + "->" + target, *shapes, shapes=True, optimize="auto")[0]
        return [(one, other) for one, other in opt_einsum.paths.linear_to_ssa(path)]
    everything, size = 2 ** len(terms) - 1, dict(sizes)
    members = [[k for k in range(len(terms)) if subset >> k & 1] for subset in range(everything + 1)]
    inside = [frozenset("".join(terms[k] for k in some)) for some in members]
    outside = [frozenset(target) | inside[everything - subset] for subset in range(everything + 1)]
    labels = [own if len(some) == 1 else own & other for some, own, other in zip(members, inside, outside, strict=True)]
    kept = ["".join(sorted(some)) for some in labels]
    number = cache(lambda some: prod([size[x] for x in some]))

    @cache
    def best(subset: int):
        """Return the price, the elements moved, the pairs of subsets in order, and the term."""
        if len(members[subset]) == 1:
            return 0.0, 0, (), terms[members[subset][0]]
        found, half = None, (subset - 1) & subset
        while half:
            other = subset - half
            if half & -half > other & -other:  # the operand with the lowest number, for instance x, comes first
                bound = limit if found is None else found[0]
                union = labels[half] | labels[other]
                flops = number(union) * (1 + (union != labels[subset]))
                one, two = (best(other), best(half)) if flops <= bound else (None, None)
                if one is not None and two is not None and (before := one[0] + two[0]) + flops <= bound:
                    moved, term = number(labels[half]) + number(labels[other]) + number(labels[subset]), kept[subset]
                    price = float(flops)
                    if costs is not None:
                        product = product_of(one[3], two[3], kept[subset], sizes)
                        term, counts = product.made, product.counts
                        if subset == everything and term != target:
                            counts += OpCounts(copied=number(labels[subset]))
                        price = counts.price(costs)
                    new = before + price, one[1] + two[1] + moved, (*one[2], *two[2], (other, half)), term
                    found = new if new[0] <= limit and (found is None or new[:2] < found[:2]) else found
            half = (half - 1) & subset
        return found

    whole = best(everything)
    if whole is None:
        return None
    numbers = {1 << k: k for k in range(len(terms))}
    for one, other in whole[2]:
        numbers[one | other] = len(numbers)
    return [(numbers[one], numbers[other]) for one, other in whole[2]]
