"""Products that are added: terms of a sum, and slices of a rank that all factors share.

On a CPU each goes on top of what is there, and so do the gradients of the input: a second result of thousands of rows would cost
memory, and the time to add it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from tenfold.structure import contract, rebuild
from tenfold.structure.diagram import Diagram
from tenfold.structure.hold import Hold
from tenfold.structure.traced import is_traced
from tenfold.structure.worth import Worth, worth_of

SLICE = 512  # numbers of a rank that all factors share which are summed over at once, on a CPU
MANY = 256  # rows: of fewer a second result costs nothing
Term = tuple[Diagram, list[Tensor]]


def multiply(terms: list[Term], x: Tensor, bias: Tensor | None, hold: Hold) -> Tensor:
    """``x (n, in) @ W.T + bias -> (n, out)``, ``W`` the sum of the matrices of ``terms``, each by its own plan."""
    plain = x.device.type != "cpu" or is_traced() or torch.is_autocast_enabled("cpu")
    if plain or x.shape[0] < MANY or hold.between or hold.matrices is not None:
        first, *rest = terms
        y = contract.apply(*first, x, bias, hold)
        for term in rest:
            y = plus(y, contract.apply(*term, x, None, hold), x)
        return y
    diagrams = tuple(diagram for diagram, _ in terms)
    return _Added.apply(diagrams, hold.little, x, bias, *(factor for _, some in terms for factor in some))


def plus(y: Tensor, part: Tensor, x: Tensor) -> Tensor:
    """``y + part``, in the place of ``y`` if nobody else has it."""
    ours = not is_traced() and y is not x and y.dtype == part.dtype and not y._is_view()
    return y.add_(part) if ours else y + part


def slices(diagram: Diagram, factors: list[Tensor], x: Tensor, little: bool) -> list[Term]:
    """What adds up to the diagram, for ``x``: itself, or slices of all factors."""
    here = x.device.type == "cpu" and not is_traced()
    label = _sliced(diagram, contract.bucket(x.shape[0]), worth_of("cpu"), little) if here else None
    if label is None:
        return [(diagram, factors)]
    axes, made, size = [labels.index(label) for _, labels in diagram.factors], [], SLICE // (4 if little else 1)
    for some in zip(*(f.split(size, axis) for f, axis in zip(factors, axes, strict=True)), strict=True):
        sizes = tuple((name, some[0].shape[axes[0]] if name == label else number) for name, number in diagram.sizes)
        made.append((replace(diagram, sizes=sizes), list(some)))
    return made


@lru_cache(maxsize=4096)
def _sliced(diagram: Diagram, rows: int, worth: Worth, little: bool) -> str | None:
    """A label of all factors, as the rank of CP is, if their products alone would not stay in the cache.

    ``W`` is made faster as a whole.
    """
    common = set.intersection(*(set(labels) for _, labels in diagram.factors)) - {*diagram.outs, *diagram.ins}
    long = [label for label in common if diagram.size([label]) >= 2 * SLICE]
    plan, second = contract.forward_plans(diagram, rows, worth)
    if not long or (second is not None and not little):
        return None
    first = len(plan.moving) - len(plan.steps)
    made = [number for k, number in enumerate(plan.numbers[:-1]) if second is not None or not plan.moving[first + k]]
    return long[0] if max(made, default=0) > contract.CACHED else None


def shared_out(diagrams: tuple[Diagram, ...], values) -> list[list]:
    """``values`` of all factors, those of each diagram by themselves."""
    rest = iter(values)
    return [[next(rest) for _ in diagram.factors] for diagram in diagrams]


def dense(diagrams: tuple[Diagram, ...], factors: list[list[Tensor]]) -> Tensor:
    """``W (out, in)``"""
    first, *rest = zip(diagrams, factors, strict=True)
    w = rebuild.dense(*first)
    w = w.clone() if len(first[1]) == 1 and rest else w  # a matrix is its own factor
    for diagram, some in rest:
        w = w + rebuild.dense(diagram, some) if torch.is_grad_enabled() else rebuild.dense(diagram, some, w)
    return w


def whole(diagrams: tuple[Diagram, ...], factors: list[Tensor]) -> Tensor:
    """Likewise of all factors one after another."""
    return dense(diagrams, shared_out(diagrams, factors))


class _Added(torch.autograd.Function):
    """Keeps ``x`` and the factors."""

    @staticmethod
    def forward(ctx, diagrams, little, x, bias, *factors):
        first, *rest = zip(diagrams, shared_out(diagrams, factors), strict=True)
        y = contract.forward(*first, x, bias, little=little).contiguous()
        for diagram, some in rest:
            contract.forward(diagram, some, x, onto=y, little=little)
        ctx.diagrams, ctx.little = diagrams, little
        ctx.save_for_backward(x, *factors)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *factors = ctx.saved_tensors
        (_, _, of_x, of_bias, *needs), diagrams = ctx.needs_input_grad, ctx.diagrams
        some, wanted = shared_out(diagrams, factors), shared_out(diagrams, needs)
        db, dx, found = dy.sum(0) if of_bias else None, None, []
        with torch.autocast(dy.device.type, enabled=False):
            if torch.is_grad_enabled():
                dx, *found = contract.differentiable(partial(whole, diagrams), x, factors, dy, [of_x, *needs])
                return None, None, dx, db, *found
            for diagram, given, these in zip(diagrams, some, wanted, strict=True):
                dx, *others = contract.gradients(diagram, x, given, dy, [of_x, *these], None, dx, ctx.little)
                dx = None if dx is None else dx.reshape(x.shape).contiguous()  # the next one adds to it
                found += others
        return None, None, dx, db, *found
