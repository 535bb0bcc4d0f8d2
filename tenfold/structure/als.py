"""Fit structures: in closed form where that is optimal, else by alternating least squares (ALS) from there.

With all other factors fixed, ``W`` is linear in one factor, whose optimum solves a linear system. Labels of that factor on the
output (and on the input, in the Frobenius norm) split the system into independent ones of equal size, so a Kronecker term or a
CP factor costs one small matrix. Systems are solved in float64, nearly singular ones by a symmetric eigendecomposition, which
cannot fail. The objective never grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenfold.structure.contraction import plan_of, run
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.linalg import solve_symmetric
from tenfold.structure.scattered import ScatteredEinsum

if TYPE_CHECKING:
    from tenfold.structure.base import Factors, Structure

LARGEST_SYSTEM = 4096  # unknowns of one linear system; larger factors are left to L-BFGS
START_TOLERANCE = 1e-6  # of the Frobenius fit from which a fit in a metric starts


def fit(
    structure: Structure,
    weights: Tensor | Sequence[Tensor],
    metrics: Tensor | Sequence[Tensor | None] | None = None,
    row_metrics: Tensor | Sequence[Tensor | None] | None = None,
    shared: Sequence[str] = (),
    *,
    start: Factors | None = None,
    sweeps: int = 200,
    tolerance: float = 1e-9,
    starts: int = 1,
    seed: int = 0,
    log: dict | None = None,
) -> Factors:
    """Minimise ``sum_s || R_s (W_s - What_s) L_s ||_F^2``, ``L_s L_s^T = metrics[s]`` and ``R_s^T R_s = row_metrics[s]``.

    Args:
        weights: one matrix ``(out, in)``, or several that are fitted jointly.
        metrics: the second moment ``(in, in)`` of the inputs of each matrix; None for the Frobenius norm.
        row_metrics: likewise ``(out, out)``, the weights of errors in the outputs.
        shared: names of factors that all matrices use in common.
        start: initial factors; by default the closed form, or random ones.
        sweeps: largest number of rounds over all factors.
        tolerance: stop when a round lowers the objective by less than this fraction of ``||W L||^2``.
        starts: number of random starts if there is no closed form; the best result is returned.
        log: receives ``stopped_by`` (``exact``: no iteration was needed, ``tolerance`` or ``sweeps``), the number of
            ``sweeps``, and the ``objective``.

    Returns:
        The factors in float64. With several matrices a factor that is not shared has a leading axis, one slice each.

    Raises:
        ValueError: a weight or a metric has the wrong shape, or contains NaN or Inf.
    """
    several = not isinstance(weights, Tensor)
    targets = [_check("weight", structure, weight, structure.shape) for weight in (weights if several else [weights])]
    norms = _check_metrics("metric", structure, metrics, len(targets), structure.shape[1])
    rows = _check_metrics("row metric", structure, row_metrics, len(targets), structure.shape[0])
    plain = all(metric is None for metric in (*norms, *rows))
    log = {} if log is None else log
    if several and plain and start is None:
        form = structure.shared_form(targets, tuple(shared), sweeps, tolerance)
        if form:
            return form
    problem = Problem(structure, targets, norms, rows, tuple(shared))
    if not several and start is None:
        start, exact = problem.closed_form()
        if exact and start is not None:
            error = float(problem.objective(problem.initial_state(start)))
            log.update(sweeps=0, stopped_by="exact", objective=error)
            return start
        if not plain:  # few rounds from the Frobenius fit beat many from elsewhere
            settings = {"sweeps": min(200, 40 * sweeps), "tolerance": max(tolerance, START_TOLERANCE)}
            near = fit(structure, targets[0], starts=starts, seed=seed, **settings)
            candidates = [near] if start is None else [near, start]
            start = min(candidates, key=lambda form: float(problem.objective(problem.initial_state(form))))
    states = problem.initial_states(start, max(1, starts), seed)
    results = [problem.alternate(state, sweeps, tolerance) for state in states]
    best, count, reason, error = min(results, key=lambda result: result[3])
    log.update(sweeps=count, stopped_by=reason, objective=error)
    return {name: value[0] if not several or name in shared else value for name, value in best.items()}


def _check(what: str, structure: Structure, matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(matrix.shape) != shape:
        raise ValueError(f"the {what} has shape {tuple(matrix.shape)} but {structure} needs {shape}")
    wrong = int((~torch.isfinite(matrix)).sum())
    if wrong:
        raise ValueError(f"{wrong} of the {matrix.numel()} entries of the {what} are NaN or Inf; mend or leave it out")
    return matrix.detach().double()


def _check_metrics(what: str, structure: Structure, metrics, count: int, size: int) -> list[Tensor | None]:
    given = [None] * count if metrics is None else [metrics] if isinstance(metrics, Tensor) else list(metrics)
    if len(given) != count:
        raise ValueError(f"{count} weights need {count} {what}s, not {len(given)}; None stands for the Frobenius norm")
    return [None if metric is None else _check(what, structure, metric, (size, size)) for metric in given]


class Problem:
    """One joint fit: its targets, its metrics, and which factors the targets share.

    A state maps every factor name to a tensor with a leading axis: one slice per target, or a single one if shared.
    """

    def __init__(self, structure: Structure, targets: list[Tensor], metrics: list, rows: list, shared: tuple[str, ...]):
        self.structure, self.targets, self.shared = structure, targets, shared
        self.metrics, self.rows, self.einsums = metrics, rows, structure.normal_form()
        self.weighted = any(metric is not None for metric in metrics)
        shapes = structure.factor_shapes()
        if unknown := [name for name in shared if name not in shapes]:
            raise ValueError(f"{structure} has no factor {unknown[0]!r} to share; it has {list(shapes)}")

    def closed_form(self) -> tuple[Factors | None, bool]:
        """Return a non-iterative fit to the only target, if there is one, and whether it is optimal."""
        (target,), (metric,), (row,) = self.targets, self.metrics, self.rows
        if metric is None and row is None:
            return self.structure.closed_form(target), self.structure.optimal
        sides = [
            torch.eye(size, dtype=target.dtype, device=target.device) if given is None else given
            for given, size in zip((metric, row), target.shape[::-1], strict=True)
        ]
        form = self.structure.metric_form(target, *sides)
        return form, form is not None and self.structure.optimal_in_metric

    def initial_states(self, start: Factors | None, starts: int, seed: int) -> list[Factors]:
        """Return the state of ``start``, else of the closed form of the sum of the targets, else ``starts`` random ones."""
        if start is None:  # weighted unevenly, so that opposite targets do not cancel
            total = torch.stack([target / (s + 1) for s, target in enumerate(self.targets)]).sum(0)
            start = self.structure.closed_form(total)
            if start is None:
                std = float(total.square().mean().sqrt()) or 1.0
                generators = [torch.Generator().manual_seed(seed + k) for k in range(starts)]
                return [self.initial_state(self.structure.init(std, one, torch.float64)) for one in generators]
        return [self.initial_state(start)]

    def initial_state(self, start: Factors) -> Factors:
        """Return the state in which every target has the factors ``start``."""
        device, state = self.targets[0].device, {}
        for name, value in start.items():
            value = value.detach().to(device)[None]
            value = value.double() if value.is_floating_point() else value
            state[name] = value.repeat_interleave(1 if name in self.shared else len(self.targets), dim=0)
        return state

    def factors_of(self, state: Factors, s: int) -> Factors:
        return {name: value[0] if len(value) == 1 else value[s] for name, value in state.items()}

    def objective(self, state: Factors) -> Tensor:
        total = self.targets[0].new_zeros(())
        for s, (target, metric, row) in enumerate(zip(self.targets, self.metrics, self.rows, strict=True)):
            rest = target - self.structure.dense(self.factors_of(state, s))
            weighted = rest if metric is None else rest @ metric
            total = total + (rest * (weighted if row is None else row @ weighted)).sum()
        return total

    def alternate(self, state: Factors, sweeps: int, tolerance: float) -> tuple[Factors, int, str, float]:
        """Alternate until a sweep gains less than ``tolerance``; then L-BFGS, for row metrics and systems that are too large."""
        blocks = [(einsum, name) for einsum in self.einsums for name in einsum.spec.names]
        blocks.sort(key=lambda block: block[1] in self.shared)  # shared ones last: opposite targets cancel in them
        small = [block for block in blocks if self.system_size(*block) <= LARGEST_SYSTEM]
        zeros = {name: value * 0 if value.is_floating_point() else value for name, value in state.items()}
        scale = self.objective(zeros)
        first = now = self.objective(state)
        count, reason = 0, "sweeps"
        while count < sweeps and reason == "sweeps":
            before, count = now, count + 1
            for einsum, name in small:
                candidate = state | {name: self.solve_factor(state, einsum, name)}
                after = self.objective(candidate)
                if after <= now:
                    state, now = candidate, after
            if before - now <= tolerance * scale:
                reason = "tolerance"
        if len(small) < len(blocks) or any(row is not None for row in self.rows):
            state = self.minimize_lbfgs(state, sweeps)
            now = self.objective(state)
        assert now <= first * (1 + 1e-9) + 1e-300, "the objective grew"
        return state, count, reason, float(now)

    def system_size(self, einsum: ScatteredEinsum, name: str) -> int:
        return max(einsum.spec.size(part) for part in self.coupled_labels(einsum.spec, name))

    def solve_factor(self, state: Factors, einsum: ScatteredEinsum, name: str) -> Tensor:
        systems = [self.system(self.factors_of(state, s), einsum, name, s) for s in range(len(self.targets))]
        if name in self.shared:
            grams, rights, labels = zip(*systems, strict=True)
            systems = [([reduce(torch.add, [gram for (gram,) in grams])], reduce(torch.add, rights), labels[0])]
        order = dict(einsum.spec.factors)[name]
        solutions = []
        for grams, right, labels in systems:
            value = _solve_kronecker(grams, right).reshape(einsum.spec.shape_of(labels))
            solutions.append(value.permute([labels.index(label) for label in order]))
        return torch.stack(solutions)

    def _split_labels(self, spec: EinsumSpec, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the labels of a factor that one system couples, and those that split it."""
        independent = spec.outs if self.weighted else spec.outs + spec.ins
        own = dict(spec.factors)[name]
        return tuple(x for x in own if x not in independent), tuple(x for x in own if x in independent)

    def coupled_labels(self, spec: EinsumSpec, name: str) -> list[tuple[str, ...]]:
        """Return the coupled labels of a factor, grouped by what the rest of the einsum connects.

        The system is the Kronecker product of one system per group, except for a shared factor, where systems are added.
        """
        coupled, split = self._split_labels(spec, name)
        if name in self.shared or not coupled:
            return [coupled]
        groups = [{label} for label in coupled]
        connections = [set(labels) for other, labels in spec.factors if other != name]
        for connected in [*connections, set(spec.ins) if self.weighted else set()]:
            inside = connected - set(split)
            touched = [group for group in groups if group & inside]
            groups = [group for group in groups if not group & inside] + [inside.union(*touched)]
        parts = [tuple(label for label in coupled if label in group) for group in groups]
        return [part for part in parts if part]

    def system(
        self, factors: Factors, einsum: ScatteredEinsum, name: str, s: int
    ) -> tuple[list[Tensor], Tensor, tuple[str, ...]]:
        """Return the normal equations of one factor for target ``s``.

        Labels that nothing else in the normal equations has do not split the system: they number its ``m`` right sides.

        Returns:
            ``grams``, each ``(*split, n_k, n_k)``, whose Kronecker product is the matrix; ``right (*split, m, n_1, n_2, ..)``;
            the labels of ``right``.
        """
        spec, parts = einsum.spec, self.coupled_labels(einsum.spec, name)
        rest = self.targets[s]
        if len(self.einsums) > 1:  # what the other einsums leave
            rest = rest - self.structure.dense(factors) + einsum.dense(factors)
        metric = self.metrics[s]
        if metric is None and self.weighted:
            metric = torch.eye(self.structure.shape[1], dtype=torch.float64, device=rest.device)
        target = rest if metric is None else rest @ metric
        if (rows := einsum.index(factors, "rows")) is not None:
            target = target[rows]
        if (columns := einsum.index(factors, "columns")) is not None:
            target = target[:, columns]
            metric = None if metric is None else metric[columns][:, columns]
        others = [(labels, factors[n]) for n, labels in spec.factors if n != name]
        ins, outs = spec.ins, spec.outs
        right = [((*outs, *ins), target.reshape(spec.shape_of((*outs, *ins)))), *others]
        common = outs if metric is not None else outs + ins
        twin = {label: label if label in common else f"({label})" for label, _ in spec.sizes}
        gram = others + [(tuple(twin[label] for label in labels), value) for labels, value in others]
        if metric is not None:
            gram.append(((*ins, *(twin[label] for label in ins)), metric.reshape(spec.shape_of(ins) * 2)))
        sizes = dict(spec.sizes) | {twin[label]: size for label, size in spec.sizes}
        known = {label for labels, _ in gram for label in labels}
        _, split = self._split_labels(spec, name)
        sides, split = tuple(x for x in split if x not in known), tuple(x for x in split if x in known)
        grams = []
        for k, operands in enumerate(_group_operands(gram, parts, split, twin)):
            used = split if k == 0 else tuple(x for x in split if any(x in labels for labels, _ in operands))
            shape, n = [sizes[x] if x in used else 1 for x in split], spec.size(parts[k])
            output = (*used, *parts[k], *(twin[label] for label in parts[k]))
            grams.append(_einsum(operands, output, sizes, rest.device).reshape(*shape, n, n))
        labels = (*split, *sides, *(label for part in parts for label in part))
        shape = (*spec.shape_of(split), spec.size(sides), *map(spec.size, parts))
        return grams, _einsum(right, labels, sizes, rest.device).reshape(shape), labels

    def minimize_lbfgs(self, state: Factors, steps: int) -> Factors:
        """Return the state after L-BFGS on all factors at once."""
        trained = {name: value for name, value in state.items() if value.is_floating_point()}
        leaves = {
            n: value.clone(memory_format=torch.contiguous_format).requires_grad_() for n, value in trained.items()
        }
        settings = {"history_size": 20, "line_search_fn": "strong_wolfe", "tolerance_change": 0.0}
        optimizer = torch.optim.LBFGS(list(leaves.values()), max_iter=steps, **settings)

        def closure():
            optimizer.zero_grad()
            loss = self.objective(state | leaves)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        after = state | {name: leaf.detach() for name, leaf in leaves.items()}
        return after if self.objective(after) <= self.objective(state) else state


