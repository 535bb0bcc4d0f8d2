"""Tensor-train matrices (TTM = MPO), and one tensor train per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure import factorization
from tenfold.structure.base import Factors, Structure
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.kronecker import rearrange
from tenfold.structure.linalg import tt_ranks, tt_svd
from tenfold.structure.scattered import ScatteredEinsum
from tenfold.structure.shared_core_fit import fit_centre


@dataclass(frozen=True, kw_only=True)
class TensorTrain(Structure, kind="tensor_train"):
    """``W[a_1..a_d, c_1..c_d] = sum_r core_1[r_0, a_1, c_1, r_1] core_2[r_1, a_2, c_2, r_2] ... core_d[.., r_d]``

    ``r_0 = r_d = 1``; ``ranks`` are the bonds in between, ``r_1 .. r_{d-1}``, and may exceed the matrix bound: the
    published TTM layers clip from the left only (:meth:`clipped`), and TT-SVD then pads with zeros.

    Reference: Oseledets 2010 (TTM); arXiv 2306.02697 (the published shapes); arXiv 2106.02205 (MPO, full bonds).
    """

    outs: tuple[int, ...]
    ins: tuple[int, ...]
    ranks: tuple[int, ...]
    grows = "rank"

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Instead of ``ranks`` a recipe may give ``rank``: a number (clipped from the left) or ``full`` (both sides).

        ``mirror: true`` makes the central core large and the others small, as in MPOBERT: the largest of the derived factors
        lie in the middle, and those of ``ins`` in the reverse order of those of ``outs``.
        """
        spec, mirror = dict(spec), spec.get("mirror", False)
        spec.pop("mirror", None)
        given = spec.keys() & {"outs", "ins"}
        spec = super().complete(out, inner, spec)
        if mirror:
            spec |= {name: _centred(spec[name], step) for name, step in (("outs", 1), ("ins", -1)) if name not in given}
        if "rank" in spec:
            spec["ranks"] = left_clipped(spec["outs"], spec["ins"], spec.pop("rank"))
        return spec

    @classmethod
    def bound(cls, smallest) -> int:
        """The largest bond at which nothing is cut."""
        return max(left_clipped(smallest.outs, smallest.ins, "full"), default=1)

    def check(self) -> None:
        if not len(self.outs) == len(self.ins) == len(self.ranks) + 1:
            raise ValueError(f"outs {self.outs}, ins {self.ins} need one rank between neighbours, not {self.ranks}")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        count, bonds = len(self.outs), (1, *self.ranks, 1)
        sizes = [(f"r{k}", bond) for k, bond in enumerate(bonds)]
        for k in range(count):
            sizes += [(f"a{k}", self.outs[k]), (f"c{k}", self.ins[k])]
        factors = tuple((f"core_{k}", (f"r{k}", f"a{k}", f"c{k}", f"r{k + 1}")) for k in range(count))
        outs, ins = tuple(f"a{k}" for k in range(count)), tuple(f"c{k}" for k in range(count))
        return (ScatteredEinsum(EinsumSpec(outs, ins, factors, tuple(sizes))),)

    @classmethod
    def within_tolerance(
        cls, weight: Float[Tensor, "out inner"], outs: tuple[int, ...], ins: tuple[int, ...], tolerance: float
    ) -> TensorTrain:
        """The least ranks for which the fit errs by at most ``tolerance * ||weight||_F``."""
        return cls(outs=outs, ins=ins, ranks=tt_ranks(rearrange(weight, outs, ins), tolerance))

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """TT-SVD: within a factor ``sqrt(d - 1)`` of the nearest one."""
        cores = tt_svd(rearrange(weight, self.outs, self.ins), self.ranks)
        bonds = (1, *self.ranks, 1)
        return {
            f"core_{k}": core.reshape(bonds[k], self.outs[k], self.ins[k], bonds[k + 1]) for k, core in enumerate(cores)
        }

    def shared_form(
        self, weights: Sequence[Tensor], shared: tuple[str, ...], sweeps: int, tolerance: float
    ) -> Factors | None:
        """See :mod:`tenfold.structure.shared_core_fit`: one core inside is shared, and no bond outside of it is cut."""
        count, bonds = len(self.outs), (1, *self.ranks, 1)
        sides = [a * c for a, c in zip(self.outs, self.ins, strict=True)]
        at = next((k for k in range(1, count - 1) if shared == (f"core_{k}",)), None)
        if at is None:
            return None
        whole = all(bonds[k] == math.prod(sides[:k]) for k in range(at)) and all(
            bonds[k] == math.prod(sides[k:]) for k in range(at + 2, count + 1)
        )
        outer = math.prod(sides[:at]), sides[at], math.prod(sides[at + 1 :])
        if not whole or bonds[at] > outer[0] or bonds[at + 1] > outer[2]:
            return None
        tensors = [rearrange(weight, self.outs, self.ins).reshape(outer) for weight in weights]
        centre, lefts, rights = fit_centre(tensors, bonds[at], bonds[at + 1], sweeps, tolerance)
        found = {f"core_{at}": centre, f"core_{at - 1}": torch.stack(lefts), f"core_{at + 1}": torch.stack(rights)}
        for k in (*range(at - 1), *range(at + 2, count)):  # whole bonds: cores that only carry their labels on
            size = bonds[k + 1] if k < at else bonds[k]
            found[f"core_{k}"] = torch.eye(size).to(centre).expand(len(weights), size, size)
        return {
            name: found[name].reshape(*(() if name in shared else (len(weights),)), *shape)
            for name, shape in self.factor_shapes().items()
        }

    def spectrum(self, factors: Factors, bond: int) -> Float[Tensor, "r"]:
        """The singular values of ``W`` unfolded between core ``bond`` and the next one, in float64."""
        left, right = self._roots(factors, bond)
        return torch.linalg.svdvals(left @ right)

    def cut(self, factors: Factors, bond: int, rank: int) -> tuple[TensorTrain, Factors]:
        """The nearest train whose bond ``bond`` has the given rank, the other bonds as they are.

        Only the two cores at the bond change. What is lost are the singular values behind the first ``rank``.
        """
        left, right = self._roots(factors, bond)
        u, s, v = torch.linalg.svd(left @ right)
        root = s[:rank].sqrt()
        into, out = (
            torch.linalg.pinv(left) @ (u[:, :rank] * root),
            (root[:, None] * v[:rank]) @ torch.linalg.pinv(right),
        )
        one, other = f"core_{bond}", f"core_{bond + 1}"
        changed = {
            one: torch.einsum("racs,st->ract", factors[one].double(), into),
            other: torch.einsum("ts,sacr->tacr", out, factors[other].double()),
        }
        ranks = (*self.ranks[:bond], rank, *self.ranks[bond + 1 :])
        return TensorTrain(outs=self.outs, ins=self.ins, ranks=ranks), factors | changed

    def _roots(self, factors: Factors, bond: int) -> tuple[Tensor, Tensor]:
        """``left (., r)`` and ``right (r, .)``: what stays of both sides of a bond without orthogonal factors."""
        left = right = torch.ones(1, 1, dtype=torch.float64, device=factors["core_0"].device)
        for k in range(bond + 1):
            core = torch.tensordot(left, factors[f"core_{k}"].double(), 1)
            left = torch.linalg.qr(core.reshape(-1, core.shape[-1])).R
        for k in range(len(self.outs) - 1, bond, -1):
            core = torch.tensordot(factors[f"core_{k}"].double(), right, 1)
            right = torch.linalg.qr(core.reshape(core.shape[0], -1).T).R.T
        return left, right


