"""Multiply by the matrix of an einsum: ``x @ W.T``, rows of ``W``, and ``W`` itself.

Few parameters do not mean few FLOPs, so two plans are priced for the number of rows at hand: the best order of ``x`` and the
factors (the chain), and making ``W`` first. Backward has a choice of its own: through the chain, or through ``dW = dy^T x``.
Autograd saves ``x`` and the factors only; what lies in between is made again.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from tenfold.structure import contraction
from tenfold.structure.contraction import ROWS, Plan, plan_of, run
from tenfold.structure.cost_model import CPU, HardwareCosts, hardware_costs, matmul_counts
from tenfold.structure.einsum_spec import EinsumSpec

BUCKETS = (1, 32, 512, 2048)  # numbers of rows that plans are made for; three of them make three branches when compiled
PART, LEAST, CACHED = (
    512,
    64,
    2**20,
)  # rows of a chain at once on a CPU, at most and at least, and elements between its steps
NEARLY = 0.95  # a chain must be this much cheaper than making W: it moves more than is counted


def is_traced() -> bool:
    """Return whether torch.compile, a ``torch.func`` transform or forward-mode differentiation follows the call.

    Such code needs plain differentiable operations and no autograd function.
    """
    if torch.compiler.is_compiling():
        return True
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def bucket(rows: int) -> int:
    """Return the number of rows that a call with ``rows`` rows is planned for; an exported program has one."""
    few, some, many, most = BUCKETS
    if torch.compiler.is_exporting():
        return most
    if rows <= 80:  # up to here the plan for 32 is as good as that for 512, or better
        return few if rows <= 4 else some
    return many if not torch.compiler.is_compiling() and rows <= 1024 else most


@lru_cache(maxsize=4096)
def chain(spec: EinsumSpec, rows: int, costs: HardwareCosts | None) -> Plan:
    """Plan the products of ``x (rows, in)`` and the factors; without ``costs`` by FLOPs alone."""
    inputs = ((ROWS, *spec.ins), *(labels for _, labels in spec.factors))
    return plan_of(inputs, (ROWS, *spec.outs), (*spec.sizes, (ROWS, rows)), costs)


@lru_cache(maxsize=4096)
def rebuild(spec: EinsumSpec) -> Plan:
    """Plan ``W`` from the factors."""
    return plan_of(tuple(labels for _, labels in spec.factors), (*spec.outs, *spec.ins), spec.sizes)


@lru_cache(maxsize=4096)
def counts_of(spec: EinsumSpec, rows: int, costs: HardwareCosts, by_flops: bool = False):
    """Return the operation counts of the cheaper plan, and whether that is the chain.

    Args:
        by_flops: whether the chain is that of the fewest FLOPs, whatever its price: what is published as FLOPs.
    """
    through = chain(spec, rows, None if by_flops else costs).counts
    made = rebuild(spec).counts + matmul_counts(rows, *spec.shape)
    free = made.price(costs) - costs.call * made.calls
    is_chain = through.price(costs) - made.price(costs) < (NEARLY - 1) * free
    return (through if is_chain else made), is_chain


@torch.compiler.assume_constant_result
def _chosen(spec: EinsumSpec, rows: int, device_type: str) -> Plan | None:
    """Return the chain that a device should run; None where it should make ``W``."""
    costs = hardware_costs(device_type)
    return chain(spec, rows, costs) if counts_of(spec, rows, costs)[1] else None


@torch.compiler.assume_constant_result
def _rebuild(spec: EinsumSpec) -> Plan:
    return rebuild(spec)


@lru_cache(maxsize=4096)
def _back_through_chain(spec: EinsumSpec, rows: int, costs: HardwareCosts) -> bool:
    made = rebuild(spec)
    dense = made.counts_back + matmul_counts(rows, *spec.shape) + matmul_counts(rows, *spec.shape)
    return chain(spec, rows, costs).counts_back.price(costs) < NEARLY * dense.price(costs)


def flops(spec: EinsumSpec, rows: int) -> int:
    """Return the FLOPs of ``x @ W.T`` for ``rows`` vectors, those of making ``W`` included where it is made."""
    return counts_of(spec, rows, CPU, True)[0].flops


def dense(spec: EinsumSpec, factors: list[Tensor]) -> Float[Tensor, "out inner"]:
    """Return ``W (out, in)``."""
    return run(_rebuild(spec), factors).reshape(spec.shape)


def apply(
    spec: EinsumSpec, factors: list[Tensor], x: Float[Tensor, "n inner"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "n out"]:
    """Return ``x @ W.T + bias`` by the cheaper plan for this number of rows."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, factors = x.to(dtype), [factor.to(dtype) for factor in factors]
        bias = None if bias is None else bias.to(dtype)
    if [labels for _, labels in spec.factors] == [(*spec.outs, *spec.ins)]:
        return torch.nn.functional.linear(x, factors[0].reshape(spec.shape), bias)
    if is_traced() or not torch.is_grad_enabled():
        return _forward(spec, factors, x, bias)
    return _Apply.apply(spec, x, bias, *factors)


