"""What an error of a site costs, by gradients token by token: the Fisher information along one direction.

A site whose matrix is wrong by ``E`` makes ``E z_t`` too much of its input ``z_t``. With ``g_t`` the gradient at its output, of
the loss of tokens that the model itself draws, the error costs about

    ``1/2 mean over tokens of (g_t^T E z_t)^2``

nats a token. Unlike ``1/2 tr(G E C E^T)`` this does not take ``g`` for independent of ``z``: few tokens with large inputs often
carry the second moment and matter little, or much. It sets the scale of a curve, and moments its shape.

Errors of several tokens come together where later tokens attend to them: ``1/2 mean over texts of (sum over tokens of
g_t^T E z_t)^2``, a token, is what they cost in all. One text is one draw of it, too noisy for a single curve; the mean of
its ratio to the above over all items (:func:`fisher_losses`) raises all curves alike.

Reference: Kunstner, Balles and Hennig 2019 (the Fisher information from gradients), arXiv 1905.12558.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.models.distributed import all_reduce, all_reduce_number, num_processes, process_state

# {path of a site: [(inputs (n, in), gradients (n, out))]}, a pair a batch
Evidence = dict[str, list[tuple[Tensor, Tensor]]]


def fisher_loss(pairs: list[tuple[Tensor, Tensor]], error: Tensor, shift: Tensor | None, tokens: int) -> float:
    """Return what the error ``E (out, in)`` of a site, and ``shift (out,)`` of its bias, costs in nats a token.

    Args:
        pairs: ``(inputs (n, in), gradients (n, out))`` of every batch of this process; all processes add up.
        tokens: how many tokens its batches have; an expert gets some of them.
    """
    return fisher_losses(pairs, error, shift, tokens)[0]


def fisher_losses(
    pairs: list[tuple[Tensor, Tensor]], error: Tensor, shift: Tensor | None, tokens: int
) -> tuple[float, float]:
    """Return what an error costs as :func:`fisher_loss` does, and what it costs when tokens are taken together.

    The latter sums over the tokens of a batch; of texts that have nothing to do with each other, products are zero in the mean.
    """
    alone, together, held = 0.0, 0.0, error
    for inputs, gradients in pairs:
        held = held.to(inputs)
        wrong = inputs @ held.T
        wrong = wrong if shift is None else wrong + shift.to(wrong)
        along = (wrong.float() * gradients.float()).sum(1).double()
        alone, together = alone + float(along.square().sum()), together + float(along.sum().square())
    tokens = max(1.0, all_reduce_number(tokens))
    return all_reduce_number(alone) / tokens / 2, all_reduce_number(together) / tokens / 2


@dataclass
class Fold:
    """One half of the batches that an error is fitted to, and the other half that judges it.

    Args:
        second: ``(in, in)``, of the inputs of the first half.
        mean: ``(in,)`` of these.
        known: pairs of the first half.
        judged: pairs of the other half.
        tokens: how many tokens these have.
    """

    second: Tensor
    mean: Tensor
    known: list[tuple[Tensor, Tensor]]
    judged: list[tuple[Tensor, Tensor]]
    tokens: int


def folds_of(pairs: list[tuple[Tensor, Tensor]], width: int, tokens: int) -> list[Fold]:
    """Return both ways to let one half of the batches judge what is fitted to the other; none where there is one batch.

    Args:
        pairs: those of this process; batches alternate between the halves, whichever process has them.
        width: values in an input.
        tokens: how many tokens the batches of this process have.
    """
    if all_reduce_number(len(pairs)) < 2:
        return []
    numbers = [process_state().process_index + num_processes() * k for k in range(len(pairs))]
    halves = [[pair for k, pair in zip(numbers, pairs, strict=True) if k % 2 == half] for half in (0, 1)]
    found = []
    for known, judged in (halves, halves[::-1]):
        floats = [inputs.float() for inputs, _ in known]
        seen = max(1.0, all_reduce_number(sum(len(inputs) for inputs in floats)))
        second = all_reduce(sum((x.T @ x for x in floats), torch.zeros(width, width))) / seen
        mean = all_reduce(sum((x.sum(0) for x in floats), torch.zeros(width))) / seen
        found.append(Fold(second.double(), mean.double(), known, judged, tokens * len(judged) // max(1, len(pairs))))
    return found


def unit_products(pairs: list[tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """Return the sum over tokens of ``a a^T (units, units)``, ``a_u = (g^T w_u) z_u``: what the loss of units does together.

    Args:
        pairs: ``(inputs (n, units), gradients (n, out))`` of this process; all processes add up.
        weight: ``(out, units)`` that reads the units.
    """
    found = torch.zeros(weight.shape[1], weight.shape[1])
    for inputs, gradients in pairs:
        losing = inputs.float() * (gradients.float() @ weight.float())
        found += losing.T @ losing
    return all_reduce(found)


def expected_loss(inside: float, outside: float) -> float:
    """Return what a fit costs on text that it has not seen, once it has seen much of it.

    Least squares of ``p`` values over ``n`` tokens costs about ``a (1 - p/n)`` on these, and ``a (1 + p/n)`` on others. With
    ``inside`` of all tokens, and ``outside`` of a half judged by the other one, ``a = (2 inside + outside) / 3``.
    """
    return (2 * inside + outside) / 3


def corrected(losses: np.ndarray, measured: Mapping[int, float]) -> np.ndarray:
    """Return the curve ``losses``, scaled as a whole to be near ``{index: loss}`` in the mean of logarithms."""
    logs = [np.log(loss / losses[k]) for k, loss in measured.items() if loss > 0 and losses[k] > 0]
    return losses * np.exp(np.mean(logs)) if logs else losses
