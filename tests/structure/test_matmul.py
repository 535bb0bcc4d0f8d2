"""How a structure is multiplied: by the cheaper plan, keeping its input and its factors only."""

import pytest
import torch
from cases import ALL, COMBINED, FAMILIES, KRONECKER, LOW_RANK, each, factors_of

from tenfold.structure import Blast, BlockTensorTrain, Kronecker, LowRank, Scattered, Sum, TensorTrain
from tenfold.structure.cost_model import CPU, HardwareCosts
from tenfold.structure.matmul import BUCKETS, _back_through_chain, _rows_at_once, bucket, counts_of, plan_chain

F64 = torch.float64


def test_flops_of_known_cases():
    """By hand, as on the definition page: ``O I`` multiply-adds, ``R (O + I)``, ``R (ABC + BCD)``."""
    assert FAMILIES["dense"].flops(5) == 2 * 5 * 3 * 4
    assert LowRank(out_features=40, in_features=60, rank=2).flops(5) == 2 * 5 * 2 * (40 + 60)
    assert BlockTensorTrain(outs=(16, 16), ins=(16, 16), rank=1).flops(3) == 2 * 3 * 2 * 16**3
    assert Kronecker(outs=(64, 2), ins=(64, 2)).flops(1) == 2 * (2 * 64 * 64 + 64 * 2 * 2)


@each({"sum": Sum(parts=(KRONECKER, LOW_RANK)), "stacked": COMBINED["stacked"]})
def test_flops_of_parts_add_up(structure):
    """Those of a sum are added up; parts below each other are not."""
    added = structure.shape[0] if isinstance(structure, Sum) else 0
    assert structure.flops(7) == sum(part.flops(7) for part in structure.parts) + 7 * added


def test_parts_below_each_other_are_put_together(monkeypatch):
    """Nothing is padded with zeros and added; what overlaps is."""
    structure = COMBINED["stacked"]
    factors, x = factors_of(structure), torch.randn(5, structure.shape[1], dtype=F64)
    assert [start for start, *_ in structure._row_blocks] == [0, structure.parts[0].shape[0]]
    assert structure._additions == 0
    monkeypatch.setattr(torch.nn.functional, "pad", None)
    torch.testing.assert_close(structure.apply(factors, x), x @ structure.dense(factors).T)
    assert Sum(parts=(KRONECKER, LOW_RANK))._additions == KRONECKER.shape[0]
    assert Scattered(base=KRONECKER, out_features=9, in_features=9)._row_blocks[0][:2] == (0, 9)


def test_parts_of_rows_leave_what_is_between_in_the_cache():
    """512 rows at most, fewer where a row has much between the steps, and never fewer than a few."""
    blocks = BlockTensorTrain(outs=(32, 24), ins=(64, 48), rank=2).normal_form()[0].spec
    dear = TensorTrain(outs=(4, 4, 4, 4, 3), ins=(4, 4, 4, 4, 12), ranks=(12, 12, 12, 12)).normal_form()[0].spec
    for spec, expected in ((blocks, range(256, 513)), (dear, range(64, 129))):
        plan = plan_chain(spec, 2048, CPU)
        assert _rows_at_once(plan, torch.empty(5000, spec.shape[1])) in expected
        assert _rows_at_once(plan, torch.empty(100, spec.shape[1])) is None


def test_flops_of_a_placed_matrix_are_those_of_its_base():
    assert Scattered(base=KRONECKER, out_features=9, in_features=9).flops(7) == KRONECKER.flops(7)


@pytest.mark.parametrize(
    "structure",
    [
        Kronecker(outs=(32, 24), ins=(64, 48), terms=64),
        TensorTrain(outs=(12, 8, 8), ins=(16, 16, 12), ranks=(64, 64)),
        Blast(outs=(4, 192), ins=(4, 768), rank=600),
    ],
)
def test_many_rows_never_cost_much_more_than_dense(structure):
    rows, (out, inner) = 2048, structure.shape
    assert structure.flops(rows) <= 1.1 * 2 * rows * out * inner


def test_the_price_decides_between_the_plans():
    few = LowRank(out_features=400, in_features=400, rank=8).normal_form()[0].spec
    many = Kronecker(outs=(32, 24), ins=(64, 48), terms=64).normal_form()[0].spec
    assert counts_of(few, 32, CPU)[1] and _back_through_chain(few, 32, CPU)
    assert not counts_of(many, 2048, CPU)[1] and not _back_through_chain(many, 2048, CPU)
    calls = HardwareCosts(0.0, 0.0, 1e12)  # three calls and a matrix, or four products
    assert counts_of(TensorTrain(outs=(4,) * 4, ins=(4,) * 4, ranks=(3,) * 3).normal_form()[0].spec, 32, calls)[1]


def test_a_bucket_holds_its_numbers_of_rows():
    rows = (0, 1, 4, 5, 80, 81, 1024, 1025, 99999)
    assert [bucket(number) for number in rows] == [1, 1, 1, 32, 32, 512, 512, 2048, 2048]
    assert BUCKETS == (1, 32, 512, 2048)


@each(ALL)
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_forward_is_the_same_with_and_without_gradients(structure, rows):
    factors, x = factors_of(structure), torch.randn(rows, structure.shape[1], dtype=F64)
    with_gradients = structure.apply(factors, x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(structure.apply(factors, x), with_gradients, rtol=0, atol=1e-14)


def storages(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@each(ALL)
@pytest.mark.parametrize("rows", [2, 300])
def test_forward_keeps_x_and_the_factors_only(structure, rows):
    factors, x, kept = factors_of(structure), torch.randn(rows, structure.shape[1], dtype=F64), []
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in factors.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        structure.apply(leaves, x.requires_grad_())
    known = storages([x, *factors.values()])
    others = [v for v in kept if v.is_floating_point() and v.untyped_storage().data_ptr() not in known]
    assert kept
    if not any(place.columns for place in structure.normal_form()):
        assert not others
    for value in others:  # a map of the columns keeps the columns of x that it takes
        assert (value.shape[0], value.shape[1] <= x.shape[1]) == (rows, True)


@pytest.mark.parametrize("rows", [3, 300])
def test_autocast_computes_in_its_type_and_gives_gradients_in_that_of_the_factors(rows):
    structure = FAMILIES["kronecker"]
    factors = {name: value.float().requires_grad_() for name, value in factors_of(structure).items()}
    x = torch.randn(rows, structure.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        y = structure.apply(factors, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x @ structure.dense(factors).T, rtol=0.05, atol=0.2)
    y.sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in factors.values())
