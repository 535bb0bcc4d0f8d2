"""The abstraction ``Structure``: a frozen dataclass of integers; tensors are passed to its methods."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold.structure import als, factorization, matmul, scattered
from tenfold.structure.cost_model import HardwareCosts, OpCounts
from tenfold.structure.scattered import ScatteredEinsum

Factors = dict[str, Tensor]
RATIOS = (*(k / 20 for k in range(1, 11)), 0.6, 0.7, 0.8, 0.9)  # of a dense matrix, at which errors are sampled


class FactorSpec(ABC):
    """Description of the factors of a layer: a frozen dataclass of integers."""

    kind: ClassVar[str]  # the name in recipes and checkpoints

    def __init_subclass__(cls, kind: str = "", **more):
        super().__init_subclass__(**more)
        cls.kind = kind

    @abstractmethod
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every factor, index maps left out."""

    def index_shapes(self) -> dict[str, tuple[int]]:
        """Return the shape of every index map: int32 buffers among the factors, not counted as parameters."""
        return {}

    def index_limits(self) -> dict[str, int]:
        """Return the number of places that every index map chooses from, each at most once."""
        return {}

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.factor_shapes().values())

    def check_factors(self, factors: Factors) -> None:
        """Raise ValueError if a factor is missing or has the wrong shape."""
        for name, shape in {**self.factor_shapes(), **self.index_shapes()}.items():
            if name not in factors:
                raise ValueError(f"factor {name!r} is missing for {self}; given were {sorted(factors)}")
            if tuple(factors[name].shape) != shape:
                raise ValueError(f"factor {name!r} has shape {tuple(factors[name].shape)} but {self} needs {shape}")

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        """Return whether a budget can set a field of ``spec``: only matrices have errors by rank."""
        return False

    def to_json(self) -> dict:
        """Return the kind and the fields as plain JSON."""
        return {"kind": self.kind} | {name: _to_json(getattr(self, name)) for name in self._fields()}

    @classmethod
    def _fields(cls) -> dict[str, dataclasses.Field]:
        return {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def family(cls, kind: str | None) -> Any:
        """Return the class below this one that is named ``kind``."""
        families = {family.kind: family for family in _families(cls)}
        if kind not in families:
            raise ValueError(f"there is no structure {kind!r}; choose one of {', '.join(sorted(families))}")
        return families[kind]

    @classmethod
    def from_json(cls, data: dict) -> Any:
        """Return the description that ``to_json`` wrote."""
        return cls.family(data.get("kind")).from_fields({key: value for key, value in data.items() if key != "kind"})

    @classmethod
    def from_fields(cls, fields: dict) -> Self:
        """Return an instance with ``fields`` in plain JSON."""
        known = cls._fields()
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f"{cls.kind} has no field {unknown[0]!r}; its fields are {', '.join(known)}")
        missing = [n for n, field in known.items() if field.default is dataclasses.MISSING and n not in fields]
        if missing:
            raise ValueError(f"{cls.kind} needs {', '.join(missing)}; given were {', '.join(fields) or 'no fields'}")
        return cls(**{name: _from_json(value) for name, value in fields.items()})


