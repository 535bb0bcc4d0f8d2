"""Laws of every structure: all ways to its matrix agree with the matrix of its definition, and so do the gradients."""

from itertools import product

import numpy as np
import oracle
import pytest
import torch
from cases import ALL, COMBINED, FAMILIES, each, factors_of, member

from tenfold.structure import (
    Structure,
    matmul,
)
from tenfold.structure.cost_model import CPU

F64 = torch.float64
LEADS = [(), (5,), (2, 3), (1,), (40,), (300,), (1100,), (0,)]  # 1, 40, 300 and 1,100 rows have plans of their own


def parameters(factors):
    """The factors that are learned, in their order; index maps left out."""
    return {name: value for name, value in factors.items() if value.is_floating_point()}


def gradients(function, x, factors):
    """Those of a random linear functional of ``function(factors, x)``, by ``x`` and by every factor."""
    x = x.clone().requires_grad_()
    leaves = {name: value.clone().requires_grad_() for name, value in parameters(factors).items()}
    y = function(factors | leaves, x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=F64)
    return torch.autograd.grad((y * weight).sum(), [x, *leaves.values()])


def second(function, x, factors):
    """What a penalty on the gradients of a cubic functional of ``function(factors, x)`` gives ``x`` and every factor."""
    x = x.clone().requires_grad_()
    leaves = {name: value.clone().requires_grad_() for name, value in parameters(factors).items()}
    of = [x, *leaves.values()]
    once = torch.autograd.grad(function(factors | leaves, x).pow(3).sum(), of, create_graph=True)
    return torch.autograd.grad(sum(value.square().sum() for value in once), of)


# the matrix -------------------------------------------------------------------------------------------------------


@each(ALL)
def test_dense_is_the_definition(structure):
    factors = factors_of(structure)
    expected = oracle.matrix(structure, factors)
    assert structure.shape == expected.shape
    np.testing.assert_allclose(structure.dense(factors), expected, rtol=1e-12, atol=1e-12)


@each(ALL)
def test_apply_multiplies_by_the_transpose(structure):
    factors = factors_of(structure)
    expected = torch.from_numpy(oracle.matrix(structure, factors)).T
    for lead in LEADS:
        x = torch.randn(*lead, structure.shape[1], dtype=F64)
        torch.testing.assert_close(structure.apply(factors, x), x @ expected)


@each(ALL)
def test_rows_are_looked_up(structure):
    factors = factors_of(structure)
    expected, out = torch.from_numpy(oracle.matrix(structure, factors)), structure.shape[0]
    for index in (range(out), [[out - 1, 0], [0, out - 1]], 0, []):
        index = torch.tensor(index, dtype=torch.long)
        torch.testing.assert_close(structure.rows(factors, index), expected[index])


@each(ALL)
def test_rows_are_looked_up_in_forward_mode(structure):
    factors, index = factors_of(structure), torch.arange(structure.shape[0]).flip(0)
    expected = torch.from_numpy(oracle.matrix(structure, factors))[index]
    maps = {name: value for name, value in factors.items() if not value.is_floating_point()}
    learned = parameters(factors)
    rows, change = torch.func.jvp(lambda some: structure.rows(maps | some, index), (learned,), (learned,))
    torch.testing.assert_close(rows, expected)
    by = [
        torch.func.jvp(lambda one, n=n: structure.rows(factors | {n: one}, index), (v,), (v,))[1]
        for n, v in learned.items()
    ]
    torch.testing.assert_close(change, sum(by))


@each(ALL)
def test_rows_that_do_not_exist_are_refused(structure):
    for number in (structure.shape[0], -1):
        with pytest.raises(IndexError):
            structure.rows(factors_of(structure), torch.tensor([number]))


# gradients --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["chain", "dense"])
def way(request, monkeypatch):
    """Every product through the factors, or through ``W``, forward and backward; a few rows at a time."""
    through = request.param == "chain"
    monkeypatch.setattr(
        matmul, "_choose_plan", lambda spec, rows, kind: matmul.plan_chain(spec, rows, CPU) if through else None
    )
    monkeypatch.setattr(matmul, "_back_through_chain", lambda *given: through)
    for name, number in (("MAX_ROWS", 3), ("MIN_ROWS", 1)):
        monkeypatch.setattr(matmul, name, number)
    return request.param


