"""Structures made of structures, and a diagram written out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.scattered import ScatteredEinsum


@dataclass(frozen=True, kw_only=True)
class Sum(Structure, kind="sum"):
    """``W = parts[0] + parts[1] + ...``; the factors of part ``k`` are called ``part_k_<name>``.

    A dense or folded matrix with a low-rank adapter is a sum.
    """

    parts: tuple[Structure, ...]

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        return spec | {"parts": [Structure.for_shape(out, inner, part) for part in spec.get("parts", ())]}

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        return any(Structure.family(part.get("kind")).is_open(part) for part in spec.get("parts", ()))

    @classmethod
    def grown(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """What the fixed parts leave of the budget goes to the open ones in equal shares."""
        specs = spec["parts"]
        growing = [k for k, part in enumerate(specs) if Structure.family(part.get("kind")).is_open(part)]
        made = {k: cls.for_shape(out, inner, part) for k, part in enumerate(specs) if k not in growing}
        left = budget - sum(part.numel for part in made.values())
        for done, k in enumerate(growing):
            made[k] = cls.within(out, inner, specs[k], left / (len(growing) - done))
            left -= made[k].numel
        return cls(parts=tuple(made[k] for k in range(len(specs))))

    def check(self) -> None:
        if not self.parts or len({part.shape for part in self.parts}) != 1:
            raise ValueError(
                f"the parts of a sum must be matrices of one shape, not {[part.shape for part in self.parts]}"
            )

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return tuple(
            place.renamed(_prefix(f"part_{k}_")) for k, part in enumerate(self.parts) for place in part.normal_form()
        )

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """The parts share the variance evenly."""
        return _started(self.parts, std / len(self.parts) ** 0.5, generator, dtype)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """Greedy: every part is fitted to what the parts before it leave. A start, not an optimum."""
        return self._greedy(weight, lambda part, rest: part.closed_form(rest))

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors | None:
        """Greedy, too."""
        return self._greedy(
            weight, lambda part, rest: part.metric_form(rest, inputs, outputs) or part.closed_form(rest)
        )

    def _greedy(self, weight: Tensor, form) -> Factors | None:
        rest, factors = weight.double(), {}
        for k, part in enumerate(self.parts):
            fitted = form(part, rest)
            if fitted is None:
                return None
            rest = rest - part.dense(fitted)
            factors |= {f"part_{k}_{name}": value for name, value in fitted.items()}
        return factors


@dataclass(frozen=True, kw_only=True)
class Stacked(Structure, kind="stacked"):
    """``W = [parts[0]; parts[1]; ...]``, one below the other; the factors of part ``k`` are called ``part_k_<name>``.

    For fused matrices: query, key and value, or gate and up, each folded by itself.
    """

    parts: tuple[Structure, ...]

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
    def starts(self) -> list[int]:
        """The first row of every part, and the end."""
        return [sum(part.shape[0] for part in self.parts[:k]) for k in range(len(self.parts) + 1)]

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        outer = (self.starts[-1], self.parts[0].shape[1])
        return tuple(
            replace(place, rows=(*place.rows, self.starts[k]), outer=outer)
            for k, part in enumerate(self.parts)
            for place in (one.renamed(_prefix(f"part_{k}_")) for one in part.normal_form())
        )

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """Every part for itself: they do not overlap."""
        return _started(self.parts, std, generator, dtype)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """As near as those of the parts."""
        return self._by_parts(lambda part, place: part.closed_form(weight[place]))

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors | None:
        """That of the parts: what couples the outputs of two parts is left out."""
        return self._by_parts(lambda part, at: part.metric_form(weight[at], inputs, outputs[at, at]))

    def _by_parts(self, form) -> Factors | None:
        factors: Factors = {}
        for k, part in enumerate(self.parts):
            fitted = form(part, slice(self.starts[k], self.starts[k + 1]))
            if fitted is None:
                return None
            factors |= {f"part_{k}_{name}": value for name, value in fitted.items()}
        return factors


def _prefix(text: str):
    return lambda name: text + name


def _started(parts: tuple[Structure, ...], std: float, generator: torch.Generator | None, dtype) -> Factors:
    made = [part.init(std, generator, dtype) for part in parts]
    return {f"part_{k}_{name}": value for k, factors in enumerate(made) for name, value in factors.items()}


@dataclass(frozen=True, kw_only=True)
class Scattered(Structure, kind="placed"):
    """``W[rows[i], columns[j]] = base[i, j]``, every other entry zero.

    Args:
        base: the smaller matrix.
        out_features: rows of ``W``.
        in_features: columns of ``W``.
        map_rows: whether there is an index map, a buffer ``rows (base out) int32``; without it rows stay in place.
        map_columns: likewise ``columns (base in) int32``.

    With whole maps this is a permuted matrix (TQCompressor); with shorter ones pruned units and sliced widths. Every
    index of a map must occur once: the maps are injective. Without a map the base lies in the first rows (columns), which
    costs no index at all: the others are the pruned ones.
    """

    base: Structure
    out_features: int
    in_features: int
    map_rows: bool = True
    map_columns: bool = True

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        return {"out_features": out, "in_features": inner} | _based(out, inner, spec)

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        return "base" in spec and Structure.family(spec["base"].get("kind")).is_open(spec["base"])

    @classmethod
    def grown(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """A base of the full shape grows; permutations cost nothing."""
        return cls.for_shape(out, inner, spec | {"base": cls.within(out, inner, spec["base"], budget).to_json()})

    def check(self) -> None:
        out, inner = self.base.shape
        for side, small, large in (("rows", out, self.out_features), ("columns", inner, self.in_features)):
            if small > large:
                raise ValueError(f"{small} {side} of the base can't be placed in {large} {side}")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return tuple(self._place(place.renamed(_inner)) for place in self.base.normal_form())

    def _place(self, place: ScatteredEinsum) -> ScatteredEinsum:
        rows = (("rows", self.base.shape[0], self.out_features),) if self.map_rows else ()
        columns = (("columns", self.base.shape[1], self.in_features),) if self.map_columns else ()
        return replace(
            place,
            rows=place.rows + _steps("rows", self.map_rows, self.base.shape[0] < self.out_features),
            columns=place.columns + _steps("columns", self.map_columns, self.base.shape[1] < self.in_features),
            outer=(self.out_features, self.in_features),
            maps=place.maps + rows + columns,
        )

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """The base, at random rows and columns."""
        factors = {_inner(name): value for name, value in self.base.init(std, generator, dtype).items()}
        for name, mapped, length, into in zip(
            ("rows", "columns"), (self.map_rows, self.map_columns), self.base.shape, self.shape, strict=True
        ):
            if mapped:
                factors[name] = torch.randperm(into, generator=generator)[:length].to(torch.int32)
        return factors

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """With the first rows and columns as maps; :mod:`tenfold.structure.permutation_search` searches for better ones."""
        (out, inner), device = self.base.shape, weight.device
        identity = torch.arange(max(self.shape), dtype=torch.int32, device=device)
        return self.fitted(weight, identity[:out], identity[:inner])

    def fitted(
        self, weight: Float[Tensor, "out inner"], rows: Int[Tensor, "a"], columns: Int[Tensor, "b"]
    ) -> Factors | None:
        """The base's closed form for ``weight[rows][:, columns]``, with these maps."""
        factors = self.base.closed_form(weight[rows.long()][:, columns.long()])
        if factors is None:
            return None
        named = {_inner(name): value for name, value in factors.items()}
        maps = {"rows": rows.int()} if self.map_rows else {}
        return named | maps | ({"columns": columns.int()} if self.map_columns else {})


