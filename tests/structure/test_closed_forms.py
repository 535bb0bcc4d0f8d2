"""The fits that need no iteration, against the theorems about them and against other implementations."""

from math import prod

import numpy as np
import pytest
import tensorly.decomposition
import torch
from cases import ALL, each, member

from tenfold.structure import (
    BlockTensorTrain,
    Dense,
    Kronecker,
    LowRank,
    RowTensorTrain,
    Scattered,
    Stacked,
    TensorTrain,
    Tucker,
)

F64 = torch.float64


def weight(out: int, inner: int) -> torch.Tensor:
    return torch.randn(out, inner, dtype=F64, generator=torch.Generator().manual_seed(3))


def error(structure, w) -> float:
    """``||W - What||_F^2`` of the closed form."""
    return float((w - structure.dense(structure.closed_form(w))).square().sum())


def dropped(matrix, rank: int) -> float:
    """The squared singular values from ``rank`` on: the least error of that rank (Eckart-Young)."""
    return float((np.linalg.svd(np.asarray(matrix), compute_uv=False)[rank:] ** 2).sum())


def stacked_blocks(w, outs, ins):
    """Van Loan's rearrangement: a row for every block of ``W``, which holds the block's entries."""
    (a, b), (c, d) = outs, ins
    rows, columns = np.split(w.numpy(), a), range(c)
    return np.array([row[:, j * d : (j + 1) * d].ravel() for row in rows for j in columns]).reshape(a * c, b * d)


# optimal ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out, inner, rank", [(6, 9, 3), (9, 6, 3), (5, 5, 5), (4, 7, 1)])
def test_low_rank_is_the_truncated_svd(out, inner, rank):
    w = weight(out, inner)
    assert error(LowRank(out_features=out, in_features=inner, rank=rank), w) == pytest.approx(
        dropped(w, rank), abs=1e-10
    )


@pytest.mark.parametrize("terms", [1, 2, 3, 8])
@pytest.mark.parametrize("outs, ins", [((3, 2), (2, 4)), ((2, 4), (3, 1))])
def test_kronecker_is_the_svd_of_the_rearranged_matrix(outs, ins, terms):
    w = weight(prod(outs), prod(ins))
    expected = dropped(stacked_blocks(w, outs, ins), terms)
    assert error(Kronecker(outs=outs, ins=ins, terms=terms), w) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_block_train_is_optimal_in_every_block(rank):
    (_, b), (c, d) = outs, ins = (3, 2), (2, 4)
    w = weight(6, 8)
    blocks = [w[j::b, k * d : (k + 1) * d] for j in range(b) for k in range(c)]
    expected = sum(dropped(block, rank) for block in blocks)
    assert error(BlockTensorTrain(outs=outs, ins=ins, rank=rank), w) == pytest.approx(expected, abs=1e-10)


def test_dense_is_exact_and_combinators_keep_optima():
    w, low = weight(6, 9), LowRank(out_features=6, in_features=9, rank=2)
    assert error(Dense(out_features=6, in_features=9), w) == 0
    assert error(Stacked(parts=(low, low)), torch.cat([w, w + 1])) == pytest.approx(dropped(w, 2) + dropped(w + 1, 2))


def test_a_placed_fit_takes_the_entries_at_its_place():
    """Of a matrix that is zero elsewhere nothing but the base's own error is left."""
    placed = Scattered(base=LowRank(out_features=4, in_features=5, rank=2), out_features=6, in_features=7)
    small, maps = weight(4, 5), {"rows": torch.tensor([4, 0, 5, 2]), "columns": torch.tensor([6, 1, 0, 3, 2])}
    w = torch.zeros(6, 7, dtype=F64)
    w[maps["rows"][:, None], maps["columns"]] = small
    assert float((w - placed.dense(placed.fit_at(w, **maps))).square().sum()) == pytest.approx(dropped(small, 2))


# tensor trains ----------------------------------------------------------------------------------------------------

