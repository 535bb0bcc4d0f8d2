"""Splitting integers into balanced factors; the largest integer whose price is within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable


def primes(number: int) -> list[int]:
    """The prime factors of ``number``, ascending."""
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found + ([number] if number > 1 else [])


def balanced(number: int, parts: int) -> tuple[int, ...]:
    """``parts`` factors of ``number`` whose product is ``number``, near each other, descending.

    The prime factors are dealt out from the largest, each to the factor that is smallest so far.
    """
    if number < 1 or parts < 1:
        raise ValueError(f"{number} can't be split into {parts} factors; ask for one or more, of a number from 1 up")
    result = [1] * parts
    for prime in reversed(primes(number)):
        result[result.index(min(result))] *= prime
    return tuple(sorted(result, reverse=True))


def largest(price: Callable[[int], int], budget: float) -> int:
    """The largest ``n >= 1`` with ``price(n) <= budget``, for a price that grows with ``n``; 0 if ``price(1)`` is over."""
    if price(1) > budget:
        return 0
    low, high = 1, 2
    while price(high) <= budget and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if price(middle) <= budget else (low, middle)
    return low


def sides(out: int, inner: int, parts) -> dict[str, tuple[int, ...]]:
    """``outs`` and ``ins`` of a matrix ``(out, inner)``, of so many balanced factors; ``parts`` is one number, or one for each.

    Raises:
        ValueError: it is neither.
    """
    each = [parts, parts] if isinstance(parts, int) else parts
    if not isinstance(each, (list, tuple)) or len(each) != 2 or not all(isinstance(part, int) for part in each):
        raise ValueError(
            f"parts is {parts!r}, but into how many factors to split is one number, or two: [of outs, of ins]"
        )
    return {"outs": balanced(out, each[0]), "ins": balanced(inner, each[1])}


def check_product(name: str, factors: tuple[int, ...], number: int, where: str) -> None:
    """Raise ValueError unless ``factors`` multiply to ``number``."""
    if math.prod(factors) != number:
        raise ValueError(
            f"{name} {factors} multiply to {math.prod(factors)}, but {where} has {number}; "
            f"for instance {balanced(number, len(factors))} would fit"
        )
