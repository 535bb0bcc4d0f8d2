"""How a diagram is evaluated: contraction plans, their cost, forward and backward.

Few parameters do not mean few FLOPs, so the order of the pairwise contractions is chosen, never fixed. Candidates are
the order with the fewest FLOPs for ``x`` and the factors together, and the one that first rebuilds ``W`` and multiplies
once. Each is priced by FLOPs, numbers moved, numbers copied into another order, and calls, for the number of rows at hand.

Forward keeps ``x`` and the factors only. Backward has a plan of its own: through the same chain, or through the dense
gradient ``dW = dy^T x``, which is then contracted with the other factors. Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold.structure import products
from tenfold.structure.diagram import Diagram
from tenfold.structure.hold import NOTHING, Hold
from tenfold.structure.pair import Target, has_kernels
from tenfold.structure.plan import ROWS, Gathered, Plan, Values, cheapest_plan, cost_of_product, plan_of, run
from tenfold.structure.rebuild import dense, in_parts, rebuild, traced
from tenfold.structure.traced import is_traced
from tenfold.structure.worth import CPU, Cost, Worth, worth_of

PART = 512  # rows that go through a chain at once on a CPU, at most, where it holds more than products of matrices
CACHED = 2**20  # numbers between the steps that a part has, where that leaves it LEAST rows
LEAST = 64
NEARLY = 0.95  # a chain has to gain something: it moves more than is counted
BUCKETS = (1, 32, 512, 2048)  # layers plan for these numbers of rows only; compiled, three of them make three branches


@torch.compiler.assume_constant_result
def _known_plan(inputs, output, sizes) -> Plan:
    """:func:`plan_of` for code that is compiled: a search can't be traced, and what it is given are constants."""
    return plan_of(inputs, output, sizes)


@torch.compiler.assume_constant_result
def _known_forward_plans(diagram: Diagram, rows: int, kind: str) -> tuple[Plan, Plan | None]:
    """Those that are carried out on a kind of device."""
    return forward_plans(diagram, rows, worth_of(kind))


@lru_cache(maxsize=4096)
def forward_plans(diagram: Diagram, rows: int, worth: Worth = CPU, counted: bool = False) -> tuple[Plan, Plan | None]:
    """The cheaper way to multiply ``rows`` vectors: a chain ``(plan, None)``, or ``(rebuild, multiply)``.

    ``counted``: the chain is that of the fewest FLOPs, whatever its price.
    """
    chain = _chain(diagram, rows, None if counted else worth)
    w, sizes = (*diagram.outs, *diagram.ins), (*diagram.sizes, (ROWS, rows))
    make, multiply = rebuild(diagram), plan_of(((ROWS, *diagram.ins), w), (ROWS, *diagram.outs), sizes)
    return (chain, None) if cheaper(chain.cost, make.cost + multiply.cost, worth) else (make, multiply)


def _chain(diagram: Diagram, rows: int, worth: Worth | None) -> Plan:
    """The cheapest order of products of ``x`` and the factors; without ``worth`` that of the fewest FLOPs."""
    operands = ((ROWS, *diagram.ins), *(labels for _, labels in diagram.factors))
    output, sizes = (ROWS, *diagram.outs), (*diagram.sizes, (ROWS, rows))
    return plan_of(operands, output, sizes) if worth is None else cheapest_plan(operands, output, sizes, worth)


def cheaper(one: Cost, other: Cost, worth: Worth) -> bool:
    """Whether ``one`` is cheaper by more than is left out of account."""
    return one.price(worth) - other.price(worth) < (NEARLY - 1) * replace(other, calls=0).price(worth)


def flops(diagram: Diagram, rows: int) -> int:
    """FLOPs of ``x @ W.T`` for ``rows`` vectors, a rebuild of ``W`` included where the plan has one."""
    return sum(plan.cost.flops for plan in forward_plans(diagram, rows, CPU, True) if plan is not None)


def cost_of(diagram: Diagram, rows: int, worth: Worth) -> Cost:
    """Likewise of everything that is counted."""
    return sum((plan.cost for plan in forward_plans(diagram, rows, worth) if plan is not None), Cost())


