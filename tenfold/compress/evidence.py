"""What an error of a site costs, by the gradients of whole sequences: the Fisher information along one direction.

A site whose matrix is wrong by ``E`` makes ``E z_t`` too much of its input ``z_t``. With ``g_t`` the gradient at its output, of
the loss summed over a sequence of tokens that the model itself draws, the error costs about

    ``1/2 mean over sequences of (sum_t g_t^T E z_t)^2 / tokens of a sequence``

nats a token. Unlike ``1/2 tr(G E C E^T)`` this takes nothing for independent: neither ``g`` of ``z``, nor one token of another.
It is as noisy as there are few sequences, ``(2 / sequences)^(1/2)``, so that it sets the scale of a curve, and cheaper moments
its shape.

Reference: Kunstner, Balles and Hennig 2019 (the Fisher information from gradients), arXiv 1905.12558.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from tenfold.models.ranks import total_number

Evidence = dict[
    str, list[tuple[Tensor, Tensor]]
]  # {path of a site: [(inputs (n, in), gradients (n, out))]}, a pair a batch


def fisher_loss(pairs: list[tuple[Tensor, Tensor]], error: Tensor, shift: Tensor | None, tokens: int) -> float:
    """Return what the error ``E (out, in)`` of a site, and ``shift (out,)`` of its bias, costs in nats a token.

    Args:
        pairs: ``(inputs (n, in), gradients (n, out))`` of every batch of this process; all processes add up.
        tokens: how many tokens its batches have; an expert gets some of them.
    """
    squares = 0.0
    for inputs, gradients in pairs:
        wrong = inputs.float() @ error.T.float()
        wrong = wrong if shift is None else wrong + shift.float()
        squares += float((wrong * gradients).sum()) ** 2
    return total_number(squares) / max(1.0, total_number(tokens)) / 2


def corrected(losses: np.ndarray, measured: Mapping[int, float]) -> np.ndarray:
    """Return the curve ``losses``, scaled as a whole to be near ``{index: loss}`` in the mean of logarithms."""
    logs = [np.log(loss / losses[k]) for k, loss in measured.items() if loss > 0 and losses[k] > 0]
    return losses * np.exp(np.mean(logs)) if logs else losses
