"""The pairwise order in which operands are contracted: that of the fewest FLOPs, or of the lowest price.

Both are found by dynamic programming over subsets of the operands. An order whose beginning is dearer already than the best one
known is not gone on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from math import inf, prod
from typing import NamedTuple

import opt_einsum

from tenfold.structure.pair import lies_of
from tenfold.structure.worth import Cost, Worth

SMALL = 8  # W has at least so many times the numbers of what is put into another order for longer runs in it
LARGEST_SEARCH = 10  # operands whose order is searched for; with more, opt_einsum's heuristics


class Places(NamedTuple):
    """The operands and the result of a contraction by their labels, and in what order the labels of a result in between run.

    ``row`` labels the rows of ``x``, the first operand. It comes first. In what is made without ``x``, if it is small beside
    ``W``, the labels of the result, then those of ``x``, keep their order: they will be one axis of a matrix, and what is copied
    then goes in longer runs. A label that both operands end with, such as the rank of a CP decomposition, stays at the end.
    """

    terms: list[str]
    target: str
    size: dict[str, int]
    row: str | None = None

    def kept(self, taken: Sequence[str], others: Iterable[str]) -> str:
        """The labels that the contraction of ``taken`` keeps, beside which there are ``others``."""
        needed = set("".join(others) + self.target)
        return self.ordered(["".join(x for x in term if x in needed) for term in taken])

    def ordered(self, terms: Sequence[str]) -> str:
        """The labels of ``terms``, each once."""
        found = list(dict.fromkeys("".join(terms)))
        if self.row in found:
            return "".join(sorted(found, key=lambda x: x != self.row))
        outside = self.target if self.row is None else self.target + self.terms[0]
        made = found
        if SMALL * size_of(found, self.size) <= size_of(set(outside) - {self.row}, self.size):
            places = iter(sorted((x for x in found if x in outside), key=outside.index))
            made = [next(places) if x in outside else x for x in found]
        ends = {term[-1:] for term in terms}
        if len(terms) > 1 and len(ends) == 1:  # it runs fastest in what is multiplied, and will in the product
            made.sort(key=lambda x: x in ends)
        return "".join(made)


def path_of(places: Places, worth: Worth | None, limit: float = inf) -> list[tuple[int, ...]]:
    """Which operands to take, step by step, as opt_einsum's paths have it; empty where all orders are dearer than ``limit``.

    Without ``worth`` the order is that of the fewest FLOPs, and its price is them.
    """
    terms, size = places.terms, places.size
    if len(terms) == 1:
        return [(0,)]
    if len(terms) <= LARGEST_SEARCH:
        return [tuple(pair) for pair in opt_einsum.paths.ssa_to_linear(_best_order(places, worth, limit))]
    shapes = [tuple(size[letter] for letter in term) for term in terms]
    equation = ",".join(terms) + "->" + places.target
    path = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")[0]
    return [tuple(pair) for pair in path]


def size_of(labels: Iterable[str], size: dict[str, int]) -> int:
    """How many numbers there are."""
    return prod(size[label] for label in labels)


class Found(NamedTuple):
    """The best order of a subset of operands; of equals the one that moves less."""

    price: float = 0.0
    moved: int = 0
    pairs: tuple[tuple[int, int], ...] = ()  # of subsets, in order
    term: str = ""
    lie: str = ""


def _best_order(places: Places, worth: Worth | None, limit: float) -> list[tuple[int, int]]:
    """The order of the lowest price, by dynamic programming over subsets (bit masks) of the operands.

    opt_einsum's exact search errs, by up to a factor of 4, where a label is shared by more than two operands. With ``worth`` a
    subset counts with the layout that its own best order leaves, though another one might have left a better one. Results are
    numbered on from the operands, as in opt_einsum's "ssa" paths.
    """
    terms, target, size, _ = places
    everything = 2 ** len(terms) - 1
    bit = {letter: 1 << k for k, letter in enumerate(size)}  # sets of labels are masks, too, which is faster
    masks, tables = [sum(bit[x] for x in term) for term in (*terms, target)], _products(list(size.values()))
    inside = [0]  # of every subset, all labels of its operands, and then those that are kept
    for mask in masks[:-1]:
        inside += [some | mask for some in inside]
    labels = [some & (inside[everything - subset] | masks[-1]) for subset, some in enumerate(inside)]
    for k, mask in enumerate(masks[:-1]):
        labels[1 << k] = mask

    def count(some: int) -> int:
        number = 1
        for table in tables:
            number *= table[some & 255]
            some >>= 8
        return number

    def joined(one: int, other: int, most: float) -> Found | None:
        union, kept = labels[one] | labels[other], labels[one | other]
        price: float = count(union) * (2 if union != kept else 1)
        first = best(one) if price <= most else None
        second = best(other) if first is not None and price + first.price <= most else None
        if first is None or second is None:
            return None
        flops, before, whole = int(price), first.price + second.price, one | other == everything
        moved = count(labels[one]) + count(labels[other]) + count(kept)
        pairs, term, lie = (*first.pairs, *second.pairs, (one, other)), "", ""
        if worth is not None:
            if before + Cost(flops, moved, 0, 1).price(worth) > most:
                return None
            if one.bit_count() > 1 == other.bit_count():
                first, second = second, first  # as a plan takes them: a result before an operand
            left = ["".join(x for x in each.term if kept & bit[x]) for each in (first, second)]
            term = target if whole else places.ordered(left)
            lies = [second.lie, first.lie]
            lie, copied, skinny = lies_of(f"{second.term},{first.term}->{term}", lies, size, not whole)
            copied += count(kept) if whole and lie != target else 0
            price = Cost(flops, moved, copied, 1, skinny).price(worth)
        found = Found(before + price, first.moved + second.moved + moved, pairs, term, lie)
        return found if found.price <= most else None

    @cache
    def best(subset: int) -> Found | None:
        if subset.bit_count() == 1:
            own = terms[subset.bit_length() - 1]
            return Found(term=own, lie=own)
        found: Found | None = None
        for half in range(1, subset // 2 + 1):
            if half & subset == half:
                new = joined(half, subset - half, limit if found is None else found.price)
                found = new if found is None or (new is not None and new < found) else found
        return found

    number = {1 << k: k for k in range(len(terms))}
    whole = best(everything)
    for one, other in () if whole is None else whole.pairs:
        number[one | other] = len(number)
    return [] if whole is None else [(number[one], number[other]) for one, other in whole.pairs]


def _products(sizes: list[int]) -> list[list[int]]:
    """For every eight of ``sizes`` the products of all their subsets, by bit mask."""
    tables = []
    for begin in range(0, len(sizes), 8):
        table = [1]
        for size in sizes[begin : begin + 8]:
            table += [size * number for number in table]
        tables.append(table)
    return tables
