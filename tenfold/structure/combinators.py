"""Structures made of structures, and an einsum written in a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.scattered import ScatteredEinsum


@dataclass(frozen=True, kw_only=True)
class _Parts(Structure):
    """A structure of several parts; the factors of part ``k`` are named ``part_k_<name>``."""

    parts: tuple[Structure, ...]

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        return self._for_each_part(lambda _, part: part.init(std, generator, dtype)) or {}

    def _part_einsums(self) -> list[tuple[int, ScatteredEinsum]]:
        """Return the einsums of all parts, each with the number of its part."""
        return [
            (k, einsum.rename_factors(lambda name, k=k: f"part_{k}_{name}"))
            for k, part in enumerate(self.parts)
            for einsum in part.normal_form()
        ]

    def _for_each_part(self, make: Callable[[int, Structure], Factors | None]) -> Factors | None:
        """Return the factors that ``make(k, part)`` returns for every part; None if it returns None for one."""
        factors: Factors = {}
        for k, part in enumerate(self.parts):
            made = make(k, part)
            if made is None:
                return None
            factors |= {f"part_{k}_{name}": value for name, value in made.items()}
        return factors


@dataclass(frozen=True, kw_only=True)
class Sum(_Parts, kind="sum"):
    """``W = parts[0] + parts[1] + ...``; the factors of part ``k`` are named ``part_k_<name>``.

    For instance a dense or factorised matrix with a low-rank adapter.
    """

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        return spec | {"parts": [Structure.for_shape(out, inner, part) for part in spec.get("parts", ())]}

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        return any(Structure.family(part.get("kind")).is_open(part) for part in spec.get("parts", ()))

    @classmethod
    def grow_to(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """Return a sum whose open parts share evenly what the others leave of the budget."""
        specs = spec["parts"]
        is_open = [Structure.family(part.get("kind")).is_open(part) for part in specs]
        made = {k: cls.for_shape(out, inner, part) for k, part in enumerate(specs) if not is_open[k]}
        left, count = budget - sum(part.numel for part in made.values()), sum(is_open)
        for k, part in enumerate(specs):
            if is_open[k]:
                made[k] = cls.within(out, inner, part, left / count)
                left, count = left - made[k].numel, count - 1
        return cls(parts=tuple(made[k] for k in range(len(specs))))

    def check(self) -> None:
        if not self.parts or len({part.shape for part in self.parts}) != 1:
            raise ValueError(
                f"the parts of a sum must be matrices of one shape, not {[part.shape for part in self.parts]}"
            )

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return tuple(einsum for _, einsum in self._part_einsums())

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """Return random factors; the parts share the variance evenly."""
        return super().init(std / len(self.parts) ** 0.5, generator, dtype)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """Return the greedy fit of every part to what the parts before it leave: a start, not an optimum."""
        return self._fit_greedily(weight, lambda part, rest: part.closed_form(rest))

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors | None:
        """Return the greedy fit, as ``closed_form``."""
        return self._fit_greedily(
            weight, lambda part, rest: part.metric_form(rest, inputs, outputs) or part.closed_form(rest)
        )

    def _fit_greedily(self, weight: Tensor, fit: Callable[[Structure, Tensor], Factors | None]) -> Factors | None:
        rest = weight.double()

        def fit_rest(_: int, part: Structure) -> Factors | None:
            nonlocal rest
            fitted = fit(part, rest)
            rest = rest if fitted is None else rest - part.dense(fitted)
            return fitted

        return self._for_each_part(fit_rest)


@dataclass(frozen=True, kw_only=True)
class Stacked(_Parts, kind="stacked"):
    """``W = [parts[0]; parts[1]; ...]``, one below the other; the factors of part ``k`` are named ``part_k_<name>``.

    For fused matrices: query, key and value, or gate and up, each factorised by itself.
    """

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        parts = spec.get("parts", ())
        return spec | {"parts": [Structure.for_shape(out // len(parts), inner, part) for part in parts]}

    def check(self) -> None:
        if not self.parts or len({part.shape[1] for part in self.parts}) != 1:
            raise ValueError(f"stacked parts must have one width, not {[part.shape for part in self.parts]}")

    @property
    def optimal(self) -> bool:
        return all(part.optimal for part in self.parts)

    @property
    def _offsets(self) -> list[int]:
        """The first row of every part, and the number of rows."""
        return list(accumulate((part.shape[0] for part in self.parts), initial=0))

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        offsets, width = self._offsets, self.parts[0].shape[1]
        return tuple(
            replace(einsum, rows=(*einsum.rows, offsets[k]), outer=(offsets[-1], width))
            for k, einsum in self._part_einsums()
        )

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """Return the closed forms of the parts."""
        return self._for_each_part(lambda k, part: part.closed_form(weight[self._rows_of(k)]))

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors | None:
        """Return the metric forms of the parts: what couples the outputs of two parts is ignored."""

        def fit(k: int, part: Structure) -> Factors | None:
            rows = self._rows_of(k)
            return part.metric_form(weight[rows], inputs, outputs[rows, rows])

        return self._for_each_part(fit)

    def _rows_of(self, k: int) -> slice:
        return slice(*self._offsets[k : k + 2])


@dataclass(frozen=True, kw_only=True)
class Scattered(Structure, kind="placed"):
    """``W[rows[i], columns[j]] = base[i, j]``, every other element zero.

    Args:
        base: the smaller matrix.
        out_features: rows of ``W``.
        in_features: columns of ``W``.
        map_rows: whether there is an index map, a buffer ``rows (base out) int32``; without it the base is in the first rows.
        map_columns: likewise ``columns (base in) int32``.

    Maps of full length make a permuted matrix (TQCompressor), shorter ones a matrix with pruned units or sliced widths. An
    index may occur only once in a map.
    """

    base: Structure
    out_features: int
    in_features: int
    map_rows: bool = True
    map_columns: bool = True

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        return {"out_features": out, "in_features": inner} | _complete_base(out, inner, spec)

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        return "base" in spec and Structure.family(spec["base"].get("kind")).is_open(spec["base"])

    @classmethod
    def grow_to(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """Return a permuted matrix with the largest base of the full shape."""
        return cls.for_shape(out, inner, spec | {"base": cls.within(out, inner, spec["base"], budget).to_json()})

    def check(self) -> None:
        for side, small, large in zip(("rows", "columns"), self.base.shape, self._outer, strict=True):
            if small > large:
                raise ValueError(f"{small} {side} of the base can't be placed in {large} {side}")

    @property
    def _outer(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def _maps(self) -> tuple[tuple[str, int, int], ...]:
        sides = zip(("rows", "columns"), self.base.shape, self._outer, (self.map_rows, self.map_columns), strict=True)
        return tuple((name, length, limit) for name, length, limit, mapped in sides if mapped)

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        # without a map the offset 0, or nothing where the base fills the side
        rows, columns = (
            (name,) if mapped else (0,) if small < large else ()
            for name, mapped, small, large in zip(
                ("rows", "columns"), (self.map_rows, self.map_columns), self.base.shape, self._outer, strict=True
            )
        )
        return tuple(
            replace(
                einsum,
                rows=einsum.rows + rows,
                columns=einsum.columns + columns,
                outer=self._outer,
                maps=einsum.maps + self._maps,
            )
            for einsum in (one.rename_factors(_rename_maps) for one in self.base.normal_form())
        )

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """Return random factors of the base, at random rows and columns."""
        factors = {_rename_maps(name): value for name, value in self.base.init(std, generator, dtype).items()}
        for name, length, limit in self._maps:
            factors[name] = torch.randperm(limit, generator=generator)[:length].to(torch.int32)
        return factors

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """Return ``fit_at`` the first rows and columns; ``tenfold.structure.permutation_search`` finds better ones."""
        (out, inner), device = self.base.shape, weight.device
        identity = torch.arange(max(self.shape), dtype=torch.int32, device=device)
        return self.fit_at(weight, identity[:out], identity[:inner])

    def fit_at(
        self, weight: Float[Tensor, "out inner"], rows: Int[Tensor, "a"], columns: Int[Tensor, "b"]
    ) -> Factors | None:
        """Return the base's closed form for ``weight[rows][:, columns]``, with these maps."""
        factors = self.base.closed_form(weight[rows.long()][:, columns.long()])
        if factors is None:
            return None
        maps = {"rows": rows.int(), "columns": columns.int()}
        return {_rename_maps(n): value for n, value in factors.items()} | {n: maps[n] for n, _, _ in self._maps}