def _solve_kronecker(grams: list[Tensor], right: Tensor) -> Tensor:
    """Multiply ``right (*split, m, n_1, n_2, ..)`` by the inverse of the Kronecker product of ``grams``, axis by axis."""
    first = right.ndim - len(grams)
    for k, gram in enumerate(grams):
        moved = right.movedim(first + k, -1)
        flat = moved.reshape(*right.shape[: first - 1], -1, gram.shape[-1])
        gram = gram.expand(*right.shape[: first - 1], *gram.shape[-2:])
        right = solve_symmetric(gram, flat).reshape(moved.shape).movedim(-1, first + k)
    return right


def _group_operands(gram: list, parts: list, split: tuple[str, ...], twin: dict[str, str]) -> list[list]:
    """Return the operands of the normal equations that each of ``parts`` reaches; the others go to the first one."""
    groups, rest = [], list(gram)
    for part in parts:
        reached, group = {*part, *(twin[label] for label in part)}, []
        while near := [operand for operand in rest if reached & set(operand[0])]:
            rest = [operand for operand in rest if not reached & set(operand[0])]
            reached |= {label for labels, _ in near for label in labels} - set(split)
            group += near
        groups.append(group)
    groups[0] += rest
    return groups


def _einsum(operands: list, output: tuple[str, ...], sizes: dict[str, int], device: torch.device) -> Tensor:
    """Contract ``(labels, tensor)`` operands; the result is repeated along output labels that no operand has."""
    known = {label for labels, _ in operands for label in labels}
    missing = tuple(label for label in output if label not in known)
    if missing or not operands:
        ones = torch.ones([sizes[label] for label in missing], dtype=torch.float64, device=device)
        operands = [*operands, (missing, ones)]
    plan = plan_of(tuple(labels for labels, _ in operands), output, tuple(sizes.items()))
    return run(plan, [value for _, value in operands])
