"""Allocation of SVD-LLM v2: within each type of matrix, more is removed where truncation loses less.

``L_i = ||W_i X - SVD_r(W_i X)||_F`` is the truncation loss of matrix ``i`` if all kept the same ratio, ``R`` the ratio that is
removed in total. Of the ``n`` matrices of one type in all layers, matrix ``i`` loses the ratio

``R_i = n R s_i / sum_j s_j``, ``s_i = 1 / log L_i``.

The truncation itself is that of recipe ``svd-llm``: the paper takes ``S = U sqrt(D)`` from an SVD ``U D U^T`` of the second
moment of the inputs and truncates the SVD of ``W S``; the symmetric root used here is ``S U^T``, which truncates to the
same matrix and needs no positive definite moment either.

Reference: arXiv 2503.12340, algorithms 1 and 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tenfold.compression.allocation import TradeoffCurve, allocate_by_ratios
from tenfold.models.config import Calibrate

TOKENS = 256 * 2048  # of the paper's calibration text, over which its losses are sums; the logarithm depends on it


def allocate_by_type(
    settings: Calibrate, curves: Sequence[TradeoffCurve], budget: float, influence: Mapping[str, float]
) -> dict[str, Any]:
    """Return ``{name: option}`` with ratios by the truncation losses within each type of matrix.

    Args:
        curves: with losses that are half the mean squared error of the output of a token.
        budget: parameters of all items together.
    """
    removed = 1 - budget / sum(curve.whole for curve in curves)
    types: dict[str, list[TradeoffCurve]] = {}
    for curve in curves:
        types.setdefault(re.sub(r"\d+", "*", curve.name), []).append(curve)
    ratios: dict[str, float] = {}
    for group in types.values():
        losses = np.array([truncation_loss(curve, 1 - removed) for curve in group])
        most = np.array([1 - curve.costs[0] / curve.whole for curve in group])
        lost = removed_ratios(losses, removed, most)
        ratios |= {curve.name: 1 - float(ratio) for curve, ratio in zip(group, lost, strict=True)}
    return allocate_by_ratios(curves, ratios)


def truncation_loss(curve: TradeoffCurve, ratio: float) -> float:
    """Return ``||W X - SVD_r(W X)||_F`` at the largest rank within ``ratio``, over as many tokens as in the paper."""
    return float(np.sqrt(2 * TOKENS * curve.losses[curve.index_within(ratio * curve.whole)]))


def removed_ratios(losses: np.ndarray, removed: float, most: np.ndarray) -> np.ndarray:
    """Return ``R_i (n,)``, whose mean is ``removed``; what a matrix would lose beyond ``most (n,)`` the others do.

    Losses below Euler's number, whose logarithm is below 1, count as that.
    """
    scores, full = 1 / np.log(np.maximum(losses, np.e)), np.zeros(len(losses), bool)
    while True:
        rest = removed * len(losses) - most[full].sum()
        ratios = np.where(full, most, scores * rest / max(scores[~full].sum(), 1e-300))
        over = (ratios > most) & ~full
        if not over.any():
            return ratios
        full |= over
