"""Structured matrices from noise: the draws that a recipe may name, each ``(structure, std, options, generator) -> factors``.

Add a draw by writing a function with its name in ``@draw``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tenfold.structure import Factors, Structure, TensorTrain

BRANCHES: dict[str, Callable[[int], float]] = {
    "zero": lambda layers: 0.0,
    "scaled": lambda layers: (2 * layers) ** -0.5,
}
DRAWS: dict[str, Callable[[Structure, float, dict, torch.Generator | None], Factors]] = {}


def draw(name: str):
    def register(function):
        DRAWS[name] = function
        return function

    return register


@draw("noise")
def even(structure: Structure, std: float, options: dict, generator=None) -> Factors:
    """Entries of ``W`` get the standard deviation ``std``, all factors an equal share of the variance."""
    return structure.init(std, generator)


@draw("balanced")
def balanced(structure: Structure, std: float, options: dict, generator=None) -> Factors:
    """Cores with orthonormal columns, all of the norm in the last one, which makes ``||W||_F = std sqrt(out in)``.

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


@draw("fans")
def by_fans(structure: Structure, std: float, options: dict, generator=None) -> Factors:
    """Every factor for itself: ``sqrt(1 / in) min(1, sqrt(out / in))``, ``in`` and ``out`` its own fans; ``std`` is not used.

    Reference: arXiv 2406.06248.
    """
    fans, factors = structure.fans(), structure.init(1.0, generator)
    for name, (inner, out) in fans.items():
        scale = math.sqrt(1 / inner) * min(1.0, math.sqrt(out / inner))
        factors[name] = torch.randn(factors[name].shape, generator=generator) * scale
    return factors


def ended(structure: Structure, factors: Factors, branch: str, layers: int) -> Factors:
    """``factors`` of what ends a branch beside the stream: those that are applied last times ``BRANCHES[branch](layers)``."""
    return factors | {name: factors[name] * BRANCHES[branch](layers) for name in structure.last_factors()}


def check_options(options: Mapping[str, Any], known: Mapping[str, type], where: str) -> None:
    """Raise ValueError for an option of a start that is not ``known``, one of another type, or a ``branch`` that is none."""
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{where} has no option {name!r}; there is {', '.join(known) or 'none'}")
        if not isinstance(value, (int, float) if known[name] is float else known[name]) or isinstance(value, bool):
            raise ValueError(f"{name} of {where} is {value!r}; give one of type {known[name].__name__}")
    if (branch := options.get("branch", "zero")) not in BRANCHES:
        raise ValueError(f"branch of {where} is {branch!r}; choose one of {', '.join(BRANCHES)}")
