"""Multiply by the matrix of an einsum: ``x @ W.T``, rows of ``W``, and ``W`` itself.

Few parameters do not mean few FLOPs, so two plans are priced for the number of rows: the best order of ``x`` and the factors (the
chain), and making ``W`` first. Backward chooses independently: through the chain, or through ``dW = dy^T x``. Autograd saves only
``x`` and the factors; intermediate results are recomputed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold.structure import contraction
from tenfold.structure.contraction import ROWS, Plan, plan_of, run
from tenfold.structure.cost_model import CPU, HardwareCosts, hardware_costs, matmul_counts
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.few_rows import is_traced

BUCKETS = (1, 32, 512, 2048)  # numbers of rows that plans are made for; compiled code branches between three of them
MAX_ROWS, MIN_ROWS = 512, 64  # of a chain that run at once on a CPU
CACHE_NUMEL = 2**20  # intermediate elements that should stay in the cache of a CPU
CHAIN_MARGIN = 0.95  # highest price of a chain relative to making W, because it moves more than is counted


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
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (dy,), (x, *factors) = grad_outputs, ctx.saved_tensors
        (_, of_x, of_bias, *rest) = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            dx, *others = _gradients(ctx.spec, x, factors, dy, [of_x, *rest])
        return None, dx, dy.sum(0) if of_bias else None, *others


def _gradients(
    spec: EinsumSpec, x: Tensor, factors: list[Tensor], dy: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    rows, costs = bucket(x.shape[0]), hardware_costs(x.device.type)
    if not _back_through_chain(spec, rows, costs):
        dx, total = dy @ dense(spec, factors) if needs[0] else None, [None for _ in factors]
        if any(needs[1:]):
            dw = (dy.T @ x).reshape(spec.shape_of((*spec.outs, *spec.ins)))
            total = contraction.gradients(plan_dense(spec), factors, dw, needs[1:])
        return [dx, *total]
    plan, parts, total = plan_chain(spec, rows, costs), [], []
    step = _rows_at_once(plan, x) or max(1, x.shape[0])
    for some, of in zip(x.split(step), dy.split(step), strict=True):
        operands = [some.reshape(-1, *spec.shape_of(spec.ins)), *factors]
        dx, *new = contraction.gradients(plan, operands, of.reshape(-1, *spec.shape_of(spec.outs)), needs)
        parts.append(dx)
        total = (
            [one if one is None or k is None else one + k for one, k in zip(total, new, strict=True)] if total else new
        )
    return [torch.cat(parts).reshape(x.shape) if needs[0] else None, *total]


def look_up_rows(spec: EinsumSpec, factors: list[Tensor], index: Int[Tensor, "n"]) -> Float[Tensor, "n inner"]:
    """Return ``W[index] (n, in)``: look every factor up along its output labels, then contract."""
    at, rest = {}, index
    for label in reversed(spec.outs[1:]):
        number = spec.size([label])
        at[label], rest = rest % number, rest // number
    last = spec.size(spec.outs[:1])
    at |= dict.fromkeys(spec.outs[:1], torch.where(rest < 0, last, rest))  # a row out of range raises IndexError
    picked, inputs = [], _lookup_inputs(spec)
    for factor, (_, labels) in zip(factors, spec.factors, strict=True):
        looked = [label for label in labels if label in at]
        if looked:
            inner = [label for label in labels if label not in at]
            factor = factor.permute([labels.index(label) for label in (*looked, *inner)])
            factor = factor[tuple(at[label] for label in looked)]
        picked.append(factor)
    plan = _plan_of(inputs, (ROWS, *spec.ins), (*spec.sizes, (ROWS, bucket(index.shape[0]))))
    return run(plan, picked).reshape(index.shape[0], spec.shape[1])


def _lookup_inputs(spec: EinsumSpec) -> tuple[tuple[str, ...], ...]:
    """Return the labels of every factor once it is looked up along its output labels."""
    inner = [(labels, tuple(label for label in labels if label not in spec.outs)) for _, labels in spec.factors]
    return tuple(labels if len(rest) == len(labels) else (ROWS, *rest) for labels, rest in inner)


@torch.compiler.assume_constant_result
def _plan_of(inputs, output, sizes) -> Plan:
    return plan_of(inputs, output, sizes)


def lookup_flops(spec: EinsumSpec, rows: int) -> int:
    """Return the FLOPs of ``look_up_rows`` for ``rows`` indices."""
    return plan_of(_lookup_inputs(spec), (ROWS, *spec.ins), (*spec.sizes, (ROWS, rows))).counts.flops