def rows_of(diagram: Diagram, factors: list[Tensor], index: Int[Tensor, "n"]) -> Float[Tensor, "n inner"]:
    """``W[index] (n, in)`` without ``W``: every factor is looked up along its output labels, then contracted."""
    at, rest = {}, index
    for label in reversed(diagram.outs[1:]):
        number = diagram.size([label])
        at[label], rest = rest % number, rest // number
    last = diagram.size(diagram.outs[:1])
    at |= dict.fromkeys(
        diagram.outs[:1], torch.where(rest < 0, last, rest)
    )  # a row that does not exist raises IndexError
    picked, inputs = [], []
    for factor, (_, labels) in zip(factors, diagram.factors, strict=True):
        looked = [label for label in labels if label in at]
        if looked:
            inner = [label for label in labels if label not in at]
            factor = factor.permute([labels.index(label) for label in (*looked, *inner)])
            factor, labels = factor[tuple(at[label] for label in looked)], (ROWS, *inner)
        picked.append(factor)
        inputs.append(labels)
    sizes = (*diagram.sizes, (ROWS, bucket(index.shape[0])))
    plan = _known_plan(tuple(inputs), (ROWS, *diagram.ins), sizes)
    return run(plan, picked).reshape(index.shape[0], diagram.shape[1])


def lookup_flops(diagram: Diagram, rows: int) -> int:
    """FLOPs of :func:`rows_of` for ``rows`` indices."""
    inputs = []
    for _, labels in diagram.factors:
        inner = tuple(label for label in labels if label not in diagram.outs)
        inputs.append(labels if len(inner) == len(labels) else (ROWS, *inner))
    return plan_of(tuple(inputs), (ROWS, *diagram.ins), (*diagram.sizes, (ROWS, rows))).cost.flops


