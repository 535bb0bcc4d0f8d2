"""How a diagram is evaluated: contraction plans, their cost, forward and backward.

Few parameters do not mean few FLOPs, so the order of the pairwise contractions is chosen, never fixed. Candidates are
the order with the fewest FLOPs for ``x`` and the factors together, and the one that first rebuilds ``W`` and multiplies
once. Each is priced as FLOPs plus ``BALANCE`` times the numbers it reads and writes, for the number of rows at hand.
FLOPs follow opt_einsum: 2 for a multiply-add, 1 for a product that is not summed.

Forward keeps ``x`` and the factors only. Backward has a plan of its own: through the same chain, or through the dense
gradient ``dW = dy^T x``, which is then contracted with the other factors. Both are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from string import ascii_letters

import opt_einsum
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold.structure.diagram import Diagram

BALANCE = 4.0  # FLOPs that take as long as moving one number; small, so that it decides only between near equals
ROWS = "(rows)"  # the label of the leading index of x; no diagram can hold it
LARGEST_SEARCH = 8  # operands whose best order is searched for; with more, opt_einsum's heuristics
BUCKETS = (1, 32, 2048)  # layers plan for these numbers of rows only, so that a trace meets at most three branches


@dataclass(frozen=True)
class Plan:
    """Pairwise contractions ``(i, j), equation, product`` on a list of operands: pop ``i`` and ``j``, append the result.

    Where the step is a product of two matrices, ``product`` says how (:func:`_product`): einsum takes longer to begin.
    """

    steps: tuple[tuple[tuple[int, ...], str, tuple[bool, bool, bool] | None], ...]
    flops: int
    moved: int

    @property
    def price(self) -> float:
        return self.flops + BALANCE * self.moved


@lru_cache(maxsize=4096)
def plan_of(inputs: tuple[tuple[str, ...], ...], output: tuple[str, ...], sizes: tuple[tuple[str, int], ...]) -> Plan:
    """The pairwise order with the fewest FLOPs for one contraction of labelled operands."""
    letters = {label: ascii_letters[k] for k, (label, _) in enumerate(sizes)}
    size = {letters[label]: number for label, number in sizes}
    terms = ["".join(letters[label] for label in labels) for labels in inputs]
    target = "".join(letters[label] for label in output)
    path, steps, flops, moved = _path(terms, target, size), [], 0, 0
    for number, chosen in enumerate(path):
        taken = [terms[k] for k in chosen]
        terms = [term for k, term in enumerate(terms) if k not in chosen]
        kept = target if number == len(path) - 1 else _kept(taken, terms, target)
        terms.append(kept)
        union = set("".join(taken))
        flops += _size(union, size) * (len(taken) - 1 + (len(union) > len(kept)))
        moved += sum(_size(term, size) for term in [*taken, kept])
        inputs_now = [taken[k] for k in _order(chosen)]
        equation = ",".join(inputs_now) + "->" + kept
        steps.append((tuple(sorted(chosen, reverse=True)), equation, _product(inputs_now, kept)))
    return Plan(tuple(steps), int(flops), int(moved))


@torch.compiler.assume_constant_result
def _known_plan(inputs, output, sizes) -> Plan:
    """:func:`plan_of` for code that is compiled: a search can't be traced, and what it is given are constants."""
    return plan_of(inputs, output, sizes)


@torch.compiler.assume_constant_result
def _known_forward_plans(diagram: Diagram, rows: int) -> tuple[Plan, Plan | None]:
    return forward_plans(diagram, rows)


def _path(terms: list[str], target: str, size: dict[str, int]) -> list[tuple[int, ...]]:
    if len(terms) == 1:
        return [(0,)]
    if len(terms) <= LARGEST_SEARCH:
        return [tuple(pair) for pair in opt_einsum.paths.ssa_to_linear(_best_order(terms, target, size))]
    shapes = [tuple(size[letter] for letter in term) for term in terms]
    path = opt_einsum.contract_path(",".join(terms) + "->" + target, *shapes, shapes=True, optimize="auto")[0]
    return [tuple(pair) for pair in path]