def _complete_base(out: int, inner: int, spec: dict) -> dict:
    if not isinstance(spec.get("base"), dict):
        return spec
    return spec | {"base": Structure.for_shape(out, inner, spec["base"])}


def _rename_maps(name: str) -> str:
    """Return a name for a map of the base that differs from those of the outer structure."""
    return f"base_{name}" if name.endswith(("rows", "columns")) else name


@dataclass(frozen=True, kw_only=True)
class Transposed(Structure, kind="transposed"):
    """``W = base^T`` with the same factors."""

    base: Structure

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        return _complete_base(inner, out, spec)

    @property
    def optimal(self) -> bool:
        return self.base.optimal

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return tuple(einsum.transpose() for einsum in self.base.normal_form())

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        return self.base.init(std, generator, dtype)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        return self.base.closed_form(weight.mT)


@dataclass(frozen=True, kw_only=True)
class CustomEinsum(Structure, kind="diagram"):
    """An einsum written in a recipe: ``W[outs, ins] = sum over the other labels of the product of the factors``.

    Args:
        factors: ``(name, labels)`` of every factor.
        outs: labels of the rows, slowest first.
        ins: labels of the columns.
        sizes: ``(label, size)`` of every label.
    """

    factors: tuple[tuple[str, tuple[str, ...]], ...]
    outs: tuple[str, ...]
    ins: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Return all fields; a recipe gives factors and sizes as mappings, and labels as lists or as words in a string."""
        spec = spec | {name: _split_labels(spec[name]) for name in ("outs", "ins") if name in spec}
        if "factors" in spec:
            spec["factors"] = [(name, _split_labels(labels)) for name, labels in _pairs(spec["factors"])]
        if "sizes" in spec:
            spec["sizes"] = _pairs(spec["sizes"])
        return spec

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return (ScatteredEinsum(EinsumSpec(self.outs, self.ins, self.factors, self.sizes)),)


def _pairs(value: Any) -> list:
    return list(value.items() if isinstance(value, dict) else value)


def _split_labels(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else list(value)
