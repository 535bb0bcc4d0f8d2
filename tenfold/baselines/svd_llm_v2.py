"""The allocation of SVD-LLM v2: within each type of matrix, more is removed where truncation loses less.

``L_i = ||W_i X - SVD_r(W_i X)||_F`` is the truncation loss of matrix ``i`` if all kept the same share, ``R`` the share that is
removed in all. Of the ``n`` matrices of one type in all layers, matrix ``i`` loses the share

``R_i = n R s_i / sum_j s_j``, ``s_i = 1 / log L_i``.

The truncation itself is that of recipe ``svd-llm``: the paper takes ``S = U sqrt(D)`` from an SVD ``U D U^T`` of the second
moment of the inputs and truncates the SVD of ``W S``; the symmetric root that is used here is ``S U^T``, which truncates to the
same matrix and needs no positive definite moment either.

Reference: arXiv 2503.12340, algorithms 1 and 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tenfold.compress.allocate import TradeoffCurve, by_shares
from tenfold.models.config import Calibrate

TOKENS = 256 * 2048  # of the paper's calibration text, over which its losses are sums; the logarithm depends on it


def allocate(
    settings: Calibrate, curves: Sequence[TradeoffCurve], budget: float, influence: Mapping[str, float]
) -> dict[str, Any]:
    """Return ``{name: option}`` for every item, shares by the truncation losses within each type.

    Args:
        curves: losses are half the mean squared error of a token's output.
        budget: parameters of all items together.
    """
    removed = 1 - budget / sum(curve.whole for curve in curves)
    types: dict[str, list[TradeoffCurve]] = {}
    for curve in curves:
        types.setdefault(re.sub(r"\d+", "*", curve.name), []).append(curve)
    shares: dict[str, float] = {}
    for group in types.values():
        losses = np.array([truncation_loss(curve, 1 - removed) for curve in group])
        most = np.array([1 - curve.costs[0] / curve.whole for curve in group])
        lost = removed_shares(losses, removed, most)
        shares |= {curve.name: 1 - float(share) for curve, share in zip(group, lost, strict=True)}
    return by_shares(curves, shares)


def truncation_loss(curve: TradeoffCurve, share: float) -> float:
    """Return ``||W X - SVD_r(W X)||_F`` at the largest rank within ``share``, over as many tokens as in the paper."""
    k = max(0, int(np.searchsorted(curve.costs, share * curve.whole, side="right")) - 1)
    return float(np.sqrt(2 * TOKENS * curve.losses[k]))


def removed_shares(losses: np.ndarray, removed: float, most: np.ndarray) -> np.ndarray:
    """Return ``R_i (n,)``, whose mean is ``removed``; what a matrix can't lose beyond ``most (n,)`` the others do.

    Losses below Euler's number, whose logarithm says nothing, count as that.
    """
    scores, full = 1 / np.log(np.maximum(losses, np.e)), np.zeros(len(losses), bool)
    while True:
        rest = removed * len(losses) - most[full].sum()
        shares = np.where(full, most, scores * rest / max(scores[~full].sum(), 1e-300))
        over = (shares > most) & ~full
        if not over.any():
            return shares
        full |= over