def apply(
    diagram: Diagram,
    factors: list[Tensor],
    x: Float[Tensor, "n inner"],
    bias: Float[Tensor, "out"] | None = None,
    hold: Hold = NOTHING,
) -> Float[Tensor, "n out"]:
    """``x (n, in) @ W.T + bias -> (n, out)``, by the plan that is cheapest for this many rows."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, factors = x.to(dtype), [factor.to(dtype) for factor in factors]
        bias = None if bias is None else bias.to(dtype)
    diagram, factors = slim(diagram, factors)
    if [labels for _, labels in diagram.factors] == [(*diagram.outs, *diagram.ins)]:  # a dense matrix
        return products.linear(x, factors[0].reshape(diagram.shape), bias)
    if is_traced() or not torch.is_grad_enabled():
        return forward(diagram, factors, x, bias)
    return _Apply.apply(diagram, x, bias, hold, *factors)


def slim(diagram: Diagram, factors: list[Tensor]) -> tuple[Diagram, list[Tensor]]:
    """Both without axes of one number, which would keep products of matrices from being seen."""
    if 1 not in dict(diagram.sizes).values() or torch.compiler.is_compiling():
        return diagram, factors
    diagram = _slim(diagram)
    return diagram, [
        f.reshape(diagram.shape_of(labels)) for f, (_, labels) in zip(factors, diagram.factors, strict=True)
    ]


@lru_cache(maxsize=4096)
def _slim(diagram: Diagram) -> Diagram:
    """``diagram`` without its labels of size one."""
    ones = {label for label, size in diagram.sizes if size == 1}

    def slim(labels):
        return tuple(label for label in labels if label not in ones)

    factors = tuple((name, slim(labels)) for name, labels in diagram.factors)
    sizes = tuple((label, size) for label, size in diagram.sizes if label not in ones)
    return Diagram(slim(diagram.outs), slim(diagram.ins), factors, sizes)


def is_chain(diagram: Diagram, x: Tensor) -> bool:
    """Whether nothing is made for all rows of ``x`` together, so that some can be multiplied after the others at no cost."""
    return _known_forward_plans(diagram, bucket(x.shape[0]), x.device.type)[1] is None


def bucket(rows: int) -> int:
    """The number of rows that a call with ``rows`` rows is planned for; an exported program has one plan, no branch."""
    few, some, many, most = BUCKETS
    if torch.compiler.is_exporting():
        return most
    if rows <= 80:  # up to here the plan for 32 is as good as that for 512, or better
        return few if rows <= 4 else some
    return many if not torch.compiler.is_compiling() and rows <= 1024 else most


def _part(plan: Plan, diagram: Diagram, x: Tensor, little: bool) -> int | None:
    """How many rows go through ``plan`` at a time, so that what is copied between two products stays in the cache; None: all.

    ``little``: so that what lies between, and its gradients, take no more than half of ``W``.
    """
    if x.device.type != "cpu" or is_traced() or torch.is_grad_enabled():
        return None
    if not plan.cost.copied and not little:
        return None
    each = max(1, plan.passing // bucket(x.shape[0]))
    part = min(PART, CACHED // each) if plan.cost.copied else x.shape[0]
    part = max(LEAST, min(part, prod(diagram.shape) // (4 * each)) if little else part)
    if x.shape[0] < 2 * part:
        return None
    even = -(-x.shape[0] // -(-x.shape[0] // part))
    return even | 1  # an odd number: what lies a power of two of numbers apart has the same few places in a cache


def forward(
    diagram: Diagram,
    factors: list[Tensor],
    x: Tensor,
    bias: Tensor | None = None,
    between: list[dict[int, Tensor]] | None = None,
    onto: Tensor | None = None,
    little: bool = False,
) -> Tensor:
    """As :func:`apply`, without gradients.

    Args:
        between: gets what lies between the steps, by number, for each part.
        onto: ``(n, out)``, what the result is added to.
        little: as in :class:`tenfold.structure.hold.Hold`.
    """
    first, second = _known_forward_plans(diagram, bucket(x.shape[0]), x.device.type)
    folded = x.reshape(x.shape[0], *diagram.shape_of(diagram.ins))
    part = _part(first, diagram, x, little) if second is None else None
    if second is None and part is None and (between is not None or onto is not None):
        part = PART if onto is not None else x.shape[0]
    if part is not None:
        y = x.new_empty(x.shape[0], diagram.shape[0]) if onto is None else onto
        whole = Values(first, [folded, *factors])
        for some, made in zip(folded.split(part), y.split(part), strict=True):
            target = Target(made.view(some.shape[0], *diagram.shape_of(diagram.outs)), add=onto is not None)
            values = Values(first, [some, *factors], whole)
            values.result(target)
            if between is not None:
                between.append(values.passing())
            if bias is not None:
                made += bias
        return y
    if second is None and has_kernels(x):
        y, outs = x.new_empty(x.shape[0], diagram.shape[0]), diagram.shape_of(diagram.outs)
        target = Target(y.view(-1, *outs), bias=None if bias is None else bias.view(outs))
        Values(first, [folded, *factors]).result(target)
        return y
    if second is None and first.steps[-1][2] is not None:
        return run(first, [folded, *factors], bias)
    if second is None:
        y = run(first, [folded, *factors])
        if bias is None or y.is_contiguous():
            y = y.reshape(x.shape[0], diagram.shape[0])
            return y if bias is None else y.add_(bias)  # a product, nobody else's
        bias = bias.to(y.dtype).view(diagram.shape_of(diagram.outs))
        return torch.add(bias, y).reshape(x.shape[0], diagram.shape[0])  # in one pass
    if is_traced():
        return traced(diagram, first, factors, x, bias)
    if (parts := in_parts(diagram, factors)) is not None:
        return parts.multiply(x, bias, onto)
    w = run(first, factors).reshape(diagram.shape)
    return torch.nn.functional.linear(x, w, bias) if onto is None else onto.addmm_(x, w.T)


@lru_cache(maxsize=4096)
def _through_dense(diagram: Diagram, rows: int, worth: Worth, little: bool) -> bool:
    """Whether backward is cheaper through ``dW`` than through the chain; ``little``: by a quarter."""
    chain, make = _chain(diagram, rows, worth), rebuild(diagram)
    first, second = forward_plans(diagram.transposed(), rows, worth)
    back = first.cost if second is None else second.cost + make.costs[-1]
    through = cost_of_product(rows, *diagram.shape) + make.cost_back + back
    if little and chain.passing and chain.cost_back.price(worth) < 1.25 * through.price(worth):  # it makes no W
        return False
    return not cheaper(chain.cost_back, through, worth)


class _Apply(torch.autograd.Function):
    """Keeps ``x`` and the factors; what is in between survives the forward pass only where that is asked for."""

    @staticmethod
    def forward(ctx, diagram, x, bias, hold, *factors):
        first, second = _known_forward_plans(diagram, bucket(x.shape[0]), x.device.type)
        ctx.diagram, ctx.little, parts, kept = diagram, hold.little, [], []
        if hold.matrices is not None and second is not None:
            key = (diagram, *(factor.data_ptr() for factor in factors))
            if key not in hold.matrices:
                hold.matrices[key] = dense(diagram, list(factors))
            kept = [hold.matrices[key]]
            y = torch.nn.functional.linear(x, kept[0], bias)
        else:
            few = hold.between and second is None and first.passing <= bucket(x.shape[0]) * x.shape[1]
            y = forward(diagram, list(factors), x, bias, parts if few else None, None, hold.little)
            kept = [value for part in parts for value in part.values()]
        ctx.numbers = [list(part) for part in parts]
        ctx.save_for_backward(x, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        (_, of_x, of_bias, _, *rest), diagram = ctx.needs_input_grad, ctx.diagram
        x, *saved = ctx.saved_tensors
        factors, kept = saved[: len(rest)], saved[len(rest) :]
        needs, db = [of_x, *rest], dy.sum(0) if of_bias else None
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                dx, *others = differentiable(partial(dense, diagram), x, factors, dy, needs)
            elif ctx.numbers:
                parts = [{number: kept.pop(0) for number in numbers} for numbers in ctx.numbers]
                dx, *others = _back_chain(diagram, x, factors, dy, needs, parts)
            else:
                w = kept[0] if kept else None
                dx, *others = gradients(diagram, x, factors, dy, needs, w, None, ctx.little)
        return None, None if dx is None else dx.reshape(x.shape), db, None, *others


def differentiable(
    make: Callable[[list[Tensor]], Tensor], x: Tensor, factors: list[Tensor], dy: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients where they are to be differentiated again (``create_graph``): by torch, through ``W`` made of the factors."""
    factors = [
        factor.view_as(factor) for factor in factors
    ]  # each by itself: they may be one tensor, or made of each other
    w = make(factors)
    dx = dy @ w if needs[0] else None
    wanted = [factor for factor, need in zip(factors, needs[1:], strict=True) if need]
    found = iter(torch.autograd.grad(w, wanted, dy.T @ x, create_graph=True) if wanted else ())
    return [dx, *(next(found) if need else None for need in needs[1:])]


