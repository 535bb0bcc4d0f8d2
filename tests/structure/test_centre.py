"""Trains that share their central core, fitted together: against NumPy, and against the alternating fit of any structure."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tenfold.structure import TensorTrain
from tenfold.structure.als import Problem
from tenfold.structure.tensor_train import clip_ranks

FIVE = ((2, 2, 3, 2, 1), (2, 1, 2, 2, 2))
THREE = ((3, 2, 2), (2, 3, 2))


def train(outs, ins, ranks=None):
    return TensorTrain(outs=outs, ins=ins, ranks=ranks or clip_ranks(outs, ins, "full"))


CASES = {
    "five cores": (train(*FIVE), "core_2"),
    "three cores": (train(*THREE), "core_1"),
    "bonds of the centre cut": (train(*THREE, (4, 3)), "core_1"),
}
each = pytest.mark.parametrize(("structure", "shared"), CASES.values(), ids=CASES)


def weights(structure, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(structure.shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def matrix(structure, factors) -> np.ndarray:
    """``W`` core by core, in NumPy."""
    whole = np.ones((1, 1, 1))
    for k in range(len(structure.outs)):
        core = factors[f"core_{k}"].numpy()
        whole = np.einsum("oir,racs->oaics", whole, core)
        whole = whole.reshape(whole.shape[0] * whole.shape[1], -1, core.shape[-1])
    return whole[..., 0]


def one_by_one(fit, shared, count):
    return [{name: value if name == shared else value[k] for name, value in fit.items()} for k in range(count)]


def lost(structure, targets, sets) -> float:
    return sum(float(np.square(matrix(structure, f) - w.numpy()).sum()) for f, w in zip(sets, targets, strict=True))


@each
def test_it_is_as_near_as_the_alternating_fit(structure, shared):
    targets = weights(structure)
    fit = structure.fit(targets, shared=(shared,), sweeps=100, tolerance=1e-7)
    sets = one_by_one(fit, shared, 4)
    assert {name: tuple(value.shape) for name, value in sets[0].items()} == structure.factor_shapes()
    problem = Problem(structure, targets, [None] * 4, [None] * 4, (shared,))
    (begin,) = problem.initial_states(None, 1, 0)
    general = problem.alternate(begin, 40, 1e-4)[0]
    assert lost(structure, targets, sets) <= float(problem.objective(general)) * 1.1  # both end in local minima


@each
def test_more_rounds_never_lose_more(structure, shared):
    targets = weights(structure)
    errors = [
        lost(
            structure, targets, one_by_one(structure.fit(targets, shared=(shared,), sweeps=n, tolerance=0.0), shared, 4)
        )
        for n in (1, 2, 5, 20)
    ]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    assert errors[-1] < sum(float(w.square().sum()) for w in targets)


def test_matrices_that_are_alike_lose_nothing():
    structure = train(*FIVE)
    target = weights(structure, 1)[0]
    fit = structure.fit([target, -2 * target, target], shared=("core_2",))
    for factors, size in zip(one_by_one(fit, "core_2", 3), (1, -2, 1), strict=True):
        np.testing.assert_allclose(matrix(structure, factors), size * target.numpy(), atol=1e-8)


def test_a_matrix_of_zeros_among_them():
    structure = train(*THREE)
    targets = [*weights(structure, 2), torch.zeros(structure.shape, dtype=torch.float64)]
    fit = structure.fit(targets, shared=("core_1",), sweeps=50)
    assert all(torch.isfinite(value).all() for value in fit.values())
    assert np.abs(matrix(structure, one_by_one(fit, "core_1", 3)[2])).max() < 1e-8


@pytest.mark.parametrize(
    ("structure", "shared"),
    [(train(*THREE), ("core_0",)), (train(*FIVE, (3, 5, 4, 2)), ("core_2",)), (train(*FIVE), ("core_2", "core_1"))],
)
def test_other_trains_are_left_to_the_alternating_fit(structure, shared):
    targets = weights(structure, 2)
    assert structure.shared_form(targets, shared, 20, 1e-4) is None
    fit = structure.fit(targets, shared=shared, sweeps=5)
    assert fit[shared[0]].ndim == 4
