"""Where factors come from: the starts that a recipe may name, each ``(structure, weight, options) -> factors``.

Add a start by writing a function with its name in ``@start``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tenfold.models.random_init import DRAWS, check_options
from tenfold.models.suggestions import check_name
from tenfold.structure import Factors, Kronecker, Scattered, Structure, Sum
from tenfold.structure.permutation_search import search

QUICK = {"sweeps": 20, "tolerance": 1e-4}  # alternating fits of a whole model; a recipe may ask for more
STARTS: dict[str, Callable[[Structure, Tensor, dict], Factors]] = {}
OPTIONS: dict[str, Mapping[str, type]] = {}  # that a start has, and of which type they are
FIT = {"sweeps": int, "tolerance": float, "starts": int, "seed": int}  # those of Structure.fit


def start(*names: str, **options: type):
    def register(function):
        STARTS.update(dict.fromkeys(names, function))
        OPTIONS.update(dict.fromkeys(names, options))
        return function

    return register


def factors_from(structure: Structure, weight: Tensor, fit: str, norm: str, options: dict) -> Factors:
    """The factors that the start ``fit`` makes for ``weight (out, in)``, the lost norm restored if asked."""
    check_name(fit, STARTS, "start")
    check_options(options, OPTIONS[fit], f"the start {fit} in the place of a matrix")
    factors = STARTS[fit](structure, weight, options)
    return restored(structure, factors, weight) if norm == "restore" else factors


def of_fits(options: dict) -> dict:
    """``options`` of a start as settings of the alternating fit that it becomes where a metric is known or factors are shared."""
    check_options(options, FIT, "the start of a fit to several matrices or to activations")
    return options


def beside_adapter(structure: Sum, factors: Factors) -> Factors:
    """``factors`` of the first part of ``structure``, and an adapter behind it that is zero and can learn.

    ``left`` is zero and ``right`` random. A fit would make both zero where the first part leaves nothing, and no gradient
    leads away from there.

    Reference: arXiv 2106.09685; arXiv 2303.16753.
    """
    adapter = structure.parts[1]
    right = adapter.init(adapter.shape[1] ** -0.5)["right"]
    new = {"part_1_left": right.new_zeros(adapter.shape[0], adapter.rank), "part_1_right": right}
    return {f"part_0_{name}": value for name, value in factors.items()} | new


def restored(structure: Structure, factors: Factors, weight: Tensor) -> Factors:
    """``factors`` times ``||W|| / ||What||``: into the scalars of the terms where there are some, else into one factor.

    Reference: the adaptive normalisation of arXiv 2412.12351.
    """
    alpha = float(weight.double().norm() / structure.dense(factors).norm().clamp_min(1e-300))
    name = "scale" if "scale" in factors else next(iter(structure.factor_shapes()))
    return factors | {name: factors[name] * alpha}


@start("nearest", **FIT)
def nearest(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """The closed form where there is one, else alternating least squares."""
    closed = structure.closed_form(weight)
    return structure.fit(weight, **QUICK | options) if closed is None else closed


@start("svd", "van-loan", "tt-svd", "mpo", "block-svd", "hosvd", "row-trains")
def closed_form(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """The closed form, under the name that the literature gives it for each family."""
    factors = structure.closed_form(weight)
    if factors is None:
        raise ValueError(f"{structure.kind} has no closed-form fit; start from alternating or from noise")
    return factors


@start("alternating", **FIT)
def alternating(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """Alternating least squares from the closed form, or from noise."""
    return structure.fit(weight, **QUICK | options)


@start("prune", rest=float)
def prune(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """Every ``b``-th row and ``d``-th column as ``outer``, ``inner = [1, 0.1, ..]`` (Krony-PT's pruning start)."""
    if not isinstance(structure, Kronecker) or len(structure.outs) != 2 or structure.terms != 1:
        raise ValueError(f"the pruning start needs a Kronecker product of one term and two factors, not {structure}")
    inner = torch.full((1, structure.outs[1], structure.ins[1]), options.get("rest", 0.1), dtype=torch.float64)
    inner[0, 0, 0] = 1.0
    outer = weight[:: structure.outs[1], :: structure.ins[1]].double()[None]
    return {"outer": outer, "inner": inner} | (
        {"scale": torch.ones(1, dtype=torch.float64)} if structure.scaled else {}
    )


@start("permute", rounds=int, starts=int, seed=int)
def permute(structure: Structure, weight: Tensor, options: dict) -> Factors:
    """The permutation search of TQCompressor: fit and re-assign rows and columns in turn."""
    if not isinstance(structure, Scattered):
        raise ValueError(f"the permutation search needs a placed structure with index maps, not {structure}")
    return search(structure, weight, **options)


def _drawn(fit: str):
    """Random factors; what is drawn by a standard deviation gets that of the weight's entries."""

    def function(structure: Structure, weight: Tensor, options: dict) -> Factors:
        generator = torch.Generator().manual_seed(options.get("seed", 0))
        return DRAWS[fit](structure, float(weight.float().std()), options, generator)

    return function


for fit in DRAWS:
    start(fit, seed=int)(_drawn(fit))