@dataclass(frozen=True, kw_only=True)
class Structure(FactorSpec):
    """A set of matrices ``W (out, in)`` that share one structure, described by integers.

    A family adds its integers, its normal form and, where one is known, its closed-form fit. This class derives everything
    else from the einsums of the normal form.
    """

    grows: ClassVar[str] = ""  # the field that a budget may raise: "rank", "terms"
    optimal = False  # whether the closed form is the nearest member in the Frobenius norm
    optimal_in_metric = False  # whether the metric form is the nearest member in its norm

    @abstractmethod
    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        """Return the einsums that add up to ``W``; the names of their factors are the checkpoint keys."""

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """Return the best known non-iterative fit to ``weight (out, in)``; None if there is none."""
        return None

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors | None:
        """Return a good non-iterative fit in ``||outputs^(1/2) (W - What) inputs^(1/2)||``; None if there is none.

        ``inputs (in, in)`` and ``outputs (out, out)`` are positive definite.
        """
        return None

    def shared_form(
        self, weights: Sequence[Tensor], shared: tuple[str, ...], sweeps: int, tolerance: float
    ) -> Factors | None:
        """Return a good joint fit, in the Frobenius norm, with the factors ``shared``; None if there is none."""
        return None

    def check(self) -> None:
        """Raise ValueError for integers that describe no matrix."""

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Return all fields for a matrix ``(out, inner)``: those of a recipe, and what can be derived from them.

        ``parts`` is the number of factors of each side, or two numbers, for ``outs`` and for ``ins``.
        """
        names, spec = cls._fields().keys(), dict(spec)
        if "out_features" in names:
            spec = {"out_features": out, "in_features": inner} | spec
        if {"outs", "ins"} <= names:
            parts = spec.pop("parts", len(spec.get("outs") or spec.get("ins") or (1, 1)))
            spec = factorization.split_sides(out, inner, parts) | spec
        return spec

    # derived, final ------------------------------------------------------------------------------------------------

    def __post_init__(self):
        for name in self._fields():
            object.__setattr__(self, name, _to_tuples(getattr(self, name)))
        self.check()
        _ = self._row_blocks, self.matrices  # validates sizes, and caches both before anything is compiled

    @cached_property
    def _einsums(self) -> tuple[ScatteredEinsum, ...]:
        return self.normal_form()

    @cached_property
    def matrices(self) -> tuple[str, ...] | None:
        """Names of the factors if ``W`` is their product as matrices, up to index maps (``left``, ``right``); else None."""
        (einsum, *more) = self._einsums
        spec, factors = einsum.spec, [labels for _, labels in einsum.spec.factors]
        path = [*spec.outs, *(labels[-1] for labels in factors[:-1]), *spec.ins]
        is_chain = factors == list(pairwise(path)) and len(set(path)) == len(path)
        only_maps = all(isinstance(x, str) for x in einsum.rows + einsum.columns)
        return spec.names if is_chain and only_maps and not more else None

    @cached_property
    def _row_map(self) -> str | None:
        """Name of the index map that permutes all rows of several einsums last; it is applied once to what they make."""
        return scattered.shared_row_map(self._einsums)

    @cached_property
    def _row_blocks(self) -> list[tuple[int, int, list[ScatteredEinsum]]]:
        """``(first row, number of rows, einsums)`` of blocks of contiguous rows, in front of ``_row_map``."""
        return scattered.row_blocks(self._einsums, self._row_map)

    @property
    def _additions(self) -> int:
        """Number of elements that one product with a vector adds to others, outside of the einsums."""
        return sum((len(einsums) - 1) * size for _, size, einsums in self._row_blocks)

    @property
    def shape(self) -> tuple[int, int]:
        return self._einsums[0].shape

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for einsum in self._einsums for name, shape in einsum.spec.factor_shapes().items()}

    def index_shapes(self) -> dict[str, tuple[int]]:
        return {name: (length,) for einsum in self._einsums for name, length, _ in einsum.maps}

    def index_limits(self) -> dict[str, int]:
        return {name: limit for einsum in self._einsums for name, _, limit in einsum.maps}

    @property
    def index_numel(self) -> int:
        return sum(length for (length,) in self.index_shapes().values())

    def axes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Return ``{factor: (batch, out, in) axes}``: a factor applied to vectors is a batch of matrices."""
        return {name: axes for einsum in self._einsums for name, axes in einsum.spec.axes().items()}

    def fans(self) -> dict[str, tuple[int, int]]:
        """Return ``{factor: (fan in, fan out)}``; scalars that are initialised to one are left out."""
        return {name: fans for einsum in self._einsums for name, fans in einsum.spec.fans().items()}

    def last_factors(self) -> set[str]:
        """Return the factor that is applied last, for every part of a sum; scalars initialised to one are left out."""
        return {next(name for name in e.spec.names if name not in e.spec.ones) for e in self._einsums}

    def flops(self, rows: int = 1) -> int:
        """Return the FLOPs of ``apply`` on ``rows`` vectors: 2 per multiply-add; includes making ``W`` if it is made."""
        return rows * self._additions + sum(matmul.flops(einsum.spec, rows) for einsum in self._einsums)

    def price(self, rows: int, costs: HardwareCosts) -> float:
        """Return the expected time of ``apply`` on ``rows`` vectors, in equivalent FLOPs."""
        adds, more = rows * self._additions, len(self._einsums) - 1
        parts = [matmul.counts_of(einsum.spec, rows, costs)[0] for einsum in self._einsums]
        return sum(parts, OpCounts(adds, 3 * adds, 0, more)).price(costs)

    def lookup_flops(self, rows: int = 1) -> int:
        """Return the FLOPs of ``rows`` for ``rows`` indices."""
        return sum(matmul.lookup_flops(einsum.spec, rows) for einsum in self._einsums)

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """Return random factors for which the elements of ``W`` have mean 0 and standard deviation ``std``.

        An element is a sum of products, so ``std^2 = number of terms * product of the variances``; all random factors get the
        same variance. Combinators initialise their parts, and index maps with a random injection from ``generator``.
        """
        spec = self._einsums[0].spec
        random = [name for name in spec.names if name not in spec.ones]
        scale = (std**2 / spec.num_terms) ** (0.5 / len(random))
        return {
            name: torch.randn(shape, generator=generator, dtype=dtype) * scale
            if name in random
            else torch.ones(shape, dtype=dtype)
            for name, shape in spec.factor_shapes().items()
        }

    def apply(self, factors: Factors, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows out"]:
        """Return ``x (..., in) @ W.T -> (..., out)`` by the cheapest plan for this number of rows."""
        self.check_factors(factors)
        if x.shape[-1] != self.shape[1]:
            raise ValueError(f"x has {x.shape[-1]} columns but {self} takes {self.shape[1]}")
        return self._apply(factors, x)

    def _apply(self, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        (out, inner), blocks, permuted = self.shape, [], self._row_map
        flat, early = x.reshape(-1, inner), bias if permuted is None else None
        for start, size, some in self._row_blocks:
            own = early if early is None or size == out else early.narrow(0, start, size)
            parts = [one.apply(factors, flat, size, own if one is some[0] else None) for one in some]
            blocks.append(sum(parts[1:], parts[0]))
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        if permuted is not None:
            y = scattered.scatter_columns(y, factors[permuted].long(), out)
            y = y if bias is None else y + bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], out)

    def _apply_matrices(self, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As ``_apply``, by plain matrix products only; requires ``matrices``."""
        return self._einsums[0].apply_matrices(factors, x, bias)

    def rows(self, factors: Factors, index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows inner"]:
        """Return ``W[index] (..., in)`` without making ``W``."""
        self.check_factors(factors)
        flat, blocks = index.reshape(-1), self._row_blocks
        if self._row_map is None or len(blocks) == 1:
            parts = [einsum.look_up(factors, flat) for einsum in self._einsums]
            found = sum(parts[1:], parts[0])
        else:
            flat = torch.where(flat < 0, self.shape[0], flat)  # an index below 0 is an error, too
            places = scattered.invert(factors[self._row_map].long())[flat]
            found = scattered.look_up_blocks(blocks, factors, places)
        return found.reshape(*index.shape, self.shape[1])

    def dense(self, factors: Factors) -> Float[Tensor, "out inner"]:
        """Return ``W (out, in)``."""
        self.check_factors(factors)
        if self._row_map is not None and len(self._row_blocks) > 1:
            blocks = [[e.dense_block(factors) for e in some] for _, _, some in self._row_blocks]
            whole = torch.cat([sum(parts[1:], parts[0]) for parts in blocks])
            return whole[scattered.invert(factors[self._row_map].long())]
        parts = [einsum.dense(factors) for einsum in self._einsums]
        return sum(parts[1:], parts[0])

    fit = als.fit

    @classmethod
    def for_shape(cls, out: int, inner: int, spec: dict) -> Structure:
        """Return the structure of a recipe's ``spec`` for a matrix ``(out, inner)``; missing fields are derived."""
        family = Structure.family(spec.get("kind"))
        fields = family.complete(out, inner, {key: value for key, value in spec.items() if key != "kind"})
        structure = family.from_fields(fields)
        if structure.shape != (out, inner):
            raise ValueError(
                f"{structure} makes a matrix {structure.shape}, but the weight is {(out, inner)} (out, in): change its sizes"
            )
        return structure

    @classmethod
    def within(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """Return the largest structure of ``spec`` with at most ``budget`` parameters, by raising its rank or terms."""
        family = Structure.family(spec.get("kind"))
        if not family.is_open(spec):
            raise ValueError(f"{spec} leaves no rank open that a budget could set; leave the rank or the terms out")
        return family.grow_to(out, inner, spec, budget)

    @classmethod
    def errors_by_size(
        cls, weight: Tensor, spec: dict, inputs: Tensor, outputs: Tensor, fitted: bool = True
    ) -> list[tuple[Structure, float]]:
        """Return structures of ``spec`` by increasing size, each with its squared error in the norm of both metrics.

        Args:
            fitted: fit iteratively if there is no closed form; otherwise such errors are NaN.

        Raises:
            ValueError: no structure of ``spec``, however large, has this shape.
        """
        (out, inner), errors = weight.shape, {}
        for ratio in RATIOS:
            try:
                structure = cls.within(out, inner, spec, ratio * weight.numel())
            except ValueError:  # none is as small as this
                continue
            factors = structure.metric_form(weight, inputs, outputs) or structure.closed_form(weight)
            if factors is None and fitted:  # quick rather than good, because there are many sizes
                factors = structure.fit(weight, inputs, start=structure.fit(weight, sweeps=3), sweeps=3)
            errors[structure] = math.nan
            if factors is not None:
                rest = weight - structure.dense(factors)
                errors[structure] = float((rest * (outputs @ rest @ inputs)).sum())
        if not errors:
            cls.within(out, inner, spec, 2**61)  # raises if the spec itself is wrong
        return list(errors.items())

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        return cls.grows != "" and not {cls.grows, f"{cls.grows}s"} & spec.keys()

    @classmethod
    def grow_to(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """Return what ``within`` returns, for one family."""

        def make(number: int) -> Structure:
            return cls.for_shape(out, inner, spec | {cls.grows: number})

        smallest = make(1)
        bound = cls.bound(smallest)
        number = bisect_right(range(1, bound + 1), budget, key=lambda number: make(number).numel)
        if number == 0:
            raise ValueError(
                f"{smallest} has {smallest.numel} parameters, more than the {int(budget)} that are to be kept; keep more"
            )
        return make(number)

    @classmethod
    def bound(cls, smallest) -> int:
        """Return the value of the field that grows from which on every matrix is a member."""
        return min(smallest.shape)


def has_matrix(kind: str | None) -> bool:
    """Return whether layers of this kind multiply by a matrix, which the direct children of ``FactorSpec`` do not."""
    return all(spec.kind != kind for spec in FactorSpec.__subclasses__())


def check_matrix(kind: str | None, where: str) -> None:
    """Raise ValueError for a kind of layer without a matrix."""
    if not has_matrix(kind):
        raise ValueError(
            f"{where}: {kind} has a non-linearity between its factors, so that it can't take the place of a trained matrix; "
            "train it from noise (tenfold pretrain), or choose a structure, for instance low_rank"
        )


def _to_tuples(value):
    return tuple(map(_to_tuples, value)) if isinstance(value, list | tuple) else value


def _to_json(value):
    if isinstance(value, Structure):
        return value.to_json()
    return [_to_json(v) for v in value] if isinstance(value, tuple) else value


def _from_json(value):
    if isinstance(value, dict) and "kind" in value:
        return Structure.from_json(value)
    return [_from_json(v) for v in value] if isinstance(value, list | tuple) else value


def _families(parent: type) -> list[type]:
    return [leaf for child in parent.__subclasses__() for leaf in ([child] if child.kind else _families(child))]
