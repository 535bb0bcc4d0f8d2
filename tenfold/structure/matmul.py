"""Multiply by the matrix of an einsum: ``x @ W.T``, rows of ``W``, and ``W`` itself.

Few parameters do not mean few FLOPs, so two plans are priced for the number of rows: the best order of ``x`` and the factors (the
chain), and making ``W`` first. Backward chooses independently: through the chain, or through ``dW = dy^T x``. Autograd saves only
``x`` and the factors; intermediate results are recomputed.
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

BUCKETS = (1, 32, 512, 2048)  # numbers of rows that plans are made for; compiled code branches between three of them
MAX_ROWS, MIN_ROWS = 512, 64  # of a chain that run at once on a CPU
CACHE_NUMEL = 2**20  # intermediate elements that should stay in the cache of a CPU
CHAIN_MARGIN = 0.95  # highest price of a chain relative to making W, because it moves more than is counted


def is_traced() -> bool:
    """Return whether torch.compile, a ``torch.func`` transform or forward-mode differentiation follows the call.

    Such code needs plain differentiable operations and no autograd function.
    """
    if torch.compiler.is_compiling():
        return True
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def bucket(rows: int) -> int:
    """Return the number of rows that a call with ``rows`` rows is planned for; exported programs have only one."""
    few, some, many, most = BUCKETS
    if torch.compiler.is_exporting():
        return most
    if rows <= 80:  # up to here the plan for 32 is at least as good as that for 512
        return few if rows <= 4 else some
    return many if not torch.compiler.is_compiling() and rows <= 1024 else most


@lru_cache(maxsize=4096)
def plan_chain(spec: EinsumSpec, rows: int, costs: HardwareCosts | None) -> Plan:
    """Plan the products of ``x (rows, in)`` and the factors; without ``costs`` by FLOPs alone."""
    inputs = ((ROWS, *spec.ins), *(labels for _, labels in spec.factors))
    return plan_of(inputs, (ROWS, *spec.outs), (*spec.sizes, (ROWS, rows)), costs)


@lru_cache(maxsize=4096)
def plan_dense(spec: EinsumSpec) -> Plan:
    """Plan ``W`` from the factors."""
    return plan_of(tuple(labels for _, labels in spec.factors), (*spec.outs, *spec.ins), spec.sizes)


@lru_cache(maxsize=4096)
def counts_of(spec: EinsumSpec, rows: int, costs: HardwareCosts, by_flops: bool = False):
    """Return the operation counts of the cheaper plan, and whether that is the chain.

    Args:
        by_flops: whether the chain is that of the fewest FLOPs, whatever its price, as for published FLOPs.
    """
    through = plan_chain(spec, rows, None if by_flops else costs).counts
    made = plan_dense(spec).counts + matmul_counts(rows, *spec.shape)
    free = made.price(costs) - costs.call * made.calls
    is_chain = through.price(costs) - made.price(costs) < (CHAIN_MARGIN - 1) * free
    return (through if is_chain else made), is_chain


@torch.compiler.assume_constant_result
def _choose_plan(spec: EinsumSpec, rows: int, device_type: str) -> Plan | None:
    """Return the chain that a device should run; None if it should make ``W``."""
    costs = hardware_costs(device_type)
    return plan_chain(spec, rows, costs) if counts_of(spec, rows, costs)[1] else None


@torch.compiler.assume_constant_result
def _plan_dense(spec: EinsumSpec) -> Plan:
    return plan_dense(spec)


@lru_cache(maxsize=4096)
def _back_through_chain(spec: EinsumSpec, rows: int, costs: HardwareCosts) -> bool:
    made = plan_dense(spec)
    dense = made.backward_counts + matmul_counts(rows, *spec.shape) + matmul_counts(rows, *spec.shape)
    return plan_chain(spec, rows, costs).backward_counts.price(costs) < CHAIN_MARGIN * dense.price(costs)


def flops(spec: EinsumSpec, rows: int) -> int:
    """Return the FLOPs of ``x @ W.T`` for ``rows`` vectors, including those of making ``W`` if it is made."""
    return counts_of(spec, rows, CPU, True)[0].flops


def dense(spec: EinsumSpec, factors: list[Tensor]) -> Float[Tensor, "out inner"]:
    """Return ``W (out, in)``."""
    return run(_plan_dense(spec), factors).reshape(spec.shape)


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
    plan = _choose_plan(spec, bucket(x.shape[0]), x.device.type)
    if plan is None:
        return torch.nn.functional.linear(x, dense(spec, factors), bias)
    rows = _rows_at_once(plan, x)
    made = [
        run(plan, [part.reshape(-1, *spec.shape_of(spec.ins)), *factors]).reshape(-1, spec.shape[0])
        for part in ([x] if rows is None else x.split(rows))
    ]
    y = made[0] if len(made) == 1 else torch.cat(made)
    return y if bias is None else y + bias.to(y.dtype)


def _rows_at_once(plan: Plan, x: Tensor) -> int | None:
    """Return how many rows to run at once, so that intermediate results stay in the cache of a CPU; None for all."""
    if x.device.type != "cpu" or is_traced():
        return None
    each = max(1, plan.moving_numel // bucket(x.shape[0]))
    part = max(MIN_ROWS, min(MAX_ROWS, CACHE_NUMEL // each))
    return None if x.shape[0] < 2 * part else part


class _Apply(torch.autograd.Function):
    """Autograd function that saves only ``x`` and the factors."""

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
                dx, *others = _double_backward(spec, x, factors, dy, [of_x, *rest])
            else:
                dx, *others = _gradients(spec, x, factors, dy, [of_x, *rest])
        return None, dx, db, *others


def _double_backward(
    spec: EinsumSpec, x: Tensor, factors: list[Tensor], dy: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again (``create_graph``), through ``W``."""
    factors = [factor.view_as(factor) for factor in factors]  # they may be the same tensor, or depend on each other
    w = dense(spec, factors)
    inputs = [factor for factor, need in zip(factors, needs[1:], strict=True) if need]
    found = iter(torch.autograd.grad(w, inputs, dy.T @ x, create_graph=True) if inputs else ())
    return [dy @ w if needs[0] else None, *(next(found) if need else None for need in needs[1:])]


