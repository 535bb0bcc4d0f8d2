"""Products that are added where the first one lies: the same numbers, nothing more is kept, and no second result is held."""

import oracle
import pytest
import torch
from cases import ALL, each, factors_of
from test_laws import gradients, parameters, second

from tenfold.evaluate.machine import peak
from tenfold.structure import CP, BlockTrain, Dense, LowRank, Sum, TensorTrain, added, contract, joint, rebuild
from tenfold.structure.hold import Hold

SUMS = {name: one for name, one in ALL.items() if any(len(some) > 1 for *_, some in one._blocks or ())}
WHOLE = {name: one for name, one in SUMS.items() if not any(place.columns for place in one.normal_form())}
F64 = torch.float64


@pytest.fixture
def often(monkeypatch):
    """How many terms were added at once; one matrix is made of none, and a part has as many rows as a test wants."""
    calls, apply = [], added._Added.apply
    monkeypatch.setattr(added, "MANY", 1)
    monkeypatch.setattr(joint, "_pays", lambda *given: False)
    monkeypatch.setattr(added._Added, "apply", lambda *given: calls.append(len(given[0])) or apply(*given))
    return calls


@each(WHOLE)
@pytest.mark.parametrize("little", [False, True])
@pytest.mark.parametrize(("rows", "part"), [(6, 512), (40, 7), (300, 64)])
def test_products_and_gradients_are_those_of_the_dense_matrix(structure, little, rows, part, often, monkeypatch):
    monkeypatch.setattr(contract, "PART", part)
    monkeypatch.setattr(contract, "LEAST", 3)
    factors, x = factors_of(structure), torch.randn(rows, structure.shape[1], dtype=F64)
    matrix, bias = torch.from_numpy(oracle.matrix(structure, factors)), torch.randn(structure.shape[0]).double()
    with torch.no_grad():
        torch.testing.assert_close(structure._apply(factors, x, bias, Hold(little=little)), x @ matrix.T + bias)
    torch.testing.assert_close(structure._apply(factors, x, bias, Hold(little=little)), x @ matrix.T + bias)
    ours = gradients(lambda f, x: structure._apply(f, x, None, Hold(little=little)), x, factors)
    for got, one in zip(ours, gradients(lambda f, x: x @ structure.dense(f).T, x, factors), strict=True):
        torch.testing.assert_close(got, one)
    assert often and min(often) > 1


@each(WHOLE)
def test_each_may_go_through_its_matrix(structure, often, monkeypatch):
    """Whole, and in parts of its rows."""
    monkeypatch.setattr(contract, "_through_dense", lambda *given: True)
    monkeypatch.setattr(contract, "cheaper", lambda *given: False)
    factors, x = factors_of(structure), torch.randn(6, structure.shape[1], dtype=F64)
    expected = gradients(lambda f, x: x @ structure.dense(f).T, x, factors)
    for part in (rebuild.PART, 1):
        monkeypatch.setattr(rebuild, "PART", part)
        for known in (contract.forward_plans, rebuild._cut):
            known.cache_clear()
        for got, one in zip(gradients(structure.apply, x, factors), expected, strict=True):
            torch.testing.assert_close(got, one)
        torch.testing.assert_close(structure.apply(factors, x), x @ structure.dense(factors).T)
    for known in (contract.forward_plans, rebuild._cut):
        known.cache_clear()
    assert often


@each(WHOLE)
def test_gradients_have_gradients(structure, often):
    factors, x = factors_of(structure), torch.randn(6, structure.shape[1], dtype=F64)
    expected = second(lambda f, x: x @ structure.dense(f).T, x, factors)
    for got, one in zip(second(structure.apply, x, factors), expected, strict=True):
        torch.testing.assert_close(got, one)
    assert often


@each(WHOLE)
def test_x_and_the_factors_are_all_that_is_kept(structure, often):
    factors, x, kept = factors_of(structure), torch.randn(6, structure.shape[1], dtype=F64), []
    leaves = {name: value.requires_grad_() for name, value in parameters(factors).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        structure._apply(factors | leaves, x)
    own = {value.untyped_storage().data_ptr() for value in (x, *factors.values())}
    assert often and {value.untyped_storage().data_ptr() for value in kept} <= own


def test_only_gradients_asked_for_are_made(often):
    structure = next(iter(WHOLE.values()))
    factors, x = factors_of(structure), torch.randn(6, structure.shape[1], dtype=F64)
    for name in parameters(factors):
        others = {key: value.detach() for key, value in factors.items()}
        leaf = others[name].requires_grad_()
        structure._apply(others, x).sum().backward()
        expected = torch.autograd.grad((x @ structure.dense(others).T).sum(), leaf)[0]
        torch.testing.assert_close(leaf.grad, expected)
    assert often


@pytest.mark.parametrize("other", ["low_rank", "dense"])
@pytest.mark.parametrize("shape", [(384, 96), (96, 384)])
def test_no_second_result_is_held(other, shape, often):
    """Of 4,096 rows of the wider side: what a pass holds is one result, one gradient of the input, and little else."""
    out, inner = shape
    one = BlockTrain(outs=(out // 8, 8), ins=(8, inner // 8), rank=2)
    rest = {
        "low_rank": LowRank(out_features=out, in_features=inner, rank=8),
        "dense": Dense(out_features=out, in_features=inner),
    }
    structure = Sum(parts=(one, rest[other]))
    factors = {name: value.requires_grad_() for name, value in structure.init(0.1).items()}
    x, upstream = torch.randn(4096, inner, requires_grad=True), torch.randn(4096, out)

    def run() -> None:
        structure._apply(factors, x, None, Hold(little=True)).backward(upstream)

    run()
    for value in (x, *factors.values()):
        value.grad = None
    assert peak(run, x.device) < 4 * (4096 * (out + inner) + 8 * out * inner)


@pytest.mark.parametrize("rows", [300, 4096])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_long_rank_makes_no_large_products_of_factors(rows, parts):
    """Neither for a chain nor for ``W``, nor on the way back."""
    out, inner = 768, 384
    structure = CP.within(out, inner, {"kind": "cp", "parts": parts}, out * inner)
    factors = {name: value.requires_grad_() for name, value in structure.init(0.1).items()}
    x = torch.randn(rows, inner, requires_grad=True)

    def run() -> None:
        structure._apply(factors, x, None, Hold(little=True)).sum().backward()

    run()
    most = 4 * (rows * (out + inner) + 5 * out * inner)
    assert structure.rank * (out + inner) > 10 * out * inner
    assert peak(run, x.device) < most


@pytest.mark.parametrize(
    "structure", [TensorTrain(outs=(6, 8), ins=(4, 8), ranks=(20,)), LowRank(out_features=48, in_features=32, rank=5)]
)
def test_few_rows_and_what_keeps_something_go_their_own_way(structure, monkeypatch):
    """Recorded calls know no results that lie in others, and what is kept is each term's own."""
    monkeypatch.setattr(joint, "_pays", lambda *given: False)
    monkeypatch.setattr(added._Added, "apply", lambda *given: pytest.fail("added at once"))
    both = Sum(parts=(structure, structure))
    factors = {name: value.requires_grad_() for name, value in both.init(0.1).items()}
    for rows, hold in ((3, Hold()), (300, Hold(between=True)), (300, Hold({}))):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(both._apply(factors, x, None, hold), x @ both.dense(factors).T, rtol=1e-4, atol=1e-5)
