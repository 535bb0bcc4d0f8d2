"""Structured matrices from noise: the draws that a recipe may name, each ``(structure, std, options, generator) -> factors``.

Add a draw by writing a function with its name in ``@draw``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tenfold.structure import Factors, Structure, TensorTrain

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
        orthogonal, carried = torch.linalg.qr(core.reshape(-1, core.shape[-1]))
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


def ends_in_zero(structure: Structure, factors: Factors) -> Factors:
    """``factors`` with the last one that is applied at zero, in every part of a sum: ``W`` is zero, and learns."""
    diagrams = [place.diagram for place in structure.normal_form()]
    last = {next(name for name in diagram.names if name not in diagram.ones) for diagram in diagrams}
    return factors | {name: torch.zeros_like(factors[name]) for name in last}