def _gradients(
    spec: EinsumSpec, x: Tensor, factors: list[Tensor], dy: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    costs = hardware_costs(x.device.type)
    if not _back_through_chain(spec, bucket(x.shape[0]), costs):
        dx, found = dy @ dense(spec, factors) if needs[0] else None, [None for _ in factors]
        if any(needs[1:]):
            dw = (dy.T @ x).reshape(spec.shape_of((*spec.outs, *spec.ins)))
            found = contraction.gradients(plan_dense(spec), factors, dw, needs[1:])
        return [dx, *found]
    plan, dx = plan_chain(spec, bucket(x.shape[0]), costs), torch.empty_like(x) if needs[0] else None
    total: list[Tensor | None] = [None for _ in factors]
    step = _rows_at_once(plan, x) or max(1, x.shape[0])
    for begin in range(0, max(1, x.shape[0]), step):
        some, of = x[begin : begin + step], dy[begin : begin + step]
        operands = [some.reshape(-1, *spec.shape_of(spec.ins)), *factors]
        own, *each = contraction.gradients(plan, operands, of.reshape(-1, *spec.shape_of(spec.outs)), needs)
        if dx is not None and own is not None:
            dx[begin : begin + step] = own.reshape(some.shape)
        total = [one if sum_ is None or one is None else sum_ + one for sum_, one in zip(total, each, strict=True)]
    return [dx, *total]


def look_up_rows(spec: EinsumSpec, factors: list[Tensor], index: Int[Tensor, "n"]) -> Float[Tensor, "n inner"]:
    """Return ``W[index] (n, in)``: look every factor up along its output labels, then contract."""
    at, rest = {}, index
    for label in reversed(spec.outs[1:]):
        number = spec.size([label])
        at[label], rest = rest % number, rest // number
    last = spec.size(spec.outs[:1])
    at |= dict.fromkeys(spec.outs[:1], torch.where(rest < 0, last, rest))  # a row out of range raises IndexError
    picked, inputs = [], []
    for factor, (_, labels) in zip(factors, spec.factors, strict=True):
        looked = [label for label in labels if label in at]
        if looked:
            inner = [label for label in labels if label not in at]
            factor = factor.permute([labels.index(label) for label in (*looked, *inner)])
            factor, labels = factor[tuple(at[label] for label in looked)], (ROWS, *inner)
        picked.append(factor)
        inputs.append(labels)
    plan = _plan_of(tuple(inputs), (ROWS, *spec.ins), (*spec.sizes, (ROWS, bucket(index.shape[0]))))
    return run(plan, picked).reshape(index.shape[0], spec.shape[1])


@torch.compiler.assume_constant_result
def _plan_of(inputs, output, sizes) -> Plan:
    return plan_of(inputs, output, sizes)


def lookup_flops(spec: EinsumSpec, rows: int) -> int:
    """Return the FLOPs of ``look_up_rows`` for ``rows`` indices."""
    inputs = []
    for _, labels in spec.factors:
        inner = tuple(label for label in labels if label not in spec.outs)
        inputs.append(labels if len(inner) == len(labels) else (ROWS, *inner))
    return plan_of(tuple(inputs), (ROWS, *spec.ins), (*spec.sizes, (ROWS, rows))).counts.flops
