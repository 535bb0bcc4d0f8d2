"""Many rows through a diagram between index maps: the same as through its dense matrix, and nothing but x and factors is kept."""

from itertools import product

import numpy as np
import oracle
import pytest
import torch
from cases import COMBINED, each, factors_of
from test_laws import gradients, parameters, second

from tenfold.structure import contract, mapped
from tenfold.structure.hold import Hold

MAPPED = {name: structure for name, structure in COMBINED.items() if structure.index_shapes()}


@pytest.fixture(autouse=True, params=["chain", "rebuilt"])
def many(request, monkeypatch):
    """Six rows are many, and go in parts of four; W is made, or never made."""
    monkeypatch.setattr(mapped, "FEWEST", 6)
    monkeypatch.setattr(mapped, "PART", 4)
    monkeypatch.setattr(contract, "cheaper", lambda *given: request.param == "chain")
    contract.forward_plans.cache_clear()
    yield request.param
    contract.forward_plans.cache_clear()


@pytest.fixture
def used(monkeypatch):
    """How often rows went this way."""
    calls, forward = [], mapped._forward
    monkeypatch.setattr(mapped, "_forward", lambda *given: calls.append(given) or forward(*given))
    return calls


@each(MAPPED)
@pytest.mark.parametrize("seed", [0, 1, 2])  # some permutations are their own inverse
def test_products_and_gradients_are_those_of_the_dense_matrix(structure, seed):
    factors, x = factors_of(structure, seed), torch.randn(6, structure.shape[1], dtype=torch.float64)
    matrix, bias = torch.from_numpy(oracle.matrix(structure, factors)), torch.randn(structure.shape[0]).double()
    with torch.no_grad():
        torch.testing.assert_close(structure._apply(factors, x, bias), x @ matrix.T + bias)
        np.testing.assert_allclose(structure.dense(factors), matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(structure._apply(factors, x, bias), x @ matrix.T + bias)
    expected = gradients(lambda f, x: x @ structure.dense(f).T, x, factors)
    for keeps in (None, {}):
        ours = gradients(lambda f, x, keeps=keeps: structure._apply(f, x, None, Hold(keeps)), x, factors)
        for got, one in zip(ours, expected, strict=True):
            torch.testing.assert_close(got, one)


@each(MAPPED)
def test_gradients_have_gradients(structure):
    factors, x = factors_of(structure), torch.randn(6, structure.shape[1], dtype=torch.float64)
    expected = second(lambda f, x: x @ structure.dense(f).T, x, factors)
    for got, one in zip(second(structure._apply, x, factors), expected, strict=True):
        torch.testing.assert_close(got, one)


@pytest.mark.parametrize("name", ["placed-permutation", "placed-columns"])
def test_nothing_but_the_input_and_the_factors_is_kept(name, used):
    structure, kept = MAPPED[name], []
    factors = factors_of(structure)
    leaves = {k: v.requires_grad_() for k, v in parameters(factors).items()}
    x = torch.randn(6, structure.shape[1], dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        structure.apply(factors | leaves, x)
    if used:  # a part of the columns is copied where W would be larger than the diagram
        floating = [value for value in kept if value.is_floating_point()]
        storages = {v.untyped_storage().data_ptr() for v in (x, *leaves.values())}
        assert {v.untyped_storage().data_ptr() for v in floating} <= storages
    assert bool(used) == (name == "placed-permutation" or contract.is_chain(structure._placements[0].diagram, x))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=4))[1:])
def test_only_gradients_asked_for_are_made(wanted, used):
    structure = MAPPED["placed-permutation"]
    factors, of_x, of_bias, *of_factors = factors_of(structure), *wanted
    x = torch.randn(6, structure.shape[1], dtype=torch.float64, requires_grad=of_x)
    bias = torch.randn(structure.shape[0], dtype=torch.float64, requires_grad=of_bias)
    leaves = {
        name: value.clone().requires_grad_(need)
        for (name, value), need in zip(parameters(factors).items(), of_factors, strict=True)
    }
    asked = [value for value in (x, bias, *leaves.values()) if value.requires_grad]
    found = torch.autograd.grad(structure._apply(factors | leaves, x, bias).square().sum(), asked)
    expected = torch.autograd.grad((x @ structure.dense(factors | leaves).T + bias).square().sum(), asked)
    assert used
    for got, one in zip(found, expected, strict=True):
        torch.testing.assert_close(got, one)


def test_few_rows_and_autocast_go_the_plain_way(used):
    structure = MAPPED["placed-permutation"]
    factors = {k: v.float() if v.is_floating_point() else v for k, v in factors_of(structure).items()}
    structure.apply(factors, torch.randn(5, structure.shape[1]))
    with torch.autocast("cpu", torch.bfloat16):
        assert structure.apply(factors, torch.randn(6, structure.shape[1])).dtype == torch.bfloat16
    assert not used
    structure.apply(factors, torch.randn(6, structure.shape[1]))
    assert used