def _forward(spec: EinsumSpec, factors: list[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    plan = _chosen(spec, bucket(x.shape[0]), x.device.type)
    if plan is None:
        return torch.nn.functional.linear(x, dense(spec, factors), bias)
    rows = _part(plan, x)
    made = [
        run(plan, [part.reshape(-1, *spec.shape_of(spec.ins)), *factors]).reshape(-1, spec.shape[0])
        for part in ([x] if rows is None else x.split(rows))
    ]
    y = made[0] if len(made) == 1 else torch.cat(made)
    return y if bias is None else y + bias.to(y.dtype)


def _part(plan: Plan, x: Tensor) -> int | None:
    """Return how many rows to run at once: on a CPU what lies between two products should stay in its cache; None: all."""
    if x.device.type != "cpu" or is_traced():
        return None
    each = max(1, plan.passing // bucket(x.shape[0]))
    part = max(LEAST, min(PART, CACHED // each))
    return None if x.shape[0] < 2 * part else part


class _Apply(torch.autograd.Function):
    """Save ``x`` and the factors only."""

    @staticmethod
    def forward(ctx, spec, x, bias, *factors):
        ctx.spec = spec
        ctx.save_for_backward(x, *factors)
        return _forward(spec, list(factors), x, bias)

    @staticmethod
    def backward(ctx, dy):
        (x, *factors), spec = ctx.saved_tensors, ctx.spec
        (_, of_x, of_bias, *rest) = ctx.needs_input_grad
        db = dy.sum(0) if of_bias else None
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                dx, *others = _differentiable(spec, x, factors, dy, [of_x, *rest])
            else:
                dx, *others = _gradients(spec, x, factors, dy, [of_x, *rest])
        return None, dx, db, *others


def _differentiable(
    spec: EinsumSpec, x: Tensor, factors: list[Tensor], dy: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again (``create_graph``), through ``W``."""
    factors = [factor.view_as(factor) for factor in factors]  # they may be one tensor, or made of each other
    w = dense(spec, factors)
    wanted = [factor for factor, need in zip(factors, needs[1:], strict=True) if need]
    found = iter(torch.autograd.grad(w, wanted, dy.T @ x, create_graph=True) if wanted else ())
    return [dy @ w if needs[0] else None, *(next(found) if need else None for need in needs[1:])]


def _gradients(
    spec: EinsumSpec, x: Tensor, factors: list[Tensor], dy: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    costs = hardware_costs(x.device.type)
    if not _back_through_chain(spec, bucket(x.shape[0]), costs):
        dx, found = dy @ dense(spec, factors) if needs[0] else None, [None for _ in factors]
        if any(needs[1:]):
            dw = (dy.T @ x).reshape(spec.shape_of((*spec.outs, *spec.ins)))
            found = contraction.gradients(rebuild(spec), factors, dw, needs[1:])
        return [dx, *found]
    plan, dx = chain(spec, bucket(x.shape[0]), costs), torch.empty_like(x) if needs[0] else None
    total: list[Tensor | None] = [None for _ in factors]
    step = _part(plan, x) or max(1, x.shape[0])
    for begin in range(0, max(1, x.shape[0]), step):
        some, of = x[begin : begin + step], dy[begin : begin + step]
        operands = [some.reshape(-1, *spec.shape_of(spec.ins)), *factors]
        own, *each = contraction.gradients(plan, operands, of.reshape(-1, *spec.shape_of(spec.outs)), needs)
        if dx is not None and own is not None:
            dx[begin : begin + step] = own.reshape(some.shape)
        total = [one if sum_ is None or one is None else sum_ + one for sum_, one in zip(total, each, strict=True)]
    return [dx, *total]


def rows_of(spec: EinsumSpec, factors: list[Tensor], index: Int[Tensor, "n"]) -> Float[Tensor, "n inner"]:
    """Return ``W[index] (n, in)`` without ``W``: every factor is looked up along its output labels, then contracted."""
    at, rest = {}, index
    for label in reversed(spec.outs[1:]):
        number = spec.size([label])
        at[label], rest = rest % number, rest // number
    last = spec.size(spec.outs[:1])
    at |= dict.fromkeys(spec.outs[:1], torch.where(rest < 0, last, rest))  # a row that does not exist raises IndexError
    picked, inputs = [], []
    for factor, (_, labels) in zip(factors, spec.factors, strict=True):
        looked = [label for label in labels if label in at]
        if looked:
            inner = [label for label in labels if label not in at]
            factor = factor.permute([labels.index(label) for label in (*looked, *inner)])
            factor, labels = factor[tuple(at[label] for label in looked)], (ROWS, *inner)
        picked.append(factor)
        inputs.append(labels)
    plan = _known_plan(tuple(inputs), (ROWS, *spec.ins), (*spec.sizes, (ROWS, bucket(index.shape[0]))))
    return run(plan, picked).reshape(index.shape[0], spec.shape[1])


@torch.compiler.assume_constant_result
def _known_plan(inputs, output, sizes) -> Plan:
    return plan_of(inputs, output, sizes)


def lookup_flops(spec: EinsumSpec, rows: int) -> int:
    """Return the FLOPs of :func:`rows_of` for ``rows`` indices."""
    inputs = []
    for _, labels in spec.factors:
        inner = tuple(label for label in labels if label not in spec.outs)
        inputs.append(labels if len(inner) == len(labels) else (ROWS, *inner))
    return plan_of(tuple(inputs), (ROWS, *spec.ins), (*spec.sizes, (ROWS, rows))).counts.flops