def _centred(factors: tuple[int, ...], step: int) -> tuple[int, ...]:
    """``factors``, which descend, from the middle to both ends; backwards for ``step = -1``."""
    places = sorted(range(len(factors)), key=lambda k: (abs(k - len(factors) // 2), k))
    placed = dict(zip(places, factors, strict=True))
    return tuple(placed[k] for k in range(len(factors)))[::step]


def left_clipped(outs: tuple[int, ...], ins: tuple[int, ...], rank: int | Literal["full"]) -> tuple[int, ...]:
    """The bonds ``r_k = min(rank, r_{k-1} a_k c_k)``; ``rank="full"`` also clips from the right, so nothing is cut."""
    sides = [a * c for a, c in zip(outs, ins, strict=True)]
    if rank == "full":
        return tuple(min(math.prod(sides[:k]), math.prod(sides[k:])) for k in range(1, len(sides)))
    bonds = [1]
    for side in sides[:-1]:
        bonds.append(min(rank, bonds[-1] * side))
    return tuple(bonds[1:])


@dataclass(frozen=True, kw_only=True)
class RowTensorTrain(Structure, kind="row_train"):
    """``W[t, c_1..c_d] = sum_r core_1[t, r_0, c_1, r_1] ... core_d[t, .., c_d, r_d]``: a tensor train per row.

    For embeddings: a row is looked up from its own cores and nothing else.

    Reference: TensorGPT, arXiv 2307.00526.
    """

    out_features: int
    ins: tuple[int, ...]
    ranks: tuple[int, ...]
    grows = "rank"

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Instead of ``ins`` a recipe may give ``parts``, instead of ``ranks`` a ``rank`` clipped to the bound."""
        spec = super().complete(out, inner, spec)
        spec["ins"] = spec.get("ins") or factorization.balanced(inner, spec.pop("parts", 3))
        if "rank" in spec:
            full, rank = left_clipped((1,) * len(spec["ins"]), tuple(spec["ins"]), "full"), spec.pop("rank")
            spec["ranks"] = full if rank == "full" else tuple(min(rank, bond) for bond in full)
        spec.pop("parts", None)
        return {key: value for key, value in spec.items() if key != "in_features"}

    @classmethod
    def bound(cls, smallest) -> int:
        """The largest bond at which nothing is cut."""
        return max(left_clipped((1,) * len(smallest.ins), smallest.ins, "full"), default=1)

    def check(self) -> None:
        if len(self.ins) != len(self.ranks) + 1:
            raise ValueError(f"ins {self.ins} need one rank between neighbours, not {self.ranks}")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        count, bonds = len(self.ins), (1, *self.ranks, 1)
        sizes = (("t", self.out_features), *((f"r{k}", bond) for k, bond in enumerate(bonds)))
        sizes += tuple((f"c{k}", number) for k, number in enumerate(self.ins))
        factors = tuple((f"core_{k}", ("t", f"r{k}", f"c{k}", f"r{k + 1}")) for k in range(count))
        return (ScatteredEinsum(EinsumSpec(("t",), tuple(f"c{k}" for k in range(count)), factors, sizes)),)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """TT-SVD of every row: within a factor ``sqrt(d - 1)`` of the nearest one."""
        cores = tt_svd(weight.reshape(self.out_features, *self.ins), self.ranks, batch=1)
        return {f"core_{k}": core for k, core in enumerate(cores)}
