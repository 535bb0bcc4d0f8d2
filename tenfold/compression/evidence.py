"""Loss of an error of a site, from gradients token by token: the Fisher information along one direction.

A site whose matrix is wrong by ``E`` adds ``E z_t`` to its output for the input ``z_t``. With ``g_t`` the gradient at its
output, of the loss of tokens that the model itself draws, the error costs about

    ``1/2 mean over tokens of (g_t^T E z_t)^2``

nats a token. Unlike ``1/2 tr(G E C E^T)`` this does not assume that ``g`` and ``z`` are independent: few tokens with large
inputs often carry the second moment and matter little, or much. It sets the scale of a curve, and moments its shape.

Errors of several tokens add up where later tokens attend to them: ``1/2 mean over texts of (sum over tokens of g_t^T E z_t)^2``
per token is what they cost in all. One text is one draw of it, too noisy for a single curve; the mean of its ratio to the above
over all items (``fisher_losses``) raises all curves alike.

Reference: Kunstner, Balles and Hennig 2019 (the Fisher information from gradients), arXiv 1905.12558.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tenfold.models.distributed import all_reduce, all_reduce_number, num_processes, process_state

Pairs = list[tuple[Tensor, Tensor]]  # (inputs (n, in), gradients (n, out)), a pair per batch of this process
Evidence = dict[str, Pairs]  # by the path of the site


def fisher_losses(pairs: Pairs, error: Tensor, shift: Tensor | None, tokens: int) -> tuple[float, float]:
    """Return the loss of an error of a site in nats a token: of every token alone, and of the tokens of a batch together.

    The latter holds for batches of several texts, too, as products across unrelated texts are zero in the mean.

    Args:
        pairs: of this process; all processes add up.
        error: ``E (out, in)``.
        shift: ``(out,)``, the error of the bias.
        tokens: number of tokens in the batches of this process; an expert sees some of them.
    """
    alone = together = 0.0
    for inputs, gradients in pairs:
        error = error.to(inputs)
        wrong = inputs @ error.T
        wrong = wrong if shift is None else wrong + shift.to(wrong)
        along = (wrong.float() * gradients.float()).sum(1).double()
        alone, together = alone + float(along.square().sum()), together + float(along.sum().square())
    count = max(1.0, all_reduce_number(tokens))
    return all_reduce_number(alone) / count / 2, all_reduce_number(together) / count / 2


class Split(NamedTuple):
    """Half of the batches that an error is fitted to, and the half that judges it."""

    second: Tensor  # (in, in), second moment of the inputs of the fitted half
    mean: Tensor  # (in,), their mean
    fitted: Pairs
    judging: Pairs
    tokens: int  # in the judging half


def split_halves(pairs: Pairs, width: int, tokens: int) -> list[Split]:
    """Return both splits of the batches into halves; none if there is a single batch.

    Args:
        pairs: of this process; batches alternate between the halves, whichever process has them.
        width: number of inputs.
        tokens: number of tokens in the batches of this process.
    """
    if all_reduce_number(len(pairs)) < 2:
        return []
    numbers = [process_state().process_index + num_processes() * k for k in range(len(pairs))]
    halves = [[pair for k, pair in zip(numbers, pairs, strict=True) if k % 2 == half] for half in (0, 1)]
    splits = []
    for fitted, judging in (halves, halves[::-1]):
        floats = [inputs.float() for inputs, _ in fitted]
        seen = max(1.0, all_reduce_number(sum(len(inputs) for inputs in floats)))
        second = all_reduce(sum((x.T @ x for x in floats), torch.zeros(width, width))) / seen
        mean = all_reduce(sum((x.sum(0) for x in floats), torch.zeros(width))) / seen
        judged = tokens * len(judging) // max(1, len(pairs))
        splits.append(Split(second.double(), mean.double(), fitted, judging, judged))
    return splits


def unit_products(pairs: Pairs, weight: Tensor) -> Tensor:
    """Return the sum over tokens of ``a a^T (units, units)``, ``a_u = (g^T w_u) z_u``: the joint loss of removing units.

    Args:
        pairs: ``(inputs (n, units), gradients (n, out))`` of this process; all processes add up.
        weight: ``(out, units)`` that reads the units.
    """
    products = torch.zeros(weight.shape[1], weight.shape[1])
    for inputs, gradients in pairs:
        removed = inputs.float() * (gradients.float() @ weight.float())
        products += removed.T @ removed
    return all_reduce(products)


def expected_loss(inside: float, outside: float) -> float:
    """Return the loss of a fit on unseen text once it has been fitted to much text.

    Least squares of ``p`` values over ``n`` tokens costs about ``a (1 - p/n)`` on these, and ``a (1 + p/n)`` on others. With
    ``inside`` of all tokens, and ``outside`` of a half judged by the other one, ``a = (2 inside + outside) / 3``.
    """
    return (2 * inside + outside) / 3


def scale_losses(losses: np.ndarray, measured: Mapping[int, float]) -> np.ndarray:
    """Return the curve ``losses``, scaled as a whole to match ``{index: loss}`` in the mean of logarithms."""
    logs = [np.log(loss / losses[k]) for k, loss in measured.items() if loss > 0 and losses[k] > 0]
    return losses * np.exp(np.mean(logs)) if logs else losses
