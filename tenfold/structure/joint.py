"""Diagrams of one shape that are added: their matrices are, before one product, where that is cheaper than a product of each.

One diagram is added of slices, where its factors have a long rank in common.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from tenfold.structure import added, contract, rebuild
from tenfold.structure.added import Term, dense, shared_out, whole
from tenfold.structure.diagram import Diagram
from tenfold.structure.hold import NOTHING, Hold
from tenfold.structure.plan import cost_of_product
from tenfold.structure.traced import is_traced
from tenfold.structure.worth import Cost, Worth, worth_of


def serves(diagrams: tuple[Diagram, ...], x: Tensor) -> bool:
    """Whether it is cheaper for ``x (n, in)``."""
    if is_traced() or torch.is_autocast_enabled(x.device.type):
        return False
    return _pays(diagrams, contract.bucket(x.shape[0]), worth_of(x.device.type))


@lru_cache(maxsize=4096)
def _pays(diagrams: tuple[Diagram, ...], rows: int, worth: Worth) -> bool:
    (out, inner), more = diagrams[0].shape, len(diagrams) - 1

    def added(numbers: int) -> Cost:
        return Cost(more * numbers, 3 * more * numbers, 0, more)

    each = sum((contract.cost_of(diagram, rows, worth) for diagram in diagrams), added(rows * out))
    made = sum((rebuild.rebuild(diagram).cost for diagram in diagrams), added(out * inner))
    return contract.cheaper(made + cost_of_product(rows, out, inner), each, worth)


def multiply(terms: list[Term], x: Tensor, bias: Tensor | None = None, hold: Hold = NOTHING) -> Tensor:
    """``x (n, in) @ W.T + bias -> (n, out)``, ``W`` the sum of the matrices of ``terms``."""
    terms = [part for term in terms for part in added.slices(*term, x, hold.little)]
    if len(terms) == 1:
        return contract.apply(*terms[0], x, bias, hold)
    diagrams, factors = tuple(diagram for diagram, _ in terms), [some for _, some in terms]
    if not serves(diagrams, x):
        return added.multiply(terms, x, bias, hold)
    if not torch.is_grad_enabled():
        return torch.nn.functional.linear(x, dense(diagrams, factors), bias)
    return _Joint.apply(diagrams, hold.matrices, x, bias, *(factor for some in factors for factor in some))


class _Joint(torch.autograd.Function):
    """Keeps ``x`` and the factors."""

    @staticmethod
    def forward(ctx, diagrams, matrix, x, bias, *factors):
        key = (diagrams, *(factor.data_ptr() for factor in factors))
        w = None if matrix is None else matrix.get(key)
        w = dense(diagrams, shared_out(diagrams, factors)) if w is None else w
        if matrix is not None:
            matrix[key] = w
        ctx.diagrams = diagrams
        ctx.save_for_backward(x, None if matrix is None else w, *factors)
        return torch.nn.functional.linear(x, w, bias)

    @staticmethod
    def backward(ctx, dy):
        x, w, *factors = ctx.saved_tensors
        (_, _, of_x, of_bias, *needs), diagrams = ctx.needs_input_grad, ctx.diagrams
        some, wanted = shared_out(diagrams, factors), shared_out(diagrams, needs)
        dx, found = None, [None for _ in factors]
        with torch.autocast(dy.device.type, enabled=False):
            if torch.is_grad_enabled():
                dx, *found = contract.differentiable(partial(whole, diagrams), x, factors, dy, [of_x, *needs])
                return None, None, dx, dy.sum(0) if of_bias else None, *found
            if of_x:
                dx = dy @ (dense(diagrams, some) if w is None else w)
            if any(needs):
                dw = dy.T @ x
                each = zip(diagrams, some, wanted, strict=True)
                found = [one for given in each for one in _back(*given, dw)]
        return None, None, dx, dy.sum(0) if of_bias else None, *found


def _back(diagram: Diagram, factors: list[Tensor], needs: list[bool], dw: Tensor) -> list[Tensor | None]:
    if not any(needs):
        return [None for _ in factors]
    found = rebuild.back(diagram, factors, dw, needs)
    alone = len(factors) == 1  # its gradient is dw itself, which others get, too
    return [one.clone() if alone and one is not None else one for one in found]
