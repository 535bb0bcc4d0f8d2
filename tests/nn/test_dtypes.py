"""Every structure in float32, bfloat16 and float16 against float64; the same seed, and one thread or two."""

import pytest
import torch
from torch import nn

from tenfold.nn import FactorizedLinear
from tenfold.structure import (
    CP,
    Blast,
    BlockTensorTrain,
    CustomEinsum,
    Dense,
    Kronecker,
    LowRank,
    RowTensorTrain,
    Scattered,
    Stacked,
    Sum,
    TensorTrain,
    Tucker,
)

OUT, IN = 24, 16
LOW_RANK, KRONECKER = LowRank(out_features=OUT, in_features=IN, rank=4), Kronecker(outs=(6, 4), ins=(4, 4), terms=3)
STRUCTURES = [
    Dense(out_features=OUT, in_features=IN),
    LOW_RANK,
    KRONECKER,
    TensorTrain(outs=(2, 3, 4), ins=(2, 2, 4), ranks=(3, 4)),
    RowTensorTrain(out_features=OUT, ins=(4, 4), ranks=(3,)),
    BlockTensorTrain(outs=(6, 4), ins=(4, 4), rank=2),
    Blast(outs=(6, 4), ins=(4, 4), rank=4),
    Tucker(outs=(6, 4), ins=(4, 4), ranks=(3, 2, 3, 2)),
    CP(outs=(6, 4), ins=(4, 4), rank=5, weighted=True),
    CustomEinsum(
        factors=(("one", ("a", "k")), ("two", ("k", "b", "c"))),
        outs=("a", "b"),
        ins=("c",),
        sizes=(("a", 6), ("b", 4), ("c", 16), ("k", 5)),
    ),
    Sum(parts=(LOW_RANK, KRONECKER)),
    Stacked(parts=(LowRank(out_features=OUT // 2, in_features=IN, rank=3),) * 2),
    Scattered(base=LowRank(out_features=20, in_features=12, rank=4), out_features=OUT, in_features=IN),
]
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}  # of the norm of the result
each = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda one: one.kind)


def layer(structure, seed: int = 0) -> FactorizedLinear:
    torch.manual_seed(seed)
    made = FactorizedLinear(structure)
    made.set_factors(structure.init(1.0))
    nn.init.normal_(made.bias)
    return made


def run(made, x):
    """Return output and gradients of ``x`` and of all parameters."""
    x = x.clone().requires_grad_()
    y = made(x)
    grads = torch.autograd.grad(y.square().mean(), [x, *made.parameters()])
    return [value.detach() for value in (y, *grads)]


@each
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_results_and_gradients_are_near_those_of_float64(structure, dtype, rows):
    made = layer(structure).to(dtype)
    x = torch.randn(rows, IN).to(dtype)
    exact = run(layer(structure).to(dtype).double(), x.double())  # of the same, rounded, numbers
    for ours, expected in zip(run(made, x), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - expected).norm() <= BOUNDS[dtype] * max(expected.norm(), 1e-3)


@each
def test_the_same_seed_gives_the_same_bytes(structure):
    x = torch.randn(40, IN)
    assert all(
        torch.equal(one, other) for one, other in zip(run(layer(structure), x), run(layer(structure), x), strict=True)
    )


@each
def test_one_thread_or_two_are_alike(structure):
    x, threads = torch.randn(300, IN), torch.get_num_threads()
    one = run(layer(structure), x)
    try:
        torch.set_num_threads(2)
        two = run(layer(structure), x)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert (a - b).norm() <= 2 * BOUNDS[torch.float32] * max(b.norm(), 1e-3)