TRAINS = [((2, 3, 2), (2, 2, 3), (3, 2)), ((2, 2, 2, 2), (3, 1, 2, 2), (4, 3, 2)), ((4, 3), (3, 5), (7,))]


@pytest.mark.parametrize("outs, ins, ranks", TRAINS)
def test_tt_svd_is_that_of_tensorly(outs, ins, ranks):
    w, train = weight(prod(outs), prod(ins)), TensorTrain(outs=outs, ins=ins, ranks=ranks)
    theirs = tensorly.decomposition.tensor_train_matrix(w.numpy().reshape(*outs, *ins), rank=(1, *ranks, 1))
    np.testing.assert_allclose(train.dense(train.closed_form(w)), theirs.to_matrix(), atol=1e-10)


def test_row_trains_are_those_of_tensorly():
    w, train = weight(3, 24), RowTensorTrain(out_features=3, ins=(2, 4, 3), ranks=(2, 2))
    theirs = [tensorly.decomposition.tensor_train(row.reshape(2, 4, 3), rank=(1, 2, 2, 1)) for row in w.numpy()]
    expected = np.stack([row.to_tensor().ravel() for row in theirs])
    np.testing.assert_allclose(train.dense(train.closed_form(w)), expected, atol=1e-10)


@pytest.mark.parametrize("ranks", [(6, 9), (20, 3), (4, 4)])
def test_ranks_above_the_bound_are_filled_with_zeros(ranks):
    outs, ins = (2, 1, 3), (2, 3, 1)  # bonds of a full train: 4, 3
    w, train = weight(6, 6), TensorTrain(outs=outs, ins=ins, ranks=ranks)
    factors = train.closed_form(w)
    assert {name: tuple(core.shape) for name, core in factors.items()} == train.factor_shapes()
    np.testing.assert_allclose(train.dense(factors), w, atol=1e-10)
    assert (factors["core_0"][..., 4:] == 0).all()
    assert (factors["core_1"][4:] == 0).all()


# Tucker -----------------------------------------------------------------------------------------------------------


TUCKERS = [
    ((4,), (5,), (2, 3)),
    ((2, 3), (3, 4), (2, 2, 2, 2)),
    ((6,), (2, 5), (3, 2, 2)),
    ((6,), (2, 2), (5, 1, 2)),
]


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")  # tensorly's remark on ranks above the bound
@pytest.mark.parametrize("outs, ins, ranks", TUCKERS)
def test_tucker_is_no_worse_than_tensorly(outs, ins, ranks):
    w = weight(prod(outs), prod(ins))
    tensor = w.numpy().reshape(*outs, *ins)
    theirs = tensorly.decomposition.tucker(tensor, rank=ranks, n_iter_max=100).to_tensor()
    assert error(Tucker(outs=outs, ins=ins, ranks=ranks), w) <= 1.01 * ((tensor - theirs) ** 2).sum()


# all --------------------------------------------------------------------------------------------------------------

IN_CLOSED_FORM = {name: s for name, s in ALL.items() if s.optimal or s.kind in ("tensor_train", "row_train", "tucker")}


@each(IN_CLOSED_FORM)
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-20, 1e20])
def test_a_member_is_recovered_at_any_scale(structure, scale):
    w = scale * member(structure)
    assert error(structure, w) <= (1e-10 * w.norm()) ** 2


@pytest.mark.parametrize("rank", range(1, 10))
def test_small_singular_values_are_good_to_single_precision(rank):
    """The SVD goes by the Gram matrix, which halves the digits: enough for float32 weights."""
    u, v = (torch.linalg.qr(weight(9, 9) + shift)[0] for shift in (0, 1))
    w = u @ torch.diag(10.0 ** -torch.arange(9, dtype=F64)) @ v
    got = error(LowRank(out_features=9, in_features=9, rank=rank), w) ** 0.5
    assert got <= dropped(w, rank) ** 0.5 + 2e-7
