"""The iterative fit: every step is the exact minimiser of one factor, so the objective never grows."""

from itertools import pairwise

import numpy as np
import pytest
import tensorly.decomposition
import torch
from cases import ALL, COMBINED, DIAGRAMS, FAMILIES, each, factors_of, member

from tenfold.structure import CP, Blast, Kronecker, LowRank, Sum, Tucker
from tenfold.structure import als as fitting

F64 = torch.float64
MANY = [name for name, s in ALL.items() if not s.optimal and s.kind not in ("tensor_train", "row_train", "tucker")]


def weight(structure, seed: int = 3) -> torch.Tensor:
    return torch.randn(structure.shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def metric_of(structure, seed: int = 5) -> torch.Tensor:
    """The second moment of correlated inputs."""
    inner = structure.shape[1]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inner, inner, dtype=F64, generator=generator)
    x = x @ torch.randn(inner, inner, dtype=F64, generator=generator)
    return x.T @ x / len(x)


def objective(structure, w, factors, metric=None) -> torch.Tensor:
    rest = w - structure.dense(factors)
    return (rest * (rest if metric is None else rest @ metric)).sum()


def learned(structure, factors):
    return {name: factors[name] for name in structure.factor_shapes()}


def slopes(structure, factors, function) -> dict[str, torch.Tensor]:
    """The gradient of ``function(factors)`` by every factor."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in learned(structure, factors).items()}
    return dict(zip(leaves, torch.autograd.grad(function(factors | leaves), list(leaves.values())), strict=True))


# one step ---------------------------------------------------------------------------------------------------------


@each(ALL)
@pytest.mark.parametrize("moments", [False, True])
def test_a_step_is_the_exact_minimiser_of_its_factor(structure, moments):
    """So the gradient by this factor is zero after it."""
    metrics = [metric_of(structure) if moments else None]
    problem = fitting.Problem(structure, [weight(structure)], metrics, [None], ())
    state = problem.initial_state(factors_of(structure))
    for einsum in problem.einsums:
        for name in einsum.spec.names:
            after = state | {name: problem.solve_factor(state, einsum, name)}
            slope = slopes(structure, after, problem.objective)[name]
            assert slope.abs().max() <= 1e-8 * slopes(structure, state, problem.objective)[name].abs().max() + 1e-8


def test_the_system_of_a_tucker_core_is_split():
    structure = FAMILIES["tucker-four"]
    problem = fitting.Problem(structure, [weight(structure)], [None], [None], ())
    assert len(problem.coupled_labels(problem.einsums[0].spec, "core")) > 1


SHARING = ("low_rank", "kronecker-three-scaled", "tensor_train-three", "blast", "tucker-four")


@each({name: FAMILIES[name] for name in SHARING})
@pytest.mark.parametrize("moments", [(False, False), (True, True), (True, False)])
def test_a_step_on_a_shared_factor_is_exact_for_all_matrices_together(structure, moments):
    metrics = [metric_of(structure, s) if given else None for s, given in enumerate(moments)]
    for shared in structure.factor_shapes():
        problem = fitting.Problem(
            structure, [weight(structure, 3), weight(structure, 4)], metrics, [None] * 2, (shared,)
        )
        state = problem.initial_state(factors_of(structure))
        for einsum in problem.einsums:
            after = state | {shared: problem.solve_factor(state, einsum, shared)}
            assert len(after[shared]) == 1
            assert slopes(structure, after, problem.objective)[shared].abs().max() < 1e-8


# the whole fit ----------------------------------------------------------------------------------------------------


@each(ALL)
@pytest.mark.parametrize("moments", [False, True])
def test_more_sweeps_are_never_worse(structure, moments):
    w, metric, start = weight(structure), metric_of(structure) if moments else None, factors_of(structure)
    fits = [start] + [structure.fit(w, metric, start=start, sweeps=n, tolerance=0.0) for n in (1, 2, 4, 8)]
    values = [float(objective(structure, w, factors, metric)) for factors in fits]
    assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in pairwise(values))


@each(ALL)
def test_the_result_fits_the_structure(structure):
    """The factors have their shapes, also where the weight is float32 or belongs to a layer."""
    parameter = torch.nn.Parameter(torch.randn(structure.shape))
    factors = structure.fit(parameter, sweeps=2)
    structure.check_factors(factors)
    assert factors.keys() == factors_of(structure).keys()
    assert all(value.dtype in (F64, torch.int32) and not value.requires_grad for value in factors.values())


@each(DIAGRAMS | {name: FAMILIES[name] for name in ("blast", "cp", "tucker-four", "written")})
def test_the_fit_ends_where_the_slope_is_small(structure):
    """Not so for three Kronecker factors, where there may be no nearest member and the factors grow without end."""
    w = weight(structure)
    factors = structure.fit(w, sweeps=1000, tolerance=1e-10)
    slope = slopes(structure, factors, lambda f: objective(structure, w, f))
    worst = max(float((slope[name] * factors[name]).abs().sum()) for name in slope)
    assert worst <= 1e-3 * float(w.square().sum())


@each({name: ALL[name] for name in MANY})
def test_a_member_is_found_again(structure):
    """Not every start leads there, so a few are tried; index maps are given."""
    w, known = member(structure), factors_of(structure, 1)
    maps = {name: known[name] for name in structure.index_shapes()}
    starts = [None, *(factors_of(structure, seed) | maps for seed in range(5, 11))]
    for start in starts[bool(maps) :]:
        factors = structure.fit(w, start=start, sweeps=300, tolerance=1e-8)
        if (w - structure.dense(factors)).norm() < 1e-2 * w.norm():
            return
    pytest.fail("no start led to the member")


def test_cp_is_no_worse_than_tensorly():
    cp = CP(outs=(4, 3), ins=(5,), rank=3)
    w = weight(cp)
    tensor = w.numpy().reshape(4, 3, 5)
    settings = {"n_iter_max": 200, "init": "random", "tol": 1e-8}
    theirs = [tensorly.decomposition.parafac(tensor, 3, random_state=seed, **settings).to_tensor() for seed in range(2)]
    ours = objective(cp, w, cp.fit(w, starts=4, sweeps=200))
    assert ours <= 1.01 * min(((tensor - one) ** 2).sum() for one in theirs)


def test_more_starts_are_never_worse():
    blast = Blast(outs=(2, 3), ins=(3, 2), rank=2)
    w = weight(blast)
    values = [float(objective(blast, w, blast.fit(w, starts=n, sweeps=30))) for n in (1, 2, 4)]
    assert values == sorted(values, reverse=True)


def test_systems_that_are_too_large_are_left_to_lbfgs(monkeypatch):
    tucker = Tucker(outs=(4, 3), ins=(5,), ranks=(2, 2, 2))
    w, start, metric = weight(tucker), factors_of(tucker), metric_of(tucker)
    best = float(objective(tucker, w, tucker.fit(w, metric), metric))
    for largest in (0, 7):  # none is solved, or all but the core
        monkeypatch.setattr(fitting, "LARGEST_SYSTEM", largest)
        factors = tucker.fit(torch.nn.Parameter(w), metric, start=start, sweeps=200)
        assert not any(value.requires_grad for value in factors.values())
        assert float(objective(tucker, w, factors, metric)) <= 1.05 * best


# metrics ----------------------------------------------------------------------------------------------------------


@each(ALL)
def test_a_fit_in_the_metric_is_no_worse_in_it(structure):
    w, metric = weight(structure), metric_of(structure)
    in_frobenius, in_metric = structure.fit(w, sweeps=20), structure.fit(w, metric, sweeps=20)
    ours, theirs = objective(structure, w, in_metric, metric), objective(structure, w, in_frobenius, metric)
    again = objective(structure, w, structure.fit(w, metric, start=in_frobenius, sweeps=20), metric)
    assert again <= theirs * (1 + 1e-9) + 1e-9
    near = objective(structure, w, structure.fit(w, tolerance=1e-6), metric)  # where the fit in the metric starts
    assert ours <= near * (1 + 1e-9) + 1e-9
    few = objective(structure, w, structure.fit(w, metric, sweeps=1), metric)
    assert few <= objective(structure, w, structure.fit(w, tolerance=1e-6, sweeps=40), metric) * (1 + 1e-9) + 1e-9


@each({name: FAMILIES[name] for name in ("low_rank", "blast", "tucker-four")} | {"sum": COMBINED["sum"]})
def test_the_identity_is_the_frobenius_norm(structure):
    w, start = weight(structure), factors_of(structure)
    eye = torch.eye(structure.shape[1], dtype=F64)
    plain, metric = (structure.dense(structure.fit(w, m, start=start, sweeps=3)) for m in (None, eye))
    torch.testing.assert_close(plain, metric)


# joint fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared, axis", [("right", 0), ("left", 1)])
@pytest.mark.parametrize("opposite", [False, True])
def test_low_rank_with_a_shared_factor_is_the_svd_of_the_stacked_matrices(shared, axis, opposite):
    low = LowRank(out_features=5, in_features=7, rank=3)
    pair = [weight(low, 3), weight(low, 4)]
    several = [pair[0], -pair[0]] if opposite else pair
    factors = low.fit(several, shared=[shared], sweeps=2000, tolerance=1e-12)
    assert factors[shared].ndim == 2
    slices = [{name: value if name == shared else value[s] for name, value in factors.items()} for s in range(2)]
    total = sum(float(objective(low, w, own)) for w, own in zip(several, slices, strict=True))
    values = np.linalg.svd(np.concatenate(several, axis), compute_uv=False)
    assert total == pytest.approx((values[3:] ** 2).sum(), rel=1e-6)


def test_matrices_that_share_factors_are_found_again():
    kronecker = Kronecker(outs=(2, 3), ins=(3, 2), terms=2)
    one, other = factors_of(kronecker, 1), factors_of(kronecker, 2)
    several = [kronecker.dense(one), kronecker.dense(other | {"inner": one["inner"]})]
    factors = kronecker.fit(several, shared=["inner"], sweeps=500)
    for s, w in enumerate(several):
        found = kronecker.dense({"outer": factors["outer"][s], "inner": factors["inner"]})
        assert (w - found).norm() < 1e-3 * w.norm()


# refusals ---------------------------------------------------------------------------------------------------------

LOW = LowRank(out_features=4, in_features=6, rank=2)
W, NAN = torch.ones(4, 6), torch.full((4, 6), float("nan"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"weights": torch.ones(6, 4)}, r"\(6, 4\).*\(4, 6\)"),
        ({"weights": NAN}, "24 of the 24 entries of the weight"),
        ({"weights": torch.full((4, 6), float("inf"))}, "24 of the 24"),
        ({"weights": W, "metrics": torch.eye(4)}, r"metric.*\(4, 4\).*\(6, 6\)"),
        ({"weights": W, "metrics": NAN[:1] * torch.eye(6)}, "36 of the 36 entries of the metric"),
        ({"weights": [W, W], "metrics": [torch.eye(6)]}, "2 metrics, not 1"),
        ({"weights": W, "row_metrics": torch.eye(6)}, r"row metric.*\(6, 6\).*\(4, 4\)"),
        ({"weights": W, "row_metrics": NAN[:, :4]}, "16 of the 16 entries of the row metric"),
        ({"weights": [W, W], "row_metrics": [torch.eye(4)]}, "2 row metrics, not 1"),
        ({"weights": [W, NAN]}, "24 of the 24"),
        ({"weights": [W, W], "shared": ["middle"]}, "'middle'.*left"),
        ({"weights": W, "start": {"left": torch.ones(4, 2)}}, "'right' is missing"),
        ({"weights": W, "start": {"left": torch.ones(4, 2), "right": torch.ones(3, 6)}}, r"\(3, 6\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        LOW.fit(**arguments)


def test_a_sum_with_an_adapter_is_fitted_after_the_base():
    """Greedy: the second part takes what the first leaves, then both alternate."""
    both = Sum(parts=(Kronecker(outs=(2, 2), ins=(3, 2)), LOW))
    w = weight(both)
    alone = both.parts[0]
    assert objective(both, w, both.fit(w)) < objective(alone, w, alone.fit(w))