def _steps(name: str, mapped: bool, shorter: bool) -> tuple[str | int, ...]:
    """An index map, a shift by nothing, or no step at all."""
    return (name,) if mapped else (0,) if shorter else ()


def _based(out: int, inner: int, spec: dict) -> dict:
    """A recipe's ``spec`` with its base made for a matrix ``(out, inner)``."""
    return spec | (
        {"base": Structure.for_shape(out, inner, spec["base"])} if isinstance(spec.get("base"), dict) else {}
    )


def _inner(name: str) -> str:
    """Maps of a placed base keep apart from those of the outer one."""
    return f"base_{name}" if name.endswith(("rows", "columns")) else name


@dataclass(frozen=True, kw_only=True)
class Transposed(Structure, kind="transposed"):
    """``W = base^T`` with the same factors."""

    base: Structure

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        return _based(inner, out, spec)

    @property
    def optimal(self) -> bool:
        return self.base.optimal

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return tuple(place.transposed() for place in self.base.normal_form())

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """That of the base."""
        return self.base.init(std, generator, dtype)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """That of the base."""
        return self.base.closed_form(weight.mT)


@dataclass(frozen=True, kw_only=True)
class CustomEinsum(Structure, kind="diagram"):
    """A diagram written in a recipe: ``W[outs, ins] = sum over the other labels of the product of the factors``.

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
        """A recipe writes factors and sizes as mappings, and labels as lists or as words in one string."""
        return (
            spec
            | {name: _pairs(spec[name]) for name in ("factors", "sizes") if name in spec}
            | {name: _words(spec[name]) for name in ("outs", "ins") if name in spec}
        )

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return (ScatteredEinsum(EinsumSpec(self.outs, self.ins, self.factors, self.sizes)),)


def _pairs(value: Any) -> list:
    items = value.items() if isinstance(value, dict) else value
    return [(name, _words(labels) if not isinstance(labels, int) else labels) for name, labels in items]


def _words(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else list(value)
