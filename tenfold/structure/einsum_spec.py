"""Einsum specifications: which index labels belong to the output, to the input and to each factor of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EinsumSpec:
    """``W[outs, ins] = sum over every other label of the product of the factors``.

    Any number of factors may share a label. The rows of ``W`` run over ``outs``, the first label slowest.

    Raises:
        ValueError: the labels, names or sizes describe no matrix.
    """

    outs: tuple[str, ...]  # labels of the output index
    ins: tuple[str, ...]  # labels of the input index
    factors: tuple[tuple[str, tuple[str, ...]], ...]  # the name is the key in a checkpoint, the labels are the axes
    sizes: tuple[tuple[str, int], ...]  # of every label
    ones: tuple[str, ...] = ()  # factors that are initialised to one instead of at random (scalars, gates)
    # stored, because every call reads them
    _sizes: dict[str, int] = field(init=False, repr=False, compare=False)
    _shape: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_sizes", dict(self.sizes))
        used = [label for _, labels in self.factors for label in labels]
        for label in self.outs + self.ins:
            if label not in used:
                raise ValueError(f"label {label!r} of the matrix is in no factor; give it to one of {self.names}")
        for label in used:
            if label not in self._sizes:
                raise ValueError(f"label {label!r} has no size; sizes are given for {sorted(self._sizes)}")
            if "(" in label:
                raise ValueError(f"label {label!r} contains a bracket, which is reserved; rename it")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"two factors have the same name in {self.names}; give each its own")
        for name, labels in self.factors:
            if len(set(labels)) != len(labels):
                raise ValueError(f"factor {name!r} has a label twice in {labels}; use two labels")
        if len(set(self.outs + self.ins)) != len(self.outs + self.ins):
            raise ValueError(f"outs {self.outs} and ins {self.ins} must not share labels")
        for label, size in self._sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"label {label!r} has size {size!r}; sizes are whole numbers from 1 up")
        object.__setattr__(self, "_shape", (self.size(self.outs), self.size(self.ins)))

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.factors)

    def shape_of(self, labels) -> tuple[int, ...]:
        return tuple([self._sizes[label] for label in labels])  # a list: torch.compile can't trace a generator here

    def size(self, labels) -> int:
        """Return the number of values of a multi-index over ``labels``."""
        return math.prod(self.shape_of(labels))

    @property
    def num_terms(self) -> int:
        return self.size({label for _, labels in self.factors for label in labels} - set(self.outs + self.ins))

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape_of(labels) for name, labels in self.factors}

    def axes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Return ``{factor: (batch, out, in) axes}``: a factor applied to a vector is a batch of matrices.

        Factors are applied from the last to the first. The last one with a label sums over it (in), the first one creates it
        (out), any other only passes it on (batch). Factors that are initialised to one are left out.
        """
        found, seen = {}, set(self.ins)
        for number, (name, labels) in reversed(list(enumerate(self.factors))):
            later = {label for _, others in self.factors[:number] for label in others} | set(self.outs)
            kinds = [2 if label not in later else 1 if label not in seen else 0 for label in labels]
            found[name] = tuple(tuple(k for k, kind in enumerate(kinds) if kind == group) for group in range(3))
            seen |= set(labels)
        return {name: found[name] for name in self.names if name not in self.ones}

    def fans(self) -> dict[str, tuple[int, int]]:
        """Return ``{factor: (fan in, fan out)}``, the sizes of its in and out ``axes``."""
        labels = dict(self.factors)
        return {
            name: (self.size(labels[name][k] for k in inner), self.size(labels[name][k] for k in out))
            for name, (_, out, inner) in self.axes().items()
        }

    def rename_factors(self, rename: Callable[[str], str]) -> EinsumSpec:
        factors = tuple((rename(name), labels) for name, labels in self.factors)
        return EinsumSpec(self.outs, self.ins, factors, self.sizes, tuple(map(rename, self.ones)))