@each(ALL)
@pytest.mark.parametrize("rows", [1, 8])
def test_all_ways_agree(structure, rows, way):
    factors, x = factors_of(structure), torch.randn(rows, structure.shape[1], dtype=F64)
    w, bias = torch.from_numpy(oracle.matrix(structure, factors)), torch.randn(structure.shape[0], dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(structure._apply(factors, x, bias), x @ w.T + bias)
    expected = gradients(lambda f, x: x @ structure.dense(f).T, x, factors)
    for got, one in zip(gradients(structure.apply, x, factors), expected, strict=True):
        torch.testing.assert_close(got, one)


@each(ALL)
@pytest.mark.parametrize("rows", [2, 300])
def test_gradients_have_gradients(structure, rows):
    factors, x = factors_of(structure), torch.randn(rows, structure.shape[1], dtype=F64)
    expected = second(lambda f, x: x @ structure.dense(f).T, x, factors)
    for got, one in zip(second(structure.apply, x, factors), expected, strict=True):
        torch.testing.assert_close(got, one)


@pytest.mark.parametrize("name", ["kronecker-scaled", "tensor_train-three", "placed-nested", "stacked", "diagram-0"])
def test_gradients_are_those_of_finite_differences(name, way):
    structure, factors = ALL[name], factors_of(ALL[name])
    learned = parameters(factors)

    def apply(x, *values):
        return structure.apply(factors | dict(zip(learned, values, strict=True)), x)

    inputs = [torch.randn(2, structure.shape[1], dtype=F64), *learned.values()]
    assert torch.autograd.gradcheck(apply, [value.clone().requires_grad_() for value in inputs])


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("name", ["low_rank", "tensor_train", "row_train"])
def test_only_gradients_asked_for_are_made(name, wanted, way):
    structure = FAMILIES[name]
    wanted = [*wanted, *wanted][: 1 + len(structure.factor_shapes())]
    factors, x = factors_of(structure), torch.randn(3, structure.shape[1], dtype=F64)
    expected = gradients(lambda f, x: x @ structure.dense(f).T, x, factors)
    inputs = [value.clone().requires_grad_(need) for value, need in zip((x, *factors.values()), wanted, strict=True)]
    y = structure.apply(dict(zip(factors, inputs[1:], strict=True)), inputs[0])
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=F64))
    for value, gradient in zip(inputs, expected, strict=True):
        assert value.requires_grad == (value.grad is not None)
        if value.requires_grad:
            torch.testing.assert_close(value.grad, gradient)


@each(ALL)
def test_gradients_of_rows(structure):
    factors, index = factors_of(structure), torch.arange(structure.shape[0]).repeat(2)
    x = torch.zeros(1, dtype=F64)  # takes no part
    ours = gradients(lambda f, x: structure.rows(f, index) + x, x, factors)
    dense = gradients(lambda f, x: structure.dense(f)[index] + x, x, factors)
    for got, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(got, expected)


# integers ---------------------------------------------------------------------------------------------------------


@each(ALL)
def test_numel_counts_what_is_learned(structure):
    factors = factors_of(structure)
    learned = parameters(factors)
    assert structure.numel == sum(value.numel() for value in learned.values())
    assert {name: tuple(value.shape) for name, value in learned.items()} == structure.factor_shapes()
    maps = {name: tuple(value.shape) for name, value in factors.items() if name not in learned}
    assert maps == structure.index_shapes()


@each(COMBINED)
def test_index_maps_are_injective(structure):
    factors = factors_of(structure)
    for name in structure.index_shapes():
        assert factors[name].dtype == torch.int32
        assert len(factors[name].unique()) == len(factors[name])


# refusals ---------------------------------------------------------------------------------------------------------


@each(ALL)
def test_wrong_arguments_are_named(structure: Structure):
    factors = factors_of(structure)
    with pytest.raises(ValueError, match=f"{structure.shape[1] + 1} columns"):
        structure.apply(factors, torch.zeros(2, structure.shape[1] + 1, dtype=F64))
    name = next(iter(factors))
    with pytest.raises(ValueError, match=f"{name}.*is missing"):
        structure.dense({other: value for other, value in factors.items() if other != name})
    with pytest.raises(ValueError, match=rf"{name}.*\(77,\)"):
        structure.rows(factors | {name: torch.zeros(77)}, torch.tensor([0]))


@each({"low_rank": FAMILIES["low_rank"], "placed": COMBINED["placed"]})
def test_factors_are_left_as_they_are(structure):
    factors = factors_of(structure)
    before = {name: value.clone() for name, value in factors.items()}
    structure.apply(factors, torch.randn(3, structure.shape[1], dtype=F64))
    structure.fit(member(structure))
    assert all(torch.equal(value, before[name]) for name, value in factors.items())
