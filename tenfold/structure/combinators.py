"""Structures made of structures, and an einsum written in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, starmap
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
        return self._join(part.init(std, generator, dtype) for part in self.parts) or {}

    def _part_einsums(self) -> list[tuple[int, ScatteredEinsum]]:
        return [
            (k, einsum.rename_factors(lambda name, k=k: f"part_{k}_{name}"))
            for k, part in enumerate(self.parts)
            for einsum in part.normal_form()
        ]

    @staticmethod
    def _join(fits: Iterable[Factors | None]) -> Factors | None:
        """Return the factors of all parts; None if one has none."""
        factors: Factors = {}
        for k, fit in enumerate(fits):
            if fit is None:
                return None
            factors |= {f"part_{k}_{name}": value for name, value in fit.items()}
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
        return self._join(self._fit_greedily(weight, lambda part, rest: part.closed_form(rest)))

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors | None:
        def fit(part: Structure, rest: Tensor) -> Factors | None:
            return part.metric_form(rest, inputs, outputs) or part.closed_form(rest)

        return self._join(self._fit_greedily(weight, fit))

    def _fit_greedily(self, weight: Tensor, fit: Callable[[Structure, Tensor], Factors | None]) -> Iterator:
        rest = weight.double()
        for part in self.parts:
            yield (fitted := fit(part, rest))
            rest = rest - part.dense(fitted or {})


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
    def _slices(self) -> list[slice]:
        """The rows of every part."""
        return list(starmap(slice, pairwise(accumulate((part.shape[0] for part in self.parts), initial=0))))

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        slices, width = self._slices, self.parts[0].shape[1]
        return tuple(
            replace(einsum, rows=(*einsum.rows, slices[k].start), outer=(slices[-1].stop, width))
            for k, einsum in self._part_einsums()
        )

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        return self._join(part.closed_form(weight[rows]) for part, rows in zip(self.parts, self._slices, strict=True))

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors | None:
        """Return the metric forms of the parts: what couples the outputs of two parts is ignored."""
        each = zip(self.parts, self._slices, strict=True)
        return self._join(part.metric_form(weight[rows], inputs, outputs[rows, rows]) for part, rows in each)


@dataclass(frozen=True, kw_only=True)
class Scattered(Structure, kind="placed"):
    """``W[rows[i], columns[j]] = base[i, j]``, every other element zero.

    Maps of full length make a permuted matrix (TQCompressor), shorter ones a matrix with pruned units or sliced widths. An
    index may occur only once in a map.
    """

    base: Structure
    out_features: int
    in_features: int
    map_rows: bool = (
        True  # whether there is a buffer ``rows (base out) int32``; without it the base is in the first rows
    )
    map_columns: bool = True  # likewise ``columns (base in) int32``

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        base = {"base": Structure.for_shape(out, inner, spec["base"])} if isinstance(spec.get("base"), dict) else {}
        return {"out_features": out, "in_features": inner} | spec | base

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        return "base" in spec and Structure.family(spec["base"].get("kind")).is_open(spec["base"])

    @classmethod
    def grow_to(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """Return a permuted matrix with the largest base of the full shape."""
        return cls.for_shape(out, inner, spec | {"base": cls.within(out, inner, spec["base"], budget).to_json()})

    def check(self) -> None:
        for side, small, large, _ in self._sides:
            if small > large:
                raise ValueError(f"{small} {side} of the base can't be placed in {large} {side}")

    @property
    def _sides(self) -> list[tuple[str, int, int, bool]]:
        """``("rows" or "columns", size of the base, size, whether there is a map)``."""
        (out, inner), sizes = self.base.shape, (self.out_features, self.in_features)
        return [("rows", out, sizes[0], self.map_rows), ("columns", inner, sizes[1], self.map_columns)]

    @property
    def _maps(self) -> tuple[tuple[str, int, int], ...]:
        return tuple((name, length, limit) for name, length, limit, mapped in self._sides if mapped)

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        # without a map the offset 0, or nothing where the base fills the side
        rows, columns = ((n,) if mapped else (0,) if small < large else () for n, small, large, mapped in self._sides)
        sizes = (self.out_features, self.in_features)
        inner = (one.rename_factors(_rename_maps) for one in self.base.normal_form())
        return tuple(
            ScatteredEinsum(one.spec, one.rows + rows, one.columns + columns, sizes, one.maps + self._maps)
            for one in inner
        )

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
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


def _rename_maps(name: str) -> str:
    """Return a name for a map of the base that differs from those of the outer structure."""
    return f"base_{name}" if name.endswith(("rows", "columns")) else name


@dataclass(frozen=True, kw_only=True)
class CustomEinsum(Structure, kind="diagram"):
    """An einsum written in a recipe: ``W[outs, ins] = sum over the other labels of the product of the factors``."""

    factors: tuple[tuple[str, tuple[str, ...]], ...]  # name and labels
    outs: tuple[str, ...]  # labels of the rows, slowest first
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

    def check(self) -> None:
        if not (self.outs and self.ins):
            raise ValueError(f"outs {self.outs} and ins {self.ins} need a label at least, one that may have size 1")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return (ScatteredEinsum(EinsumSpec(self.outs, self.ins, self.factors, self.sizes)),)


def _pairs(value: Any) -> list:
    return list(value.items() if isinstance(value, dict) else value)


def _split_labels(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else list(value)
