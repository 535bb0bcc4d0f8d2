"""The nearest member of a structure: the closed form where it is optimal, else alternating least squares from there.

With all other factors fixed, ``W`` is linear in one factor, and the best value solves a linear system. Labels of that
factor which lie on the output (and on the input, in the Frobenius norm) split the system into independent ones of the
same size, so a Kronecker term or a CP factor costs one small matrix. Systems are solved in float64, nearly singular ones by a
symmetric eigendecomposition, which nothing can make fail. The objective never grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.contraction import plan_of, run
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.linalg import solve_symmetric
from tenfold.structure.scattered import ScatteredEinsum

LARGEST_SYSTEM = 4096  # unknowns of one linear system; above it the factor is left to L-BFGS
NEAR = 1e-6  # the tolerance of the nearest member that a fit in a metric starts from


def fit(
    structure: Structure,
    weights: Float[Tensor, "out inner"] | Sequence[Float[Tensor, "out inner"]],
    metrics: Float[Tensor, "n n"] | Sequence[Float[Tensor, "n n"] | None] | None = None,
    row_metrics: Float[Tensor, "m m"] | Sequence[Float[Tensor, "m m"] | None] | None = None,
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
        weights: one matrix ``(out, in)``, or several that are fitted together.
        metrics: the second moment of the inputs of each matrix; None for the Frobenius norm.
        row_metrics: likewise ``(out, out)`` of its outputs: what an error there costs.
        shared: names of factors that all matrices use in common.
        start: factors to start from; without them the closed form, or noise.
        sweeps: at most this many rounds over all factors.
        tolerance: stop when a round lowers the objective by less than this share of ``||W L||^2``.
        starts: how many random starts are tried where there is no closed form; the best one counts.
        log: is told ``stopped_by`` (``exact``: no iteration was needed, ``tolerance`` or ``sweeps``), the ``sweeps`` that were
            run, and the ``objective``.

    Returns:
        The factors in float64. With several matrices a factor that is not shared has a leading axis, one slice each.

    Raises:
        ValueError: a weight or a metric has another shape, or holds NaN or Inf.
    """
    several = not isinstance(weights, Tensor)
    targets = [_checked("weight", structure, weight, structure.shape) for weight in (weights if several else [weights])]
    norms = _checked_metrics("metric", structure, metrics, len(targets), structure.shape[1])
    rows = _checked_metrics("row metric", structure, row_metrics, len(targets), structure.shape[0])
    if several and not shared:  # nothing in common
        settings = {
            "start": start,
            "sweeps": sweeps,
            "tolerance": tolerance,
            "starts": starts,
            "seed": seed,
            "log": log,
        }
        each = [fit(structure, *problem, **settings) for problem in zip(targets, norms, rows, strict=True)]
        return {name: torch.stack([factors[name] for factors in each]) for name in each[0]}
    plain = all(metric is None for metric in (*norms, *rows))
    if (
        several
        and plain
        and start is None
        and (form := structure.shared_form(targets, tuple(shared), sweeps, tolerance))
    ):
        return form
    problem = Problem(structure, targets, norms, rows, tuple(shared))
    if not several and start is None:
        start, exact = problem.known()
        if exact and start is not None:
            _tell(log, 0, "exact", problem.objective(problem.begin(start)))
            return start
        if not plain:  # few rounds from the nearest one beat many from elsewhere
            most = {"sweeps": min(200, 40 * sweeps), "tolerance": max(tolerance, NEAR)}
            near = fit(structure, targets[0], starts=starts, seed=seed, **most)
            known = [near] if start is None else [near, start]
            start = min(known, key=lambda form: float(problem.objective(problem.begin(form))))
    begins = problem.begins(start, max(1, starts), seed)
    found = [problem.solve(begin, sweeps, tolerance) for begin in begins]
    best, count, reason, error = min(found, key=lambda one: one[3])
    _tell(log, count, reason, error)
    return {name: value[0] if not several or name in shared else value for name, value in best.items()}


def _tell(log: dict | None, sweeps: int, reason: str, objective) -> None:
    if log is not None:
        log.update(sweeps=sweeps, stopped_by=reason, objective=float(objective))


