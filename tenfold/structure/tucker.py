"""Tucker and CP decompositions of a matrix reshaped into a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.linalg import hooi
from tenfold.structure.scattered import ScatteredEinsum, einsum, label_sizes


@dataclass(frozen=True, kw_only=True)
class _Modes(Structure):
    """A structure with one factor per mode of the tensor ``(*outs, *ins)``."""

    outs: tuple[int, ...]
    ins: tuple[int, ...]
    grows = "rank"

    @property
    def _modes(self) -> tuple[int, ...]:
        return self.outs + self.ins

    @property
    def _names(self) -> list[str]:
        return [*label_sizes("out_", self.outs), *label_sizes("in_", self.ins)]


@dataclass(frozen=True, kw_only=True)
class Tucker(_Modes, kind="tucker"):
    """``W[a_1.., c_1..] = sum core[p_1.., q_1..] out_1[a_1, p_1] .. in_1[c_1, q_1] ..``.

    One mode a side is enough: then ``W = out_0 core in_0^T``.
    """

    ranks: tuple[int, ...]  # one per mode, those of ``outs`` first

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Return all fields; instead of ``ranks`` a recipe may give ``rank``, clipped to every mode."""
        spec = {"parts": 1} | spec if not {"outs", "ins"} & spec.keys() else spec
        spec = super().complete(out, inner, spec)
        if "rank" in spec:
            rank = spec.pop("rank")
            spec["ranks"] = tuple(min(rank, mode) for mode in (*spec["outs"], *spec["ins"]))
        return spec

    @classmethod
    def bound(cls, smallest) -> int:
        """Return the largest rank of an unfolding."""
        modes = smallest._modes
        return max(min(mode, math.prod(modes) // mode) for mode in modes)

    def check(self) -> None:
        modes = self._modes
        if len(self.ranks) != len(modes) or any(r > mode for r, mode in zip(self.ranks, modes, strict=True)):
            raise ValueError(f"ranks {self.ranks} must be one per mode of {modes}, none above its mode")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        outs, ins, ranks = label_sizes("a", self.outs), label_sizes("c", self.ins), label_sizes("r", self.ranks)
        factors = {name: f"{a} {r}" for name, a, r in zip(self._names, [*outs, *ins], ranks, strict=True)}
        return einsum(" ".join(outs), " ".join(ins), {"core": " ".join(ranks)} | factors, outs | ins | ranks)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Return the result of HOSVD and orthogonal iteration (HOOI): a stationary point, near the optimum in practice."""
        core, factors = hooi(weight.reshape(*self.outs, *self.ins), self.ranks)
        return {"core": core} | dict(zip(self._names, factors, strict=True))


@dataclass(frozen=True, kw_only=True)
class CP(_Modes, kind="cp"):
    """``W[a_1.., c_1..] = sum_r weights[r] out_1[a_1, r] .. in_1[c_1, r] ..``.

    The fit alternates (CP-ALS); no closed form is known for more than two modes.
    """

    rank: int
    weighted: bool = False  # whether there is a factor ``weights (r)``; without it the weights are one

    @classmethod
    def bound(cls, smallest) -> int:
        """Return the number of elements of all modes but the largest: with so many terms every matrix is a member."""
        return math.prod(smallest._modes) // max(smallest._modes)

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        outs, ins = label_sizes("a", self.outs), label_sizes("c", self.ins)
        factors = {name: f"{a} r" for name, a in zip(self._names, [*outs, *ins], strict=True)}
        weights = {"weights": "r"} if self.weighted else {}
        return einsum(" ".join(outs), " ".join(ins), factors | weights, {"r": self.rank} | outs | ins, tuple(weights))
