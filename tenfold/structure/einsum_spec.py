"""Labelled diagrams: which index labels belong to the output, to the input and to each factor of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EinsumSpec:
    """``W[outs, ins] = sum over every other label of the product of the factors``.

    A label may be shared by any number of factors. The rows of ``W`` run over ``outs``, the first label slowest.

    Args:
        outs: labels of the output index.
        ins: labels of the input index.
        factors: ``(name, labels)`` of every factor; the name is the key in a checkpoint, the labels its axes.
        sizes: ``(label, size)`` of every label.
        ones: names of the factors that start at one instead of at random (scalars, gates).
    """

    outs: tuple[str, ...]
    ins: tuple[str, ...]
    factors: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[tuple[str, int], ...]
    ones: tuple[str, ...] = ()
    # asked for in every call
    _sizes: dict[str, int] = field(init=False, repr=False, compare=False)
    _shape: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_sizes", dict(self.sizes))
        size, seen = dict(self.sizes), [label for _, labels in self.factors for label in labels]
        for label in self.outs + self.ins:
            if label not in seen:
                raise ValueError(f"label {label!r} of the matrix is in no factor; give it to one of {self.names}")
        for label in seen:
            if label not in size:
                raise ValueError(f"label {label!r} has no size; sizes are given for {sorted(size)}")
            if "(" in label:
                raise ValueError(f"label {label!r} holds a bracket, which only labels of the package do; rename it")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"two factors have one name in {self.names}; give each its own")
        for name, labels in self.factors:
            if len(set(labels)) != len(labels):
                raise ValueError(f"factor {name!r} has a label twice in {labels}; use two labels")
        if len(set(self.outs + self.ins)) != len(self.outs + self.ins):
            raise ValueError(f"outs {self.outs} and ins {self.ins} must not share labels")
        for label, number in size.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"label {label!r} has size {number!r}; sizes are whole numbers from 1 up")
        object.__setattr__(self, "_shape", (self.size(self.outs), self.size(self.ins)))

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.factors)

    def size(self, labels) -> int:
        """The number of values of a multi-index over ``labels``."""
        return math.prod([self._sizes[label] for label in labels])  # a list: the compiler can't trace a generator here

    def shape_of(self, labels) -> tuple[int, ...]:
        return tuple([self._sizes[label] for label in labels])

    @property
    def terms(self) -> int:
        """How many products are added up in one entry of ``W``."""
        inner = {label for _, labels in self.factors for label in labels} - set(self.outs + self.ins)
        return self.size(inner)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape_of(labels) for name, labels in self.factors}

    def axes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """``{factor: its axes as (batch, out, in)}``: a factor applied to a vector is a batch of matrices.

        Factors are applied from the last to the first: the one that comes last sums over a label (in), the one that comes
        first makes it (out); what passes through is the batch. Factors that start at one are left out.
        """
        found, seen = {}, set(self.ins)
        for number, (name, labels) in reversed(list(enumerate(self.factors))):
            later = {label for _, others in self.factors[:number] for label in others} | set(self.outs)
            kinds = [2 if label not in later else 1 if label not in seen else 0 for label in labels]
            found[name] = tuple(tuple(k for k, kind in enumerate(kinds) if kind == want) for want in range(3))
            seen |= set(labels)
        return {name: found[name] for name in self.names if name not in self.ones}

    def fans(self) -> dict[str, tuple[int, int]]:
        """``{factor: (over how many numbers it sums, how many it makes of them)}``; see :meth:`axes`."""
        labels = dict(self.factors)
        return {
            name: (self.size(labels[name][k] for k in inner), self.size(labels[name][k] for k in out))
            for name, (_, out, inner) in self.axes().items()
        }

    def transposed(self) -> EinsumSpec:
        return EinsumSpec(self.ins, self.outs, self.factors, self.sizes, self.ones)

    def renamed(self, rename) -> EinsumSpec:
        """The same diagram with ``rename(name)`` for every factor name."""
        factors = tuple((rename(name), labels) for name, labels in self.factors)
        return EinsumSpec(self.outs, self.ins, factors, self.sizes, tuple(map(rename, self.ones)))