def _checked(what: str, structure: Structure, matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(matrix.shape) != shape:
        raise ValueError(f"the {what} has shape {tuple(matrix.shape)} but {structure} needs {shape}")
    wrong = int((~torch.isfinite(matrix)).sum())
    if wrong:
        raise ValueError(f"{wrong} of the {matrix.numel()} entries of the {what} are NaN or Inf; mend or leave it out")
    return matrix.detach().double()


def _checked_metrics(what: str, structure: Structure, metrics, count: int, size: int) -> list[Tensor | None]:
    shape = (size, size)
    given = [None] * count if metrics is None else [metrics] if isinstance(metrics, Tensor) else list(metrics)
    if len(given) != count:
        raise ValueError(f"{count} weights need {count} {what}s, not {len(given)}; None stands for the Frobenius norm")
    return [None if metric is None else _checked(what, structure, metric, shape) for metric in given]


class Problem:
    """One joint fit: its targets, its metrics, and which factors the targets share.

    A state maps every factor name to a tensor with a leading axis: one slice per target, or a single one if shared.
    """

    def __init__(self, structure: Structure, targets: list[Tensor], metrics: list, rows: list, shared: tuple[str, ...]):
        self.structure, self.targets, self.shared = structure, targets, shared
        self.metrics, self.rows = metrics, rows
        self.places = structure.normal_form()
        for name in shared:
            if name not in structure.factor_shapes():
                raise ValueError(
                    f"{structure} has no factor {name!r} to share; it has {list(structure.factor_shapes())}"
                )

    def known(self) -> tuple[Factors | None, bool]:
        """The factors of a single target that need no iteration, and whether they are the nearest."""
        (target,), (metric,), (row,) = self.targets, self.metrics, self.rows
        if metric is None and row is None:
            return self.structure.closed_form(target), self.structure.optimal
        sides = [
            torch.eye(size, dtype=target.dtype, device=target.device) if given is None else given
            for given, size in zip((metric, row), target.shape[::-1], strict=True)
        ]
        form = self.structure.metric_form(target, *sides)
        return form, form is not None and self.structure.optimal_in_metric

    def begins(self, start: Factors | None, starts: int, seed: int) -> list[Factors]:
        """States from given factors, from the closed form of the targets together, or ``starts`` ones from noise."""
        if start is None:  # weighed unevenly, so that opposite targets do not cancel
            together = torch.stack([target / (s + 1) for s, target in enumerate(self.targets)]).sum(0)
            start = self.structure.closed_form(together)
            std = float(together.square().mean().sqrt()) or 1.0
        if start is not None:
            return [self.begin(start)]
        generators = [torch.Generator().manual_seed(seed + k) for k in range(starts)]
        return [self.begin(self.structure.init(std, generator, torch.float64)) for generator in generators]

    def begin(self, start: Factors) -> Factors:
        """A state in which every target has the factors ``start``."""
        device, count = self.targets[0].device, len(self.targets)
        state = {name: value.detach().to(device)[None] for name, value in start.items()}
        return {
            name: (value.double() if value.is_floating_point() else value).repeat_interleave(
                1 if name in self.shared else count, dim=0
            )
            for name, value in state.items()
        }

    def slice(self, state: Factors, s: int) -> Factors:
        return {name: value[0] if len(value) == 1 else value[s] for name, value in state.items()}

    def objective(self, state: Factors) -> Tensor:
        """``sum_s || (W_s - What_s) L_s ||_F^2``"""
        total = self.targets[0].new_zeros(())
        for s, (target, metric, row) in enumerate(zip(self.targets, self.metrics, self.rows, strict=True)):
            rest = target - self.structure.dense(self.slice(state, s))
            weighed = rest if metric is None else rest @ metric
            total = total + (rest * (weighed if row is None else row @ weighed)).sum()
        return total

    def solve(self, state: Factors, sweeps: int, tolerance: float) -> tuple[Factors, int, str, float]:
        """Alternate until a sweep gains less than ``tolerance``; L-BFGS where a system is too large.

        Returns:
            The state, the number of sweeps, what ended them, and the objective.
        """
        blocks = [(place, name) for place in self.places for name in place.diagram.names]
        blocks.sort(key=lambda block: block[1] in self.shared)  # last: in what they share opposite targets cancel
        small = [block for block in blocks if self.unknowns(*block) <= LARGEST_SYSTEM]
        scale = self.objective(
            {name: value * 0 if value.is_floating_point() else value for name, value in state.items()}
        )
        first = now = self.objective(state)
        count, reason = 0, "sweeps"
        while count < sweeps and reason == "sweeps":
            before, count = now, count + 1
            for place, name in small:
                tried = state | {name: self.best(state, place, name)}
                after = self.objective(tried)
                if after <= now:
                    state, now = tried, after
            if before - now <= tolerance * scale:
                reason = "tolerance"
        if not (len(small) == len(blocks) and all(row is None for row in self.rows)):
            state = self.polish(state, sweeps)
            now = self.objective(state)
        assert now <= first * (1 + 1e-9) + 1e-300, "the objective grew"
        return state, count, reason, float(now)

    def unknowns(self, place: ScatteredEinsum, name: str) -> int:
        """The size of one of the linear systems of a factor."""
        return max(place.diagram.size(part) for part in self._apart(place.diagram, name))

    def best(self, state: Factors, place: ScatteredEinsum, name: str) -> Tensor:
        """The minimiser over one factor with all others fixed."""
        systems = [self.system(self.slice(state, s), place, name, s) for s in range(len(self.targets))]
        if name in self.shared:
            grams, rights, labels = zip(*systems, strict=True)
            systems = [([reduce(torch.add, [gram for (gram,) in grams])], reduce(torch.add, rights), labels[0])]
        order = dict(place.diagram.factors)[name]
        found = []
        for grams, right, labels in systems:
            value = _solved(grams, right).reshape(place.diagram.shape_of(labels))
            found.append(value.permute([labels.index(label) for label in order]))
        return torch.stack(found)

    def _labels(self, diagram: EinsumSpec, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The labels of a factor that one system couples, and those that split it."""
        independent = diagram.outs if any(m is not None for m in self.metrics) else diagram.outs + diagram.ins
        own = dict(diagram.factors)[name]
        return tuple(x for x in own if x not in independent), tuple(x for x in own if x in independent)

    def _apart(self, diagram: EinsumSpec, name: str) -> list[tuple[str, ...]]:
        """The coupled labels of a factor, those together that the rest of the diagram connects: a system is the Kronecker
        product of one system for each, but for a factor that is shared, where several of them add up."""
        coupled, split = self._labels(diagram, name)
        if name in self.shared or not coupled:
            return [coupled]
        groups = [{label} for label in coupled]
        sets = [set(labels) for other, labels in diagram.factors if other != name]
        for connected in [*sets, set(diagram.ins) if any(m is not None for m in self.metrics) else set()]:
            inside = connected - set(split)
            touched = [group for group in groups if group & inside]
            groups = [group for group in groups if not group & inside] + [inside.union(*touched)]
        found = [tuple(label for label in coupled if label in group) for group in groups]
        return [part for part in found if part]

    def system(
        self, factors: Factors, place: ScatteredEinsum, name: str, s: int
    ) -> tuple[list[Tensor], Tensor, tuple[str, ...]]:
        """The normal equations of one factor: ``grams``, each ``(*split, n_k, n_k)``, whose Kronecker product is the matrix,
        ``right (*split, m, n_1, n_2, ..)``, and the labels of ``right``.

        Labels that nothing else in the normal equations has do not split the system: they are its ``m`` right sides.
        """
        diagram, (_, split), parts = place.diagram, self._labels(place.diagram, name), self._apart(place.diagram, name)
        rest = self.targets[s]
        if len(self.places) > 1:  # what the other parts leave
            rest = rest - self.structure.dense(factors) + place.dense(factors)
        metric = self.metrics[s]
        if metric is None and any(m is not None for m in self.metrics):
            metric = torch.eye(self.structure.shape[1], dtype=torch.float64, device=rest.device)
        target, metric = _restricted(place, factors, rest if metric is None else rest @ metric, metric)
        others = [(labels, factors[n]) for n, labels in diagram.factors if n != name]
        ins, outs = diagram.ins, diagram.outs
        right = [((*outs, *ins), target.reshape(diagram.shape_of((*outs, *ins)))), *others]
        shared = outs if metric is not None else outs + ins
        twin = {label: label if label in shared else f"({label})" for label, _ in diagram.sizes}
        gram = others + [(tuple(twin[label] for label in labels), value) for labels, value in others]
        if metric is not None:
            both = (*ins, *(twin[label] for label in ins))
            gram.append((both, metric.reshape(diagram.shape_of(ins) * 2)))
        sizes = dict(diagram.sizes) | {twin[label]: size for label, size in diagram.sizes}
        known = {label for labels, _ in gram for label in labels}
        sides, split = tuple(x for x in split if x not in known), tuple(x for x in split if x in known)
        grams = []
        for k, operands in enumerate(_of_parts(gram, parts, split, twin)):
            used = split if k == 0 else tuple(x for x in split if any(x in labels for labels, _ in operands))
            shape, n = [sizes[x] if x in used else 1 for x in split], diagram.size(parts[k])
            wanted = (*used, *parts[k], *(twin[label] for label in parts[k]))
            grams.append(_einsum(operands, wanted, sizes, rest.device).reshape(*shape, n, n))
        labels = (*split, *sides, *(label for part in parts for label in part))
        shape = (*diagram.shape_of(split), diagram.size(sides), *map(diagram.size, parts))
        return grams, _einsum(right, labels, sizes, rest.device).reshape(shape), labels

    def polish(self, state: Factors, steps: int) -> Factors:
        """L-BFGS on every factor at once, through autograd."""
        plain = {name: value for name, value in state.items() if value.is_floating_point()}
        leaves = {
            name: value.clone(memory_format=torch.contiguous_format).requires_grad_() for name, value in plain.items()
        }
        optimizer = torch.optim.LBFGS(
            list(leaves.values()), max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_change=0.0
        )

        def closure():
            optimizer.zero_grad()
            loss = self.objective(state | leaves)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        after = state | {name: leaf.detach() for name, leaf in leaves.items()}
        return after if self.objective(after) <= self.objective(state) else state


def _solved(grams: list[Tensor], right: Tensor) -> Tensor:
    """``right (*split, m, n_1, n_2, ..)`` through the inverse of the Kronecker product of ``grams``, one axis at a time."""
    first = right.ndim - len(grams)
    for k, gram in enumerate(grams):
        turned = right.movedim(first + k, -1)
        flat = turned.reshape(*right.shape[: first - 1], -1, gram.shape[-1])
        gram = gram.expand(*right.shape[: first - 1], *gram.shape[-2:])
        right = solve_symmetric(gram, flat).reshape(turned.shape).movedim(-1, first + k)
    return right


def _of_parts(gram: list, parts: list[tuple[str, ...]], split: tuple[str, ...], twin: dict[str, str]) -> list[list]:
    """The operands of the normal equations that belong to each of ``parts``; what belongs to none goes to the first one."""
    found, rest = [], list(gram)
    for part in parts:
        reached, some = {*part, *(twin[label] for label in part)}, []
        while near := [operand for operand in rest if reached & set(operand[0])]:
            rest = [operand for operand in rest if not reached & set(operand[0])]
            reached |= {label for labels, _ in near for label in labels} - set(split)
            some += near
        found.append(some)
    found[0] += rest
    return found


def _restricted(
    place: ScatteredEinsum, factors: Factors, target: Tensor, metric: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Target and metric at the rows and columns where the placement lies."""
    rows, columns = place.index(factors, "rows"), place.index(factors, "columns")
    if rows is not None:
        target = target[rows]
    if columns is not None:
        target = target[:, columns]
        metric = None if metric is None else metric[columns][:, columns]
    return target, metric


def _einsum(operands: list, output: tuple[str, ...], sizes: dict[str, int], device: torch.device) -> Tensor:
    """A contraction of ``(labels, tensor)``; a label of the output that no operand has is filled by repetition."""
    known = {label for labels, _ in operands for label in labels}
    missing = tuple(label for label in output if label not in known)
    if missing or not operands:
        ones = torch.ones([sizes[label] for label in missing], dtype=torch.float64, device=device)
        operands = [*operands, (missing, ones)]
    plan = plan_of(tuple(labels for labels, _ in operands), output, tuple(sizes.items()))
    return run(plan, [value for _, value in operands])
