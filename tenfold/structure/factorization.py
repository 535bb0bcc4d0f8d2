"""Balanced factors of integers, and the largest integer whose price is within a budget."""

from __future__ import annotations


def split_evenly(number: int, parts: int) -> tuple[int, ...]:
    """Return ``parts`` descending factors of ``number``, as equal as dealing out its primes makes them.

    Prime factors are dealt out from the largest, each to the factor that is smallest so far.
    """
    if number < 1 or parts < 1:
        raise ValueError(f"{number} can't be split into {parts} factors; ask for one or more, of a number from 1 up")
    primes, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            primes.append(divisor)
            number //= divisor
        divisor += 1
    result = [1] * parts
    for prime in reversed([*primes, number]):
        result[result.index(min(result))] *= prime
    return tuple(sorted(result, reverse=True))


def split_sides(out: int, inner: int, parts) -> dict[str, tuple[int, ...]]:
    """Return balanced factors ``outs`` and ``ins`` of a matrix ``(out, inner)``; ``parts`` is one number, or one for each."""
    each = [parts, parts] if isinstance(parts, int) else parts
    if not isinstance(each, (list, tuple)) or len(each) != 2 or not all(isinstance(part, int) for part in each):
        raise ValueError(
            f"parts is {parts!r}, but into how many factors to split is one number, or two: [of outs, of ins]"
        )
    return {"outs": split_evenly(out, each[0]), "ins": split_evenly(inner, each[1])}
