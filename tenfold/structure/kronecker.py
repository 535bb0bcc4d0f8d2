"""Sums of Kronecker products."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.linalg import truncate
from tenfold.structure.scattered import ScatteredEinsum, einsum, label_sizes


@dataclass(frozen=True, kw_only=True)
class Kronecker(Structure, kind="kronecker"):
    """``W = sum_r scale[r] outer[r] (x) inner[r]``, that is ``W[a b, c d] = sum_r scale[r] outer[r, a, c] inner[r, b, d]``.

    Instead of ``outs`` and ``ins`` a recipe may give ``inner``, that is ``(b, d)`` of two factors, for a matrix of any size.
    Two factors are named ``outer`` and ``inner``, more of them ``factor_0``, ``factor_1``, ...
    """

    outs: tuple[int, ...]  # rows of the factors, outermost first: ``(a, b)``, or more than two
    ins: tuple[int, ...]  # columns of the factors: ``(c, d)``
    terms: int = 1  # the number of products
    scaled: bool = False  # whether every term has a learnable scalar (Krony-PT); without it ``scale`` is one
    grows = "terms"

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        if "inner" not in spec:
            return super().complete(out, inner, spec)
        (b, d), rest = spec["inner"], {key: value for key, value in spec.items() if key != "inner"}
        return {"outs": (out // b, b), "ins": (inner // d, d)} | rest

    def check(self) -> None:
        if len(self.outs) != len(self.ins) or len(self.outs) < 2:
            raise ValueError(f"outs {self.outs} and ins {self.ins} must have the same length, two or more")

    @property
    def factor_names(self) -> tuple[str, ...]:
        return ("outer", "inner") if len(self.outs) == 2 else tuple(f"factor_{k}" for k in range(len(self.outs)))

    @property
    def optimal(self) -> bool:  # type: ignore[override]
        return len(self.outs) == 2

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        outs, ins = label_sizes("a", self.outs), label_sizes("c", self.ins)
        factors = {name: f"r a{k} c{k}" for k, name in enumerate(self.factor_names)}
        scale = {"scale": "r"} if self.scaled else {}
        sizes = {"r": self.terms} | outs | ins
        return einsum(" ".join(outs), " ".join(ins), factors | scale, sizes, tuple(scale))

    @classmethod
    def bound(cls, smallest) -> int:
        """Return the number of elements of all factors but the largest: with so many terms every matrix is a member."""
        sides = [a * c for a, c in zip(smallest.outs, smallest.ins, strict=True)]
        return math.prod(sides) // max(sides)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Return the SVD of the rearranged matrix: the optimum for two factors (Van Loan-Pitsianis 1993).

        With more factors the first is split off optimally, the rest term by term, which is only a good start.
        """
        parts = _split(rearrange(weight, self.outs, self.ins)[None], self.terms)
        sides = zip(self.factor_names, parts, self.outs, self.ins, strict=True)
        factors = {name: part.reshape(self.terms, a, c) for name, part, a, c in sides}
        return factors | ({"scale": torch.ones(self.terms, dtype=torch.float64)} if self.scaled else {})


def rearrange(weight: Float[Tensor, "out inner"], outs: tuple[int, ...], ins: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Return ``W (a b .., c d ..)`` as a tensor ``(a c, b d, ..)``, in which a Kronecker product has rank one."""
    count = len(outs)
    pairs = [axis for k in range(count) for axis in (k, count + k)]
    return weight.reshape(*outs, *ins).permute(pairs).reshape([a * c for a, c in zip(outs, ins, strict=True)])


def _split(tensors: Tensor, terms: int) -> list[Tensor]:
    """Return the factors ``(t * terms, m_k)`` of rank-one parts of ``tensors (t, m_1, ..., m_d)``."""
    left, right = truncate(tensors.flatten(2), terms)  # (t, m_1, terms), (t, terms, rest)
    first = left.mT.reshape(-1, tensors.shape[1])
    rest = right.reshape(-1, *tensors.shape[2:])
    return [first, rest] if rest.ndim == 2 else [first, *_split(rest, 1)]
