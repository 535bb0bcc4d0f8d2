"""Initial factors: fits to a weight (``STARTS``) and random draws (``DRAWS``) that a recipe may name as its ``start``.

To add one, write a function and a line in ``STARTS`` or ``DRAWS``. Every draw is a start, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from tenfold.models.recipe import Start
from tenfold.models.suggestions import check_name
from tenfold.structure import Factors, Kronecker, LowRank, Scattered, Structure, Sum, TensorTrain
from tenfold.structure.permutation_search import search

QUICK = {"sweeps": 20, "tolerance": 1e-4}  # alternating fits of a whole model; a recipe may ask for more
FIT_OPTIONS = {"sweeps": int, "tolerance": float, "starts": int, "seed": int}  # of Structure.fit
# scale of the factors that are applied last in a matrix at the end of a residual branch, by the number of layers
BRANCHES = {"zero": lambda layers: 0.0, "scaled": lambda layers: (2 * layers) ** -0.5}


def initialize(structure: Structure, weight: Tensor, start: Start) -> Factors:
    """Return the factors that ``start`` makes for ``weight (out, in)``.

    ``norm: restore`` scales them by ``||W|| / ||What||``: in the scalars of the terms where there are some, else in one factor.

    Reference: the adaptive normalisation of arXiv 2412.12351.
    """
    check_name(start.fit, STARTS, "start")
    function, known = STARTS[start.fit]
    check_options(start.options, known, f"the start {start.fit} in the place of a matrix")
    factors = function(structure, weight, start.options)
    if start.norm == "keep":
        return factors
    alpha = float(weight.double().norm() / structure.dense(factors).norm().clamp_min(1e-300))
    name = "scale" if "scale" in factors else next(iter(structure.factor_shapes()))
    return factors | {name: factors[name] * alpha}


def add_adapter(structure: Structure, factors: Factors) -> Factors:
    """Return ``factors`` of the first part of ``structure`` with an adapter that is zero and can learn.

    ``left`` is zero and ``right`` random. A fit would make both zero where the first part leaves nothing, and their
    gradients would stay zero.

    Reference: arXiv 2106.09685; arXiv 2303.16753.
    """
    assert isinstance(structure, Sum) and isinstance(structure.parts[1], LowRank)
    adapter = structure.parts[1]
    right = adapter.init(adapter.shape[1] ** -0.5)["right"]
    new = {"part_1_left": right.new_zeros(adapter.shape[0], adapter.rank), "part_1_right": right}
    return {f"part_0_{name}": value for name, value in factors.items()} | new


def check_fit_options(options: dict) -> dict:
    """Return the ``options`` of a start for the alternating fit that it becomes with a metric or with shared factors."""
    check_options(options, FIT_OPTIONS, "the start of a fit to several matrices or to activations")
    return options


def check_options(options: Mapping[str, Any], known: Mapping[str, type], where: str) -> None:
    """Raise ValueError for an option of a start that is not ``known``, has another type, or is an unknown ``branch``."""
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{where} has no option {name!r}; there is {', '.join(known) or 'none'}")
        if not isinstance(value, (int, float) if known[name] is float else known[name]) or isinstance(value, bool):
            raise ValueError(f"{name} of {where} is {value!r}; give one of type {known[name].__name__}")
    if (branch := options.get("branch", "zero")) not in BRANCHES:
        raise ValueError(f"branch of {where} is {branch!r}; choose one of {', '.join(BRANCHES)}")


# random draws: (structure, std, generator) -> factors ------------------------------------------------------------------


def draw_even(structure: Structure, std: float, generator: Generator | None = None) -> Factors:
    """Draw factors with equal parts of the variance, so that the entries of ``W`` have the standard deviation ``std``."""
    return structure.init(std, generator)


def draw_balanced(structure: Structure, std: float, generator: Generator | None = None) -> Factors:
    """Draw cores with orthonormal columns, all of the norm in the last one: ``||W||_F = std sqrt(out in)``.

    Reference: arXiv 2306.02697, the authors' code (a QR sweep from the left).
    """
    if not isinstance(structure, TensorTrain):
        raise ValueError(f"the start balanced is for tensor trains; {structure.kind} takes noise or fans")
    factors, carried = {}, torch.eye(1)
    for name, shape in structure.factor_shapes().items():
        core = torch.randn(shape, generator=generator) / math.sqrt(shape[0])
        core = torch.tensordot(carried, core, 1)
        matrix = core.reshape(-1, core.shape[-1])
        if matrix.shape[0] < matrix.shape[1]:  # more columns than rows are never orthonormal
            raise ValueError(
                f"the start balanced takes a bond of {matrix.shape[0]} behind {name} at most, not {matrix.shape[1]}; give "
                "smaller ranks, or the start noise"
            )
        orthogonal, carried = torch.linalg.qr(matrix)
        factors[name] = orthogonal.reshape(*core.shape[:-1], -1)
    out, inner = structure.shape
    last = f"core_{len(structure.outs) - 1}"
    return factors | {last: factors[last] * std * math.sqrt(out * inner)}


def draw_by_fans(structure: Structure, std: float, generator: Generator | None = None) -> Factors:
    """Draw every factor with ``sqrt(1 / in) min(1, sqrt(out / in))`` of its own fans; ``std`` is not used.

    Reference: arXiv 2406.06248.
    """
    fans, factors = structure.fans(), structure.init(1.0, generator)
    for name, (inner, out) in fans.items():
        scale = math.sqrt(1 / inner) * min(1.0, math.sqrt(out / inner))
        factors[name] = torch.randn(factors[name].shape, generator=generator) * scale
    return factors


DRAWS: dict[str, Callable[[Structure, float, Generator | None], Factors]] = {
    "noise": draw_even,
    "balanced": draw_balanced,
    "fans": draw_by_fans,
}


# starts: (structure, weight, options) -> factors -----------------------------------------------------------------------


def fit_nearest(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """Fit by the closed form where there is one, else by alternating least squares."""
    return structure.closed_form(weight) or fit_alternating(structure, weight, options)


def fit_closed_form(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """Fit by the closed form, which the literature names differently for each family."""
    factors = structure.closed_form(weight)
    if factors is None:
        raise ValueError(f"{structure.kind} has no closed-form fit; start from alternating or from noise")
    return factors


def fit_alternating(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """Fit by alternating least squares from the closed form, or from noise."""
    return structure.fit(weight, **QUICK | options)


def prune_kronecker(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """Take every ``b``-th row and ``d``-th column as ``outer``, ``inner = [1, 0.1, ..]`` (Krony-PT's pruning start)."""
    if not isinstance(structure, Kronecker) or len(structure.outs) != 2 or structure.terms != 1:
        raise ValueError(f"the pruning start needs a Kronecker product of one term and two factors, not {structure}")
    inner = torch.full((1, structure.outs[1], structure.ins[1]), options.get("rest", 0.1), dtype=torch.float64)
    inner[0, 0, 0] = 1.0
    factors = {"outer": weight[:: structure.outs[1], :: structure.ins[1]].double()[None], "inner": inner}
    return factors | ({"scale": torch.ones(1, dtype=torch.float64)} if structure.scaled else {})


def search_permutations(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """Fit and assign rows and columns in turn (the permutation search of TQCompressor)."""
    if not isinstance(structure, Scattered):
        raise ValueError(f"the permutation search needs a placed structure with index maps, not {structure}")
    return search(structure, weight, **options)


def _draw_start(draw: Callable[[Structure, float, Generator | None], Factors]):
    """Return ``draw`` as a start, with the standard deviation of the weight's entries."""

    def function(structure: Structure, weight: Tensor, options: dict) -> Factors:
        generator = torch.Generator().manual_seed(options.get("seed", 0))
        return draw(structure, float(weight.float().std()), generator)

    return function


CLOSED_FORMS = ("svd", "van-loan", "tt-svd", "mpo", "block-svd", "hosvd", "row-trains")
# name -> function, and the types of its options
STARTS: dict[str, tuple[Callable[[Structure, Tensor, dict], Factors], Mapping[str, type]]] = {
    "nearest": (fit_nearest, FIT_OPTIONS),
    **{name: (fit_closed_form, {}) for name in CLOSED_FORMS},
    "alternating": (fit_alternating, FIT_OPTIONS),
    "prune": (prune_kronecker, {"rest": float}),
    "permute": (search_permutations, {"rounds": int, "starts": int, "seed": int}),
    **{name: (_draw_start(draw), {"seed": int}) for name, draw in DRAWS.items()},
}
