"""Tucker and CP decompositions of a matrix folded into a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.linalg import hooi
from tenfold.structure.scattered import ScatteredEinsum


def _axes(outs: tuple[int, ...], ins: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(f"a{k}" for k in range(len(outs))), tuple(f"c{k}" for k in range(len(ins)))


def _factor_names(outs: tuple[int, ...], ins: tuple[int, ...]) -> list[str]:
    return [*(f"out_{k}" for k in range(len(outs))), *(f"in_{k}" for k in range(len(ins)))]


@dataclass(frozen=True, kw_only=True)
class Tucker(Structure, kind="tucker"):
    """``W[a_1.., c_1..] = sum core[p_1.., q_1..] out_1[a_1, p_1] .. in_1[c_1, q_1] ..``

    Args:
        outs: the modes of the output; one is enough (then ``W = out_0 core in_0^T``).
        ins: the modes of the input.
        ranks: one per mode, those of ``outs`` first.

    Raises:
        ValueError: a rank is above its mode.
    """

    outs: tuple[int, ...]
    ins: tuple[int, ...]
    ranks: tuple[int, ...]
    grows = "rank"

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Instead of ``ranks`` a recipe may give ``rank``, clipped to every mode."""
        spec = {"parts": 1} | spec if not {"outs", "ins"} & spec.keys() else spec
        spec = super().complete(out, inner, spec)
        if "rank" in spec:
            rank = spec.pop("rank")
            spec["ranks"] = tuple(min(rank, mode) for mode in (*spec["outs"], *spec["ins"]))
        return spec

    @classmethod
    def bound(cls, smallest) -> int:
        """An unfolding has at most this rank, in every mode."""
        modes = smallest.outs + smallest.ins
        return max(min(mode, math.prod(modes) // mode) for mode in modes)

    def check(self) -> None:
        modes = self.outs + self.ins
        if len(self.ranks) != len(modes) or any(r > mode for r, mode in zip(self.ranks, modes, strict=True)):
            raise ValueError(f"ranks {self.ranks} must be one per mode of {modes}, none above its mode")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        outs, ins = _axes(self.outs, self.ins)
        ranks = tuple(f"r{k}" for k in range(len(self.ranks)))
        names = _factor_names(self.outs, self.ins)
        factors = (("core", ranks), *((n, (axis, r)) for n, axis, r in zip(names, outs + ins, ranks, strict=True)))
        sizes = (*zip(outs + ins, self.outs + self.ins, strict=True), *zip(ranks, self.ranks, strict=True))
        return (ScatteredEinsum(EinsumSpec(outs, ins, factors, sizes)),)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """HOSVD and orthogonal iteration (HOOI): a stationary point, near the optimum in practice."""
        core, factors = hooi(weight.reshape(*self.outs, *self.ins), self.ranks)
        return {"core": core} | dict(zip(_factor_names(self.outs, self.ins), factors, strict=True))


@dataclass(frozen=True, kw_only=True)
class CP(Structure, kind="cp"):
    """``W[a_1.., c_1..] = sum_r weights[r] out_1[a_1, r] .. in_1[c_1, r] ..``

    Args:
        weighted: whether there is a factor ``weights (r)``; without it the weights are one.

    The fit alternates (CP-ALS); no closed form is known for more than two modes.
    """

    outs: tuple[int, ...]
    ins: tuple[int, ...]
    rank: int
    weighted: bool = False
    grows = "rank"

    @classmethod
    def bound(cls, smallest) -> int:
        """With one term per entry of all modes but the largest, every matrix is such a sum."""
        modes = smallest.outs + smallest.ins
        return math.prod(modes) // max(modes)

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        outs, ins = _axes(self.outs, self.ins)
        names = _factor_names(self.outs, self.ins)
        factors = tuple((name, (axis, "r")) for name, axis in zip(names, outs + ins, strict=True))
        sizes = (("r", self.rank), *zip(outs + ins, self.outs + self.ins, strict=True))
        weights = (("weights", ("r",)),) if self.weighted else ()
        return (ScatteredEinsum(EinsumSpec(outs, ins, factors + weights, sizes, ("weights",) if weights else ())),)
