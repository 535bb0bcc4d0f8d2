"""Tensor-train matrices (TTM = MPO), and one tensor train per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.factorization import split_evenly
from tenfold.structure.kronecker import rearrange
from tenfold.structure.linalg import tt_svd
from tenfold.structure.scattered import ScatteredEinsum, einsum, label_sizes
from tenfold.structure.shared_core_fit import fit_shared_core


@dataclass(frozen=True, kw_only=True)
class TensorTrain(Structure, kind="tensor_train"):
    """``W[a_1..a_d, c_1..c_d] = sum_r core_1[r_0, a_1, c_1, r_1] core_2[r_1, a_2, c_2, r_2] ... core_d[.., r_d]``.

    ``r_0 = r_d = 1``; ``ranks`` are the bonds in between, ``r_1 .. r_{d-1}``. They may exceed the rank of an unfolding, as
    those of the published TTM layers, which ``clip_ranks`` from the left only; TT-SVD then pads with zeros.

    Reference: Oseledets 2010 (TTM); arXiv 2306.02697 (the published shapes); arXiv 2106.02205 (MPO, full bonds).
    """

    outs: tuple[int, ...]
    ins: tuple[int, ...]
    ranks: tuple[int, ...]
    grows = "rank"

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Return all fields; instead of ``ranks`` a recipe may give ``rank``: a number (clipped from the left) or ``full``.

        ``mirror: true`` makes the central core large and the others small, as in MPOBERT: the largest derived factors lie in
        the middle, and those of ``ins`` in the reverse order of those of ``outs``.
        """
        spec = dict(spec)
        mirror, given = spec.pop("mirror", False), spec.keys() & {"outs", "ins"}
        spec = super().complete(out, inner, spec)
        if mirror:
            spec |= {n: _move_to_centre(spec[n], step) for n, step in (("outs", 1), ("ins", -1)) if n not in given}
        if "rank" in spec:
            spec["ranks"] = clip_ranks(spec["outs"], spec["ins"], spec.pop("rank"))
        return spec

    @classmethod
    def bound(cls, smallest) -> int:
        return max(clip_ranks(smallest.outs, smallest.ins, "full"), default=1)

    def check(self) -> None:
        if not len(self.outs) == len(self.ins) == len(self.ranks) + 1:
            raise ValueError(f"outs {self.outs}, ins {self.ins} need one rank between neighbours, not {self.ranks}")

    @property
    def _bonds(self) -> tuple[int, ...]:
        return (1, *self.ranks, 1)

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        outs, ins, sizes = label_sizes("a", self.outs), label_sizes("c", self.ins), label_sizes("r", self._bonds)
        for side in zip(outs.items(), ins.items(), strict=True):
            sizes |= dict(side)
        factors = {f"core_{k}": f"r{k} a{k} c{k} r{k + 1}" for k in range(len(outs))}
        return einsum(" ".join(outs), " ".join(ins), factors, sizes)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Return the TT-SVD, whose error is at most ``sqrt(d - 1)`` times the least one."""
        cores = tt_svd(rearrange(weight, self.outs, self.ins), self.ranks)
        return {
            name: core.reshape(shape) for core, (name, shape) in zip(cores, self.factor_shapes().items(), strict=True)
        }

    def shared_form(
        self, weights: Sequence[Tensor], shared: tuple[str, ...], sweeps: int, tolerance: float
    ) -> Factors | None:
        """Return a joint fit if one inner core is shared and no bond outside of it is cut, see ``fit_shared_core``."""
        count, bonds = len(self.outs), self._bonds
        sides = [a * c for a, c in zip(self.outs, self.ins, strict=True)]
        at = next((k for k in range(1, count - 1) if shared == (f"core_{k}",)), None)
        if at is None:
            return None
        full = [math.prod(sides[:k]) if k <= at else math.prod(sides[k:]) for k in range(count + 1)]
        others = {*range(count + 1)} - {at, at + 1}
        if any(bonds[k] != full[k] for k in others) or bonds[at] > full[at] or bonds[at + 1] > full[at + 1]:
            return None
        tensors = [rearrange(w, self.outs, self.ins).reshape(full[at], sides[at], full[at + 1]) for w in weights]
        core, lefts, rights = fit_shared_core(tensors, bonds[at], bonds[at + 1], sweeps, tolerance)
        found = {f"core_{at}": core, f"core_{at - 1}": torch.stack(lefts), f"core_{at + 1}": torch.stack(rights)}
        for k in (*range(at - 1), *range(at + 2, count)):  # full bonds: these cores are identities
            size = bonds[k + 1] if k < at else bonds[k]
            found[f"core_{k}"] = torch.eye(size).to(core).expand(len(weights), size, size)
        return {
            name: found[name].reshape(*(() if name in shared else (len(weights),)), *shape)
            for name, shape in self.factor_shapes().items()
        }

    def spectrum(self, factors: Factors, bond: int) -> Float[Tensor, "r"]:
        """Return the singular values of ``W`` unfolded between core ``bond`` and the next one, in float64."""
        left, right = self._roots(factors, bond)
        return torch.linalg.svdvals(left @ right)

    def truncate_bond(self, factors: Factors, bond: int, rank: int) -> tuple[TensorTrain, Factors]:
        """Return the nearest train with bond ``bond`` of the given rank: drop the singular values beyond the first ``rank``."""
        left, right = self._roots(factors, bond)
        u, s, v = torch.linalg.svd(left @ right)
        root = s[:rank].sqrt()
        new_left = torch.linalg.pinv(left) @ (u[:, :rank] * root)
        new_right = (root[:, None] * v[:rank]) @ torch.linalg.pinv(right)
        one, other = f"core_{bond}", f"core_{bond + 1}"
        changed = {
            one: torch.einsum("racs,st->ract", factors[one].double(), new_left),
            other: torch.einsum("ts,sacr->tacr", new_right, factors[other].double()),
        }
        ranks = (*self.ranks[:bond], rank, *self.ranks[bond + 1 :])
        return TensorTrain(outs=self.outs, ins=self.ins, ranks=ranks), factors | changed

    def _roots(self, factors: Factors, bond: int) -> tuple[Tensor, Tensor]:
        """Return ``left (., r)`` and ``right (r, .)``, both sides of a bond up to orthogonal factors."""
        left = right = torch.ones(1, 1, dtype=torch.float64, device=factors["core_0"].device)
        for k in range(bond + 1):
            core = torch.tensordot(left, factors[f"core_{k}"].double(), 1)
            left = torch.linalg.qr(core.reshape(-1, core.shape[-1])).R
        for k in range(len(self.outs) - 1, bond, -1):
            core = torch.tensordot(factors[f"core_{k}"].double(), right, 1)
            right = torch.linalg.qr(core.reshape(core.shape[0], -1).T).R.T
        return left, right


def _move_to_centre(factors: tuple[int, ...], step: int) -> tuple[int, ...]:
    """Return ``factors``, which descend, ordered from the middle to both ends; reversed for ``step = -1``."""
    positions = sorted(range(len(factors)), key=lambda k: (abs(k - len(factors) // 2), k))
    return tuple(factor for _, factor in sorted(zip(positions, factors, strict=True)))[::step]


def clip_ranks(outs: tuple[int, ...], ins: tuple[int, ...], rank: int | Literal["full"]) -> tuple[int, ...]:
    """Return the bonds ``r_k = min(rank, r_{k-1} a_k c_k)``; for ``rank="full"`` the ranks of the unfoldings."""
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

    For embeddings: the lookup of a row reads its own cores only.

    Reference: TensorGPT, arXiv 2307.00526.
    """

    out_features: int
    ins: tuple[int, ...]
    ranks: tuple[int, ...]
    grows = "rank"

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Return all fields; instead of ``ins`` a recipe may give ``parts``, instead of ``ranks`` a ``rank`` (clipped)."""
        spec = super().complete(out, inner, spec)
        parts = spec.pop("parts", 3)
        spec["ins"] = spec.get("ins") or split_evenly(inner, parts)
        if "rank" in spec:
            full, rank = _full_row_ranks(spec["ins"]), spec.pop("rank")
            spec["ranks"] = full if rank == "full" else tuple(min(rank, bond) for bond in full)
        spec.pop("in_features")
        return spec

    @classmethod
    def bound(cls, smallest) -> int:
        return max(_full_row_ranks(smallest.ins), default=1)

    def check(self) -> None:
        if len(self.ins) != len(self.ranks) + 1:
            raise ValueError(f"ins {self.ins} need one rank between neighbours, not {self.ranks}")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        ins = label_sizes("c", self.ins)
        sizes = {"t": self.out_features} | label_sizes("r", (1, *self.ranks, 1)) | ins
        factors = {f"core_{k}": f"t r{k} c{k} r{k + 1}" for k in range(len(ins))}
        return einsum("t", " ".join(ins), factors, sizes)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Return the TT-SVD of every row, whose error is at most ``sqrt(d - 1)`` times the least one."""
        cores = tt_svd(weight.reshape(self.out_features, *self.ins), self.ranks, batch=1)
        return {f"core_{k}": core for k, core in enumerate(cores)}


def _full_row_ranks(ins: Sequence[int]) -> tuple[int, ...]:
    return clip_ranks((1,) * len(ins), tuple(ins), "full")
