"""Structure: the one abstraction. A frozen value of integers; the tensors it speaks of are passed to it."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold.structure import factorization, matmul
from tenfold.structure.cost_model import HardwareCosts, OpCounts
from tenfold.structure.scattered import ScatteredEinsum

Factors = dict[str, Tensor]
SHARES = (*(k / 20 for k in range(1, 11)), 0.6, 0.7, 0.8, 0.9)  # at which an error curve is sampled


@dataclass(frozen=True, kw_only=True)
class Structure(ABC):
    """A set of matrices ``W (out, in)`` that share one structure, described by integers.

    A family adds its integers, its normal form and, where one is known, its closed-form fit. Everything else is
    derived here, once, from the labelled diagrams of the normal form.
    """

    kind: ClassVar[str]  # the name in recipes and checkpoints
    grows: ClassVar[str | None] = None  # the field that a budget may raise: "rank", "terms"

    @abstractmethod
    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        """Diagrams that add up to ``W``, and where their matrices lie; factor names are the checkpoint keys."""

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors | None:
        """The best known fit to ``weight (out, in)`` that needs no iteration; None where no such fit is known."""
        return None

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors | None:
        """A good fit in the norm ``||outputs^(1/2) (W - What) inputs^(1/2)||`` that needs no iteration; None: not known.

        ``inputs (in, in)`` and ``outputs (out, out)`` are positive definite.
        """
        return None

    def shared_form(
        self, weights: Sequence[Tensor], shared: tuple[str, ...], sweeps: int, tolerance: float
    ) -> Factors | None:
        """A good joint fit, in the Frobenius norm, of factors some of which are shared; None: not known for these."""
        return None

    @property
    def optimal(self) -> bool:
        """Whether the closed form is the nearest member in the Frobenius norm."""
        return False

    @property
    def optimal_in_metric(self) -> bool:
        """Whether the metric form is the nearest member in its norm."""
        return False

    def check(self) -> None:  # noqa: B027 - most families have nothing to add
        """Raise ValueError for integers that make no matrix."""

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """The fields for a matrix ``(out, inner)`` from what a recipe gives, the derivable ones filled in.

        ``parts``: into how many factors each side is split, or two numbers, for ``outs`` and for ``ins``.
        """
        names, spec = {field.name for field in dataclasses.fields(cls)}, dict(spec)
        if "out_features" in names:
            spec = {"out_features": out, "in_features": inner} | spec
        if {"outs", "ins"} <= names:
            parts = spec.pop("parts", len(spec.get("outs") or spec.get("ins") or (1, 1)))
            spec = factorization.sides(out, inner, parts) | spec
        return spec

    # derived, final ------------------------------------------------------------------------------------------------

    def __init_subclass__(cls, kind: str = "", **more):
        super().__init_subclass__(**more)
        cls.kind = kind

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _frozen(getattr(self, field.name)))
        self.check()
        self._placements  # noqa: B018 - labels without a size and sizes below one are refused here
        self._blocks, self.matrices  # noqa: B018 - known before anything is compiled

    @cached_property
    def _placements(self) -> tuple[ScatteredEinsum, ...]:
        return self.normal_form()

    @cached_property
    def matrices(self) -> tuple[str, ...] | None:
        """The factors whose product is ``W``, or what index maps make it of: ``matrix``; ``left`` and ``right``; else None."""
        (place, *more) = self._placements
        diagram, plain = place.diagram, not more and all(isinstance(x, str) for x in place.rows + place.columns)
        factors = [labels for _, labels in diagram.factors]
        path = [*diagram.outs, *(labels[-1] for labels in factors[:-1]), *diagram.ins]
        chained = factors == list(pairwise(path)) and len(set(path)) == len(path)
        return diagram.names if plain and chained else None

    @cached_property
    def _blocks(self) -> list[tuple[int, int, list[ScatteredEinsum]]] | None:
        """``(first row, number of rows, what is added there)`` where the rows of the matrix are blocks below each other."""
        found: dict[tuple[int, int], list[ScatteredEinsum]] = {}
        for place in self._placements:
            if place.rows_from is None:
                return None
            found.setdefault((place.rows_from, place.diagram.shape[0]), []).append(place)
        end, ordered = 0, sorted(found.items(), key=lambda item: item[0])
        for (start, size), _ in ordered:
            if start != end:
                return None
            end = start + size
        return [(*where, some) for where, some in ordered] if end == self.shape[0] else None

    @property
    def _added(self) -> int:
        """Numbers that are added to others in one product with a vector."""
        if self._blocks is None:
            return (len(self._placements) - 1) * self.shape[0]
        return sum((len(some) - 1) * size for _, size, some in self._blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``"""
        return self._placements[0].shape

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every factor, index maps left out."""
        return {name: shape for place in self._placements for name, shape in place.diagram.factor_shapes().items()}

    def index_shapes(self) -> dict[str, tuple[int]]:
        """The length of every index map: int32 buffers among the factors, not counted as parameters."""
        return {name: (length,) for place in self._placements for name, length, _ in place.maps}

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.factor_shapes().values())

    @property
    def index_numel(self) -> int:
        """The number of entries of its index maps."""
        return sum(length for (length,) in self.index_shapes().values())

    @property
    def terms(self) -> int:
        """How many products are added up in one entry of ``W``, the parts of a sum together."""
        return sum(place.diagram.terms for place in self._placements)

    def axes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """``{factor: its axes as (batch, out, in)}``: a factor applied to vectors is a batch of matrices."""
        return {name: axes for place in self._placements for name, axes in place.diagram.axes().items()}

    def fans(self) -> dict[str, tuple[int, int]]:
        """``{factor: (fan in, fan out)}``: over how many numbers it sums, and how many it makes of them.

        Scalars that start at one are left out.
        """
        return {name: fans for place in self._placements for name, fans in place.diagram.fans().items()}

    def last(self) -> set[str]:
        """The factors that are applied last, one of every part of a sum, scalars that start at one left out."""
        diagrams = [place.diagram for place in self._placements]
        return {next(name for name in diagram.names if name not in diagram.ones) for diagram in diagrams}

    def flops(self, rows: int = 1) -> int:
        """FLOPs of ``apply`` on ``rows`` vectors: a multiply-add is 2, a rebuild of ``W`` is counted where it is made."""
        return rows * self._added + sum(matmul.flops(place.diagram, rows) for place in self._placements)

    def price(self, rows: int, costs: HardwareCosts) -> float:
        """Return the expected time of :meth:`apply` on ``rows`` vectors, in equivalent FLOPs."""
        adds, more = rows * self._added, len(self._placements) - 1
        parts = [matmul.counts_of(place.diagram, rows, costs)[0] for place in self._placements]
        return sum(parts, OpCounts(adds, 3 * adds, 0, more)).price(costs)

    def lookup_flops(self, rows: int = 1) -> int:
        """FLOPs of ``rows`` for so many indices."""
        return sum(matmul.lookup_flops(place.diagram, rows) for place in self._placements)

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """Random factors so that the entries of ``W`` have mean 0 and standard deviation ``std``.

        An entry is a sum of ``terms`` products, so ``std^2 = terms * product of the variances``; the factors share
        the variance evenly. Combinators start their parts, and index maps at a random injection from ``generator``.
        """
        diagram = self._placements[0].diagram
        random = [name for name in diagram.names if name not in diagram.ones]
        share = (std**2 / diagram.terms) ** (0.5 / len(random))
        return {
            name: torch.randn(shape, generator=generator, dtype=dtype) * share
            if name in random
            else torch.ones(shape, dtype=dtype)
            for name, shape in diagram.factor_shapes().items()
        }

    def apply(self, factors: Factors, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows out"]:
        """``x (..., in) @ W.T -> (..., out)``, by the plan that is cheapest for this many rows."""
        self.check_factors(factors)
        if x.shape[-1] != self.shape[1]:
            raise ValueError(f"x has {x.shape[-1]} columns but {self} takes {self.shape[1]}")
        return self._apply(factors, x)

    def _apply(self, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out, inner = self.shape
        flat, places = x.reshape(-1, inner), self._placements
        if (blocks := self._blocks) is None:
            parts = [place.apply(factors, flat, bias if place is places[0] else None) for place in places]
            return sum(parts[1:], parts[0]).reshape(*x.shape[:-1], out)
        made = []
        for start, size, some in blocks:
            own = bias if bias is None or size == out else bias.narrow(0, start, size)
            parts = [place.block(factors, flat, own if place is some[0] else None) for place in some]
            made.append(sum(parts[1:], parts[0]))
        return (made[0] if len(made) == 1 else torch.cat(made, 1)).reshape(*x.shape[:-1], out)

    def _product(self, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As :meth:`_apply` where ``matrices`` are known: their products and nothing around them."""
        return self._placements[0].product(factors, self.matrices or (), x, bias)

    def rows(self, factors: Factors, index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows inner"]:
        """``W[index] (..., in)``, without ``W``."""
        self.check_factors(factors)
        return self._rows(factors, index)

    def _rows(self, factors: Factors, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        parts = [place.rows_at(factors, flat) for place in self._placements]
        return sum(parts[1:], parts[0]).reshape(*index.shape, self.shape[1])

    def dense(self, factors: Factors) -> Float[Tensor, "out inner"]:
        """``W (out, in)``"""
        self.check_factors(factors)
        parts = [place.dense(factors) for place in self._placements]
        return sum(parts[1:], parts[0])

    def fit(
        self,
        weights: Float[Tensor, "out inner"] | Sequence[Float[Tensor, "out inner"]],
        metrics: Float[Tensor, "n n"] | Sequence[Float[Tensor, "n n"] | None] | None = None,
        row_metrics: Float[Tensor, "m m"] | Sequence[Float[Tensor, "m m"] | None] | None = None,
        shared: Sequence[str] = (),
        **settings,
    ) -> Factors:
        """The factors nearest to ``weights``; see :func:`tenfold.structure.als.fit`."""
        from tenfold.structure.als import fit  # the fit needs this class: imported where it is called

        return fit(self, weights, metrics, row_metrics, shared, **settings)

    def to_json(self) -> dict:
        """The fields and the kind, as plain JSON."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": self.kind} | fields

    @classmethod
    def from_json(cls, data: dict) -> Structure:
        """The structure that :meth:`to_json` wrote."""
        data = dict(data)
        family = cls.family(data.pop("kind", None))
        names = [field.name for field in dataclasses.fields(family)]
        for name in data:
            if name not in names:
                raise ValueError(f"{family.kind} has no field {name!r}; its fields are {', '.join(names)}")
        missing = [
            f.name for f in dataclasses.fields(family) if f.default is dataclasses.MISSING and f.name not in data
        ]
        if missing:
            raise ValueError(f"{family.kind} needs {', '.join(missing)}; given were {', '.join(data) or 'no fields'}")
        return family(**{name: _structures(value) for name, value in data.items()})

    @classmethod
    def for_shape(cls, out: int, inner: int, spec: dict) -> Structure:
        """The structure of a recipe's ``spec`` for a matrix ``(out, inner)``; what the spec leaves out is derived."""
        family = cls.family(spec.get("kind"))
        fields = family.complete(out, inner, {key: value for key, value in spec.items() if key != "kind"})
        made = cls.from_json({"kind": family.kind} | fields)
        if made.shape != (out, inner):
            raise ValueError(
                f"{made} makes a matrix {made.shape}, but the weight is {(out, inner)} (out, in): change its sizes"
            )
        return made

    @classmethod
    def within(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """The largest structure of ``spec`` with at most ``budget`` parameters: its rank, or its terms, are raised."""
        family = cls.family(spec.get("kind"))
        if not family.is_open(spec):
            raise ValueError(f"{spec} leaves no rank open that a budget could set; leave the rank or the terms out")
        return family.grown(out, inner, spec, budget)

    @classmethod
    def sizes(
        cls, weight: Tensor, spec: dict, inputs: Tensor, outputs: Tensor, fitted: bool = True
    ) -> list[tuple[Structure, float]]:
        """Structures of ``spec`` from small to large, and the squared error of each in the norm of both metrics.

        Args:
            fitted: alternate where there is no closed form; without it such errors are NaN.

        Raises:
            ValueError: there is no structure of ``spec`` for this shape, however large.
        """
        (out, inner), found = weight.shape, {}
        for share in SHARES:
            try:
                structure = cls.within(out, inner, spec, share * weight.numel())
            except ValueError:  # nothing is as small as this
                continue
            factors = structure.metric_form(weight, inputs, outputs) or structure.closed_form(weight)
            if factors is None and not fitted:
                found[structure] = math.nan
                continue
            if factors is None:  # quick rather than good: many sizes are asked for
                factors = structure.fit(weight, inputs, start=structure.fit(weight, sweeps=3), sweeps=3)
            rest = weight - structure.dense(factors)
            found[structure] = float((rest * (outputs @ rest @ inputs)).sum())
        if not found:
            cls.within(out, inner, spec, 2**61)  # tells what is wrong with the spec, if it is not the size
        return list(found.items())

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        """Whether a budget can set something in ``spec``."""
        return cls.grows is not None and not {cls.grows, f"{cls.grows}s"} & spec.keys()

    @classmethod
    def grown(cls, out: int, inner: int, spec: dict, budget: float) -> Structure:
        """The work of :meth:`within` for one family."""

        def make(number: int) -> Structure:
            return cls.for_shape(out, inner, spec | {cls.grows: number})

        smallest = make(1)
        bound = cls.bound(smallest)
        number = factorization.largest(lambda n: make(n).numel if n <= bound else 2**62, budget)
        if number == 0:
            raise ValueError(
                f"{smallest} has {smallest.numel} parameters, more than the {int(budget)} that are to be kept; keep more"
            )
        return make(number)

    @classmethod
    def bound(cls, smallest) -> int:
        """The largest useful value of the field that grows: beyond the smaller side nothing is gained."""
        return min(smallest.shape)

    @classmethod
    def family(cls, kind: str | None) -> type[Structure]:
        """The class of a kind's name."""
        families = {family.kind: family for family in _leaves(Structure)}
        if kind not in families:
            raise ValueError(f"there is no structure {kind!r}; choose one of {', '.join(sorted(families))}")
        return families[kind]

    def check_factors(self, factors: Factors) -> None:
        """Raise ValueError for a factor that is missing or has another shape."""
        for name, shape in {**self.factor_shapes(), **self.index_shapes()}.items():
            if name not in factors:
                raise ValueError(f"factor {name!r} is missing for {self}; given were {sorted(factors)}")
            if tuple(factors[name].shape) != shape:
                raise ValueError(f"factor {name!r} has shape {tuple(factors[name].shape)} but {self} needs {shape}")


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value):
    if isinstance(value, Structure):
        return value.to_json()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _structures(value):
    if isinstance(value, dict) and "kind" in value:
        return Structure.from_json(value)
    return [_structures(v) for v in value] if isinstance(value, list | tuple) else value


def _leaves(family: type) -> list[type]:
    return [leaf for child in family.__subclasses__() for leaf in ([child] if child.kind else _leaves(child))]