def gradients(
    diagram: Diagram,
    x: Tensor,
    factors: list[Tensor],
    dy: Tensor,
    needs: list[bool],
    w: Tensor | None = None,
    onto: Tensor | None = None,
    little: bool = False,
) -> list[Tensor | None]:
    """Of ``x (n, in)`` and the factors, where ``needs`` says so; ``w`` is W where it was kept.

    That of ``x`` is added to ``onto``, if it is given; ``little`` as in :class:`tenfold.structure.hold.Hold`.
    """
    rows = 2 ** max(0, x.shape[0] - 1).bit_length()
    if w is not None or _through_dense(diagram, rows, worth_of(x.device.type), little):
        return _back_dense(diagram, x, factors, dy, needs, w, onto, little)
    return _back_chain(diagram, x, factors, dy, needs, [], onto, little)


def _back_chain(
    diagram: Diagram,
    x: Tensor,
    factors: list[Tensor],
    dy: Tensor,
    needs: list[bool],
    parts: list[dict[int, Tensor]],
    onto: Tensor | None = None,
    little: bool = False,
) -> list[Tensor | None]:
    """Back through the steps of the chain; what they made is made again, unless it was kept in ``parts``."""
    plan = _chain(diagram, bucket(x.shape[0]), worth_of(x.device.type))
    x, dy = x.reshape(-1, *diagram.shape_of(diagram.ins)), dy.reshape(-1, *diagram.shape_of(diagram.outs))
    part = _part(plan, diagram, x, little) or (None if onto is None else PART)
    if part is None:
        values = Values(plan, [x, *factors])
        values.values.update(*parts)
        return values.back(dy, needs)
    whole = Values(plan, [x, *factors])
    gathered, made = Gathered(whole, needs, onto is not None), None if onto is None else onto.view(x.shape)
    made = torch.empty_like(x) if made is None and needs[0] else made
    places = (x if made is None else made).split(part)
    for number, (some, of, place) in enumerate(zip(x.split(part), dy.split(part), places, strict=True)):
        values = Values(plan, [some, *factors], whole)
        values.values.update(*parts[number : number + 1])
        gathered.add(values, of, place)
    return [made, *gathered.rest()]


def _back_dense(
    diagram: Diagram,
    x: Tensor,
    factors: list[Tensor],
    dy: Tensor,
    needs: list[bool],
    w: Tensor | None = None,
    onto: Tensor | None = None,
    little: bool = False,
) -> list[Tensor | None]:
    """Through ``dW``; where ``dx`` needs a ``W`` that is not known, it is made of what the gradients need anyway."""
    made, dx, others = False, None, [None for _ in factors]  # made: dx comes from a W that is made for it
    if needs[0] and w is not None:
        dx = _added(onto, dy, w)
    elif needs[0]:
        made = _known_forward_plans(diagram.transposed(), bucket(dy.shape[0]), dy.device.type)[1] is not None
        dx = None if made else forward(diagram.transposed(), factors, dy, onto=onto, little=little)
    if (parts := in_parts(diagram, factors, little)) is not None:
        found, *others = parts.back(x, dy, made, needs[1:], onto)
        return [found if made else dx, *others]
    values = Values(rebuild(diagram), factors)
    if made:
        dx = _added(onto, dy, values.result().reshape(diagram.shape))
        values.drop()  # W: its gradient takes as much
    if any(needs[1:]):
        others = values.back((dy.T @ x).reshape(diagram.shape_of((*diagram.outs, *diagram.ins))), needs[1:])
    return [dx, *others]


def _added(onto: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """Their product, on top of ``onto``, if there is one."""
    return one @ other if onto is None else onto.addmm_(one, other)