def _best_order(terms: list[str], target: str, size: dict[str, int]) -> list[tuple[int, int]]:
    """The order with the fewest FLOPs, by dynamic programming over subsets (bit masks) of the operands.

    opt_einsum's exact search errs, by up to a factor of 4, where a label is shared by more than two operands.
    Results are numbered on from the operands, as in opt_einsum's "ssa" paths.
    """
    everything = 2 ** len(terms) - 1
    labels = {subset: _labels_of(subset, terms, target) for subset in range(1, everything + 1)}

    def joined(one: int, other: int) -> tuple[int, int, tuple]:
        union, kept = labels[one] | labels[other], labels[one | other]
        flops = _size(union, size) * (2 if union != kept else 1)
        moved = sum(_size(own, size) for own in (labels[one], labels[other], kept))
        (flops_one, moved_one, pairs_one), (flops_other, moved_other, pairs_other) = best(one), best(other)
        pairs = (*pairs_one, *pairs_other, (one, other))
        return flops + flops_one + flops_other, moved + moved_one + moved_other, pairs

    @cache
    def best(subset: int) -> tuple[int, int, tuple]:  # FLOPs, numbers moved, the pairs of subsets in order
        halves = (half for half in range(1, subset // 2 + 1) if half & subset == half)
        return min((joined(half, subset - half) for half in halves), default=(0, 0, ()))

    number = {1 << k: k for k in range(len(terms))}
    for one, other in best(everything)[2]:
        number[one | other] = len(number)
    return [(number[one], number[other]) for one, other in best(everything)[2]]


def _labels_of(subset: int, terms: list[str], target: str) -> frozenset[str]:
    """What the contraction of ``subset`` keeps: the labels that the target or an operand outside it needs."""
    inside, outside = ("".join(t for k, t in enumerate(terms) if (subset >> k & 1) == side) for side in (1, 0))
    return frozenset(inside) if subset.bit_count() == 1 else frozenset(inside) & frozenset(outside + target)


def _size(labels, size: dict[str, int]) -> int:
    return prod(size[label] for label in labels)


def _order(chosen) -> list[int]:
    return sorted(range(len(chosen)), key=lambda k: -chosen[k])


def _product(terms: list[str], kept: str) -> tuple[bool, bool, bool] | None:
    """Whether the second of two matrices comes first, and which of them are transposed, in ``(a, s) (s, b)``.

    None where their contraction is no such product.
    """
    if [len(term) for term in (*terms, kept)] != [2, 2, 2] or len(set("".join(terms))) != 3 or kept[0] == kept[1]:
        return None
    (summed,) = set("".join(terms)) - set(kept)
    if any(term.count(summed) != 1 for term in terms):
        return None
    swapped = kept[0] in terms[1]
    first, second = terms[::-1] if swapped else terms
    return swapped, first[0] == summed, second[1] == summed


def _kept(taken: list[str], others: list[str], target: str) -> str:
    needed = set("".join(others) + target)
    return "".join(dict.fromkeys(letter for letter in "".join(taken) if letter in needed))


def run(plan: Plan, operands: list[Tensor]) -> Tensor:
    """Carry out ``plan`` on ``operands``."""
    operands = list(operands)
    for chosen, equation, product in plan.steps:
        taken = [operands.pop(k) for k in chosen]
        if product is None:
            operands.append(torch.einsum(equation, *taken))
        else:
            swapped, *transposed = product
            one, other = taken[::-1] if swapped else taken
            operands.append((one.T if transposed[0] else one) @ (other.T if transposed[1] else other))
    return operands[0]


@lru_cache(maxsize=4096)
def forward_plans(diagram: Diagram, rows: int) -> tuple[Plan, Plan | None]:
    """The cheaper way to multiply ``rows`` vectors: a chain ``(plan, None)``, or ``(rebuild, multiply)``."""
    sizes = (*diagram.sizes, (ROWS, rows))
    factors = tuple(labels for _, labels in diagram.factors)
    x, y, w = (ROWS, *diagram.ins), (ROWS, *diagram.outs), (*diagram.outs, *diagram.ins)
    chain = plan_of((x, *factors), y, sizes)
    rebuild, multiply = plan_of(factors, w, sizes), plan_of((x, w), y, sizes)
    return (chain, None) if chain.price <= rebuild.price + multiply.price else (rebuild, multiply)


def flops(diagram: Diagram, rows: int) -> int:
    """FLOPs of ``x @ W.T`` for ``rows`` vectors, a rebuild of ``W`` included where the plan has one."""
    return sum(plan.flops for plan in forward_plans(diagram, rows) if plan is not None)


def dense(diagram: Diagram, factors: list[Tensor]) -> Float[Tensor, "out inner"]:
    """``W (out, in)``."""
    plan = plan_of(tuple(labels for _, labels in diagram.factors), (*diagram.outs, *diagram.ins), diagram.sizes)
    return run(plan, factors).reshape(diagram.shape)


def rows_of(diagram: Diagram, factors: list[Tensor], index: Int[Tensor, "n"]) -> Float[Tensor, "n inner"]:
    """``W[index] (n, in)`` without ``W``: every factor is looked up along its output labels, then contracted."""
    at, rest = {}, index
    for label in reversed(diagram.outs[1:]):
        number = diagram.size([label])
        at[label], rest = rest % number, rest // number
    at |= dict.fromkeys(diagram.outs[:1], rest)  # without a modulo: a row that does not exist raises IndexError
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
    return plan_of(tuple(inputs), (ROWS, *diagram.ins), (*diagram.sizes, (ROWS, rows))).flops


def apply(
    diagram: Diagram, factors: list[Tensor], x: Float[Tensor, "n inner"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "n out"]:
    """``x (n, in) @ W.T + bias -> (n, out)``, by the plan that is cheapest for this many rows."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, factors = x.to(dtype), [factor.to(dtype) for factor in factors]
        bias = None if bias is None else bias.to(dtype)
    if [labels for _, labels in diagram.factors] == [(*diagram.outs, *diagram.ins)]:  # a dense matrix
        return torch.nn.functional.linear(x, factors[0].reshape(diagram.shape), bias)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _forward(diagram, factors, x, bias)
    return _Apply.apply(diagram, x, bias, *factors)


def bucket(rows: int) -> int:
    """The number of rows that a call with ``rows`` rows is planned for; an exported program has one plan, no branch."""
    if torch.compiler.is_exporting():
        return BUCKETS[-1]
    return BUCKETS[0] if rows <= 4 else BUCKETS[1] if rows <= 128 else BUCKETS[2]


def _forward(diagram: Diagram, factors: list[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
    first, second = _known_forward_plans(diagram, bucket(x.shape[0]))
    folded = x.reshape(x.shape[0], *diagram.shape_of(diagram.ins))
    if second is None:
        y = run(first, [folded, *factors]).reshape(x.shape[0], diagram.shape[0])
        return y if bias is None else y.add_(bias)  # a product, nobody else's
    return torch.nn.functional.linear(x, run(first, factors).reshape(diagram.shape), bias)


@lru_cache(maxsize=4096)
def _through_dense(diagram: Diagram, rows: int) -> bool:
    """Whether backward is cheaper through ``dW``: a chain costs about three times its forward, one of them a redo."""
    chain = 3 * sum(plan.price for plan in forward_plans(diagram, rows) if plan is not None)
    rebuild = plan_of(tuple(labels for _, labels in diagram.factors), (*diagram.outs, *diagram.ins), diagram.sizes)
    back = sum(plan.price for plan in forward_plans(diagram.transposed(), rows) if plan is not None)
    out, inner = diagram.shape
    return 2.0 * rows * out * inner + BALANCE * (rows * (out + inner) + out * inner) + 3 * rebuild.price + back < chain


class _Apply(torch.autograd.Function):
    """Keeps ``x`` and the factors; nothing in between survives the forward pass."""

    @staticmethod
    def forward(ctx, diagram, x, bias, *factors):
        ctx.diagram = diagram
        ctx.save_for_backward(x, *factors)
        return _forward(diagram, list(factors), x, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, *factors = ctx.saved_tensors
        (_, of_x, of_bias, *rest), diagram = ctx.needs_input_grad, ctx.diagram
        needs, db = (of_x, *rest), dy.sum(0) if of_bias else None
        with torch.autocast(x.device.type, enabled=False):
            if _through_dense(diagram, bucket(x.shape[0])):
                dx, *others = _dense_gradient(diagram, x, factors, dy, needs)
            else:
                dx, *others = _gradients(lambda x, *f: _forward(diagram, list(f), x), (x, *factors), dy, needs)
        return None, dx, db, *others


def _dense_gradient(diagram, x, factors, dy, needs):
    dx = _forward(diagram.transposed(), factors, dy) if needs[0] else None
    if not any(needs[1:]):
        return dx, *(None for _ in factors)
    return dx, *_gradients(lambda *f: dense(diagram, list(f)), tuple(factors), dy.T @ x, needs[1:])


def _gradients(function, values, upstream, needs):
    leaves = [value.detach().requires_grad_(need) for value, need in zip(values, needs, strict=True)]
    with torch.enable_grad():
        result = function(*leaves)
    wanted = iter(torch.autograd.grad(result, [leaf for leaf in leaves if leaf.requires_grad], upstream))
    return tuple(next(wanted) if need else None for need in needs)
