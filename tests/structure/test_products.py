"""Products of few rows: the same numbers as NumPy's, however the operands lie, and in parts where that is meant."""

from itertools import product as every

import numpy as np
import pytest
import torch

from tenfold.structure import products
from tenfold.structure.pair import lies_of, multiply, pair_of

CASES = list(every([1, 2, 7, 32, 33], [1, 3, 64, 150, 151], [False, True]))


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch):
    monkeypatch.setattr(products, "PARTED", 1)


@pytest.fixture
def parted(monkeypatch) -> list:
    """The products that are made in parts from now on."""
    found, bmm, baddbmm = [], torch.bmm, torch.baddbmm
    monkeypatch.setattr(torch, "bmm", lambda *given: found.append(given) or bmm(*given))
    monkeypatch.setattr(torch, "baddbmm", lambda *given: found.append(given) or baddbmm(*given))
    return found


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(ours: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "out", "bias"), CASES)
def test_a_linear_map_of_few_rows(rows, out, bias, threads, monkeypatch, parted):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight, b = drawn(rows, 160), drawn(out, 160), drawn(out)
    expected = x.double().numpy() @ weight.double().numpy().T + (b.double().numpy() if bias else 0)
    with torch.no_grad():
        for lies in (weight, weight.T.contiguous().T, drawn(out, 200).copy_(drawn(out, 200))[:, :160].copy_(weight)):
            close(products.linear(x, lies, b if bias else None), expected)
        close(products.linear(x[:, None], weight, b if bias else None), expected[:, None])
        if rows == 1:
            close(products.linear(x[0], weight, b if bias else None), expected[0])
    assert bool(parted) == (rows <= 32)


@pytest.mark.parametrize(("rows", "columns", "bias"), CASES)
def test_a_product_of_few_rows(rows, columns, bias, parted):
    one, other, b = drawn(rows, 160), drawn(160, columns), drawn(columns)
    expected = one.double().numpy() @ other.double().numpy() + (b.double().numpy() if bias else 0)
    with torch.no_grad():
        for lies in (other, other.T.contiguous().T):
            close(products.product(one, lies, b if bias else None), expected)
            close(products.product(one.T.contiguous().T, lies, b if bias else None), expected)
    assert bool(parted) == (rows <= 32)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("add", [False, True])
def test_a_batch_of_few_rows_goes_where_it_belongs(count, rows, add):
    a, b, start = drawn(count, rows, 96), drawn(count, 96, 40), drawn(count, rows, 40)
    expected = np.matmul(a.double().numpy(), b.double().numpy()) + (start.double().numpy() if add else 0)
    with torch.no_grad():
        for right in (b, b.mT.contiguous().mT):
            for made in (start.clone(), start.mT.clone().mT, start.movedim(0, 1).clone().movedim(1, 0)):
                products.fill(made, a, right, add)
                close(made, expected)
                turned = start.mT.clone()
                products.fill(turned, right.mT, a.mT, add)
                close(turned.mT, expected)
                made.copy_(start)


def test_what_has_gradients_or_another_type_is_left_to_the_library(parted):
    x, weight = drawn(2, 160), drawn(64, 160)
    products.linear(x, weight)
    with torch.no_grad():
        products.linear(x.double(), weight.double())
        with torch.autocast("cpu", torch.bfloat16):
            products.linear(x, weight)
        assert not parted
        products.linear(x, weight)
    assert parted


def test_a_weight_that_is_more_than_a_tensor_is_left_to_it(parted):
    class Quantised(torch.Tensor):
        pass

    with torch.no_grad():
        products.linear(drawn(2, 160), drawn(64, 160).as_subclass(Quantised))
        assert not parted
        products.linear(drawn(2, 160), torch.nn.Parameter(drawn(64, 160)))
    assert parted


@pytest.mark.parametrize("bias", [False, True])
def test_results_lie_as_those_of_the_library(bias):
    """Code of models takes views of them."""
    x, weight, b = drawn(2, 3, 160), drawn(64, 160), drawn(64)
    with torch.no_grad():
        for lies in (weight, weight.T.contiguous().T):
            assert products.linear(x, lies, b if bias else None).is_contiguous()


def test_a_result_as_large_as_the_matrix_is_left_to_the_library(parted):
    with torch.no_grad():
        products.product(drawn(30, 64), drawn(64, 500))
        assert not parted
        products.product(drawn(16, 64), drawn(64, 500))
    assert parted


def test_few_rows_copy_a_little_x_rather_than_the_factor():
    """``right (c b d r)`` as it lies, ``x (f c d)`` once for every ``b``, while that is little."""
    size = {"c": 64, "b": 24, "d": 48, "e": 9, "f": 1}
    equation, factor = "cbde,fcd->fcbe", 64 * 24 * 48 * 9
    assert lies_of(equation, ["cbde", "fcd"], size, True)[1] == 24 * 64 * 48
    assert lies_of(equation, ["cbde", "fcd"], size | {"f": 32}, True)[1] == factor
    with torch.no_grad():
        right, x = drawn(64, 24, 48, 9), drawn(1, 64, 48)
        made = multiply(pair_of(equation), right, x, between=True)
    np.testing.assert_allclose(made.numpy(), np.einsum(equation, right.numpy(), x.numpy()), rtol=0, atol=1e-3)
