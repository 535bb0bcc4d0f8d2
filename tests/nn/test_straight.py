"""Straight code: what is repeated computes what was recorded, of the operands of every call, or it is not repeated."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tenfold.nn import FactorizedEmbedding, FactorizedLinear
from tenfold.nn.straight import CALLS, PROGRAMS, Straight, serves
from tenfold.structure import BlockTrain, Kronecker, TensorTrain

sys.path.append(str(Path(__file__).parents[1] / "structure"))
from cases import ALL, each, factors_of

CORES = TensorTrain(outs=(4, 6), ins=(6, 5), ranks=(7,))  # through W
BLOCKS = BlockTrain(outs=(12, 5), ins=(5, 6), rank=1)  # a chain


def layer(structure, dtype=torch.float64) -> FactorizedLinear:
    made = FactorizedLinear(structure, dtype=dtype)
    made.set_factors(factors_of(structure))
    nn.init.normal_(made.bias)
    return made.eval()


def recorded(straight: Straight) -> int:
    return sum(callable(known) for known in straight._known.values())


@each(ALL)
@pytest.mark.parametrize("rows", [(), (1,), (2, 3)])
@torch.no_grad()
def test_every_call_is_the_product_with_the_dense_matrix(structure, rows):
    one = layer(structure)
    w = one.dense()
    calls = [torch.randn(*rows, w.shape[1], dtype=torch.float64) for _ in range(CALLS + 2)]
    results = [one(x) for x in calls]
    for x, y in zip(calls, results, strict=True):
        torch.testing.assert_close(y, x @ w.T + one.bias)
    if structure.matrices is None:  # else there is nothing around the products
        assert recorded(one._straight) == 1, "repeated"


@torch.no_grad()
def test_all_calls_compute_the_same():
    one = layer(Kronecker(outs=(192, 4), ins=(192, 4), terms=7), torch.float32)
    x = torch.randn(1, 768)
    first, *others = [one(x) for _ in range(CALLS + 1)]
    assert recorded(one._straight) == 1
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("structure", [CORES, BLOCKS], ids=["through W", "a chain"])
@torch.no_grad()
def test_operands_may_lie_elsewhere_and_differ(structure):
    one, storage = layer(structure), torch.randn(40, 64, dtype=torch.float64)
    for start in range(8):
        x = storage[start : start + 2, start : start + 30]
        torch.testing.assert_close(one(x), x @ one.dense().T + one.bias)
    assert recorded(one._straight) == 1
    for start in range(8):
        x = storage.view(-1)[start : start + 30][None]
        torch.testing.assert_close(one(x), x @ one.dense().T + one.bias)
    assert recorded(one._straight) == 2
    turned = torch.randn(30, 2, dtype=torch.float64).T
    for _ in range(CALLS + 1):
        torch.testing.assert_close(one(turned), turned @ one.dense().T + one.bias)
    assert recorded(one._straight) == 3


@torch.no_grad()
def test_changed_factors_are_seen():
    one, x = layer(CORES), torch.randn(1, 30, dtype=torch.float64)
    for _ in range(CALLS + 1):
        before = one(x)
    one.core_0.mul_(2)
    torch.testing.assert_close(one(x) - one.bias, 2 * (before - one.bias))
    one.core_0 = nn.Parameter(one.core_0 * 2)
    torch.testing.assert_close(one(x) - one.bias, 4 * (before - one.bias))
    one.core_0 = nn.Parameter(one.core_0.mT.contiguous().mT)  # lies otherwise
    torch.testing.assert_close(one(x) - one.bias, 4 * (before - one.bias))


@torch.no_grad()
def test_results_belong_to_the_caller():
    one, x = layer(CORES), torch.randn(1, 30, dtype=torch.float64)
    results = [one(x) for _ in range(CALLS + 2)]
    kept = results[-1].clone()
    results[-2].zero_()
    assert torch.equal(one(x), kept)
    assert len({y.untyped_storage().data_ptr() for y in results}) == len(results)


@torch.no_grad()
def test_a_tied_head_too():
    one = FactorizedEmbedding(CORES, dtype=torch.float64)
    one.set_factors(factors_of(CORES))
    for _ in range(CALLS + 1):
        x = torch.randn(1, 1, 30, dtype=torch.float64)
        torch.testing.assert_close(one(x, as_head=True), x @ one.dense().T)
    assert recorded(one._straight) == 1


@torch.no_grad()
def test_it_goes_with_the_layer():
    one, x = layer(CORES), torch.randn(1, 30, dtype=torch.float64)
    for _ in range(CALLS):
        expected = one(x)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        for _ in range(CALLS + 1):
            torch.testing.assert_close(other(x), expected)
    half, few = one.to(torch.bfloat16), x.to(torch.bfloat16)
    for _ in range(CALLS + 1):
        torch.testing.assert_close(half(few).double(), expected, rtol=0.1, atol=0.3)


def test_nothing_is_repeated_where_more_is_asked_for_than_numbers():
    one, x = layer(CORES), torch.randn(1, 30, dtype=torch.float64)
    for _ in range(CALLS + 1):
        one(x)
    assert not one._straight._known, "a gradient"
    with torch.no_grad():
        for _ in range(CALLS + 1):
            torch.testing.assert_close(torch.vmap(one)(torch.stack((x, 2 * x)))[1], one(2 * x))
        several = {name: torch.stack((value, 2 * value)) for name, value in one.named_parameters()}
        for _ in range(CALLS + 1):
            made = torch.vmap(lambda given: torch.func.functional_call(one, given, x))(several)
            torch.testing.assert_close(made[0], one(x))
        assert one(x[:0]).shape == (0, 24)
        assert not serves(x.to("meta"))
        with torch.autocast("cpu"):
            assert not serves(x)


def test_numbers_of_rows_are_forgotten():
    one = layer(CORES)
    with torch.no_grad():
        for rows in range(1, 2 * PROGRAMS):
            one(torch.randn(rows, 30, dtype=torch.float64))
    assert len(one._straight._known) == PROGRAMS


ELSEWHERE = [torch.ones(3)]


def unseen(x, y):
    made = x + y
    made.untyped_storage().fill_(0)
    return made


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * y.sum().item(),
        lambda x, y: x + y if bool(y.sum() > 0) else x - y,
        lambda x, y: x + y + ELSEWHERE[0],
        lambda x, y: x + torch.cat(list((2 * y).split(1))),
        lambda x, y: ELSEWHERE[0].new_empty(3).copy_(x),
        unseen,
    ],
    ids=[
        "a number is read",
        "a branch",
        "a tensor from elsewhere",
        "several tensors at once",
        "memory from elsewhere",
        "a change that nothing tells",
    ],
)
def test_what_is_not_the_same_for_all_operands_is_called(function):
    straight = Straight()
    for k in range(CALLS + 3):
        x, y = torch.randn(3), torch.randn(3) + (-1) ** k
        ELSEWHERE[0] = torch.randn(3)
        torch.testing.assert_close(straight(function, x, y), function(x, y))


def test_operands_in_one_memory_are_not_repeated():
    straight, both = Straight(), torch.arange(6.0)
    for start in range(CALLS + 2):
        x, y = both[:2], both[2:4] if start < CALLS else torch.randn(4)[2:]
        torch.testing.assert_close(straight(torch.sub, x, y), x - y)


def test_changes_in_place_and_types_are_repeated():
    def function(x, y):
        made = torch.empty_like(x)
        torch.mul(x, y, out=made)
        made[1:].add_(y[:-1])
        made[::2] = x[1::2]
        made[2:] *= torch.nn.functional.relu(made[:2] + 1, inplace=True)
        return (made.view(torch.int64) >> 52).double() + made.clone().copy_(x)

    straight = Straight()
    for _ in range(CALLS + 2):
        x, y = torch.randn(2, 4, dtype=torch.float64)
        torch.testing.assert_close(straight(function, x, y.clone()), function(x, y))
    assert recorded(straight) == 1
