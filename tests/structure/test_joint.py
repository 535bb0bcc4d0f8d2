"""Sums that make one matrix: the same as through the dense one, and nothing but x and the factors is kept."""

import oracle
import pytest
import torch
from cases import ALL, each, factors_of
from test_laws import gradients, parameters, second

from tenfold.structure import BlockTrain, LowRank, Sum, contract, joint
from tenfold.structure.hold import Hold
from tenfold.structure.worth import worth_of

BLOCKS = {name: [some for *_, some in one._blocks or ()] for name, one in ALL.items()}
WHOLE = {
    name: ALL[name]
    for name, blocks in BLOCKS.items()
    if len(blocks) == 1 and len(blocks[0]) > 1 and not any(place.columns for place in blocks[0])
}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """How often a sum went this way."""
    calls, dense = [], joint.dense
    monkeypatch.setattr(joint, "_pays", lambda *given: True)
    monkeypatch.setattr(joint, "dense", lambda *given: calls.append(given) or dense(*given))
    return calls


@each(WHOLE)
def test_products_and_gradients_are_those_of_the_dense_matrix(structure, always):
    factors, x = factors_of(structure), torch.randn(6, structure.shape[1], dtype=torch.float64)
    matrix, bias = torch.from_numpy(oracle.matrix(structure, factors)), torch.randn(structure.shape[0]).double()
    with torch.no_grad():
        torch.testing.assert_close(structure._apply(factors, x, bias), x @ matrix.T + bias)
    torch.testing.assert_close(structure._apply(factors, x, bias), x @ matrix.T + bias)
    assert len(always) == 2
    expected = gradients(lambda f, x: x @ structure.dense(f).T, x, factors)
    for kept in (None, {}):
        ours = gradients(lambda f, x, kept=kept: structure._apply(f, x, None, Hold(kept)), x, factors)
        for got, one in zip(ours, expected, strict=True):
            torch.testing.assert_close(got, one)
    assert len(always) == 2 + 2 + 1, "a kept one is there on the way back"


@each(WHOLE)
def test_gradients_have_gradients(structure, always):
    factors, x = factors_of(structure), torch.randn(6, structure.shape[1], dtype=torch.float64)
    expected = second(lambda f, x: x @ structure.dense(f).T, x, factors)
    for got, one in zip(second(structure.apply, x, factors), expected, strict=True):
        torch.testing.assert_close(got, one)
    assert always


@each(WHOLE)
def test_only_what_is_asked_for_is_kept(structure, always):
    factors = factors_of(structure)
    leaves = {name: value.requires_grad_() for name, value in parameters(factors).items()}
    x, known = torch.randn(6, structure.shape[1], dtype=torch.float64), []
    for kept, more in ((None, 0), ({}, 1)):
        with torch.autograd.graph.saved_tensors_hooks(lambda v: known.append(v) or v, lambda v: v):
            one, other = (structure._apply(factors | leaves, x, None, Hold(kept)).detach() for _ in range(2))
        torch.testing.assert_close(one, other)
        own = {value.untyped_storage().data_ptr() for value in (x, *factors.values())}
        others = [value for value in known if value.untyped_storage().data_ptr() not in own]
        assert [tuple(value.shape) for value in others] == [structure.shape] * 2 * more
        known.clear()
    assert len(always) == 2 + 1, "a kept one is used again"


def test_only_gradients_asked_for_are_made(monkeypatch):
    structure = next(iter(WHOLE.values()))
    factors, x = factors_of(structure), torch.randn(6, structure.shape[1], dtype=torch.float64)
    for name in parameters(factors):
        with torch.no_grad():
            others = {key: value.detach() for key, value in factors.items()}
        leaf = others[name].requires_grad_()
        structure._apply(others, x).sum().backward()
        expected = leaf.grad
        leaf.grad = None
        (x @ structure.dense(others).T).sum().backward()
        torch.testing.assert_close(expected, leaf.grad)


def test_it_is_done_where_it_is_cheaper(monkeypatch):
    monkeypatch.undo()
    blocks = BlockTrain(outs=(32, 24), ins=(32, 24), rank=4)
    whole = Sum(parts=(blocks, LowRank(out_features=768, in_features=768, rank=96)))
    diagrams = tuple(place.diagram for place in whole.normal_form())
    assert [joint._pays(diagrams, rows, worth_of("cpu")) for rows in contract.BUCKETS] == [False, False, False, True]
