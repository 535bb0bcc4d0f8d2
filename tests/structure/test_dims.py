"""Integers: balanced factors, structures for a shape from a recipe's words, the largest structure within a budget."""

from math import prod

import pytest
import torch

from tenfold.structure import (
    CP,
    Blast,
    BlockTensorTrain,
    CustomEinsum,
    Kronecker,
    LowRank,
    RowTensorTrain,
    Scattered,
    Stacked,
    Structure,
    Sum,
    TensorTrain,
    Tucker,
    factorization,
)

# factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 7, 12, 64, 768, 2304, 3072, 50257, 50304, 151936])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_balanced_factors(number, parts):
    factors = factorization.split_evenly(number, parts)
    assert prod(factors) == number
    assert len(factors) == parts
    assert list(factors) == sorted(factors, reverse=True)
    divisors = [d for d in range(2, number + 1) if number % d == 0]
    largest_prime = max((d for d in divisors if not any(d % other == 0 for other in divisors if other < d)), default=1)
    assert factors[0] <= factors[-1] * largest_prime


@pytest.mark.parametrize("number, parts, expected", [(768, 3, (12, 8, 8)), (3072, 2, (64, 48)), (13, 2, (13, 1))])
def test_balanced_factors_of_known_numbers(number, parts, expected):
    assert factorization.split_evenly(number, parts) == expected


@pytest.mark.parametrize("number, parts", [(12, 0), (0, 2), (-4, 2)])
def test_what_has_no_factors_is_refused(number, parts):
    with pytest.raises(ValueError, match=rf"{number} can't be split into {parts}"):
        factorization.split_evenly(number, parts)


# structures for a shape -------------------------------------------------------------------------------------------

FOR_768_3072 = [
    ({"kind": "low_rank", "rank": 5}, LowRank(out_features=768, in_features=3072, rank=5)),
    ({"kind": "kronecker", "terms": 3}, Kronecker(outs=(32, 24), ins=(64, 48), terms=3)),
    ({"kind": "kronecker", "outs": [384, 2], "terms": 1}, Kronecker(outs=(384, 2), ins=(64, 48))),
    ({"kind": "kronecker", "parts": 3, "scaled": True}, Kronecker(outs=(12, 8, 8), ins=(16, 16, 12), scaled=True)),
    (
        {"kind": "tensor_train", "ins": [16, 16, 12], "rank": 64},
        TensorTrain(outs=(12, 8, 8), ins=(16, 16, 12), ranks=(64, 64)),
    ),
    ({"kind": "tensor_train", "parts": 2, "rank": "full"}, TensorTrain(outs=(32, 24), ins=(64, 48), ranks=(1152,))),
    (
        {"kind": "tensor_train", "outs": [1, 1, 768], "ins": [2, 3, 512], "rank": 64},  # clipped from the left only
        TensorTrain(outs=(1, 1, 768), ins=(2, 3, 512), ranks=(2, 6)),
    ),
    ({"kind": "row_train", "rank": 64}, RowTensorTrain(out_features=768, ins=(16, 16, 12), ranks=(16, 12))),
    ({"kind": "row_train", "parts": 2, "rank": 4}, RowTensorTrain(out_features=768, ins=(64, 48), ranks=(4,))),
    ({"kind": "block_train", "rank": 1}, BlockTensorTrain(outs=(32, 24), ins=(64, 48), rank=1)),
    ({"kind": "blast", "rank": 9}, Blast(outs=(4, 192), ins=(4, 768), rank=9)),
    ({"kind": "blast", "blocks": 8, "rank": 9}, Blast(outs=(8, 96), ins=(8, 384), rank=9)),
    ({"kind": "tucker", "rank": 1000}, Tucker(outs=(768,), ins=(3072,), ranks=(768, 1000))),
    ({"kind": "cp", "rank": 4}, CP(outs=(32, 24), ins=(64, 48), rank=4)),
    (
        {"kind": "sum", "parts": [{"kind": "low_rank", "rank": 1}, {"kind": "low_rank", "rank": 2}]},
        Sum(parts=[LowRank(out_features=768, in_features=3072, rank=rank) for rank in (1, 2)]),
    ),
    (
        {"kind": "stacked", "parts": [{"kind": "low_rank", "rank": 1}] * 2},
        Stacked(parts=[LowRank(out_features=384, in_features=3072, rank=1)] * 2),
    ),
    (
        {"kind": "placed", "base": {"kind": "low_rank", "rank": 1}},
        Scattered(base=LowRank(out_features=768, in_features=3072, rank=1), out_features=768, in_features=3072),
    ),
    (
        {
            "kind": "diagram",
            "factors": {"left": "o r", "right": ["r", "i"]},
            "outs": "o",
            "ins": "i",
            "sizes": {"o": 768, "i": 3072, "r": 2},
        },
        CustomEinsum(
            factors=(("left", ("o", "r")), ("right", ("r", "i"))),
            outs=("o",),
            ins=("i",),
            sizes=(("o", 768), ("i", 3072), ("r", 2)),
        ),
    ),
]


@pytest.mark.parametrize("spec, expected", FOR_768_3072)
def test_for_shape(spec, expected):
    before = repr(spec)
    assert Structure.for_shape(768, 3072, spec) == expected
    assert repr(spec) == before


@pytest.mark.parametrize(
    "spec, says",
    [
        ({"kind": "low_rank"}, "low_rank needs rank"),
        ({"kind": "low_rank", "rank": 2, "out_features": 7}, r"\(7, 3072\).*\(768, 3072\)"),
        ({"kind": "kronecker", "outs": [3, 5]}, r"\(15, 3072\).*\(768, 3072\)"),
        ({"kind": "kronecker", "outs": [32, 24], "ins": [16, 16, 12]}, r"\(32, 24\).*\(16, 16, 12\)"),
        ({"kind": "blast", "rank": 2, "blocks": 5}, r"\(765, 3070\).*\(768, 3072\)"),
        ({"kind": "crone"}, "'crone'.*kronecker"),
        ({"kind": "low_rank", "rang": 2, "rank": 2}, "'rang'"),
        ({"kind": "sum"}, "parts"),
        ({"kind": "stacked"}, "parts"),
        ({"kind": "placed"}, "base"),
        ({"kind": "sum", "parts": [{"kind": "low_rank", "rank": 1}], "rank": 2}, "'rank'"),
        ({"rank": 2}, "None"),
    ],
)
def test_specs_that_do_not_fit_are_refused(spec, says):
    with pytest.raises(ValueError, match=says):
        Structure.for_shape(768, 3072, spec)


# budgets ----------------------------------------------------------------------------------------------------------

GROWING = [
    {"kind": "low_rank"},
    {"kind": "kronecker"},
    {"kind": "kronecker", "parts": 3, "scaled": True},
    {"kind": "tensor_train", "parts": 2},
    {"kind": "tensor_train", "parts": 3},
    {"kind": "row_train", "parts": 3},
    {"kind": "block_train"},
    {"kind": "blast", "blocks": 2},
    {"kind": "tucker"},
    {"kind": "tucker", "parts": 2},
    {"kind": "cp", "parts": 2, "weighted": True},
]
names = ["-".join(map(str, spec.values())) for spec in GROWING]


def with_number(shape, spec, number: int) -> Structure:
    return Structure.for_shape(*shape, spec | {Structure.family(spec["kind"]).grows: number})


def numbers(shape, spec, most: int = 10**4):
    """Every number for which there is a structure, ascending, with its parameters."""
    for number in range(1, most):
        try:
            yield number, with_number(shape, spec, number).numel
        except ValueError:
            return


@pytest.mark.parametrize("spec", GROWING, ids=names)
@pytest.mark.parametrize("shape", [(24, 36), (48, 12), (8, 216)])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_within_is_the_largest_under_the_budget(spec, shape, keep):
    """No larger structure is under the budget, unless one of its numbers adds parameters that add no matrix."""
    budget = keep * prod(shape)
    smallest = with_number(shape, spec, 1)
    if smallest.numel > budget:
        with pytest.raises(ValueError, match=f"{smallest.numel} parameters, more than the {int(budget)}"):
            Structure.within(*shape, spec, budget)
        return
    found = Structure.within(*shape, spec, budget)
    assert found.numel <= budget
    bound = type(found).bound(smallest)
    affordable = [numel for number, numel in numbers(shape, spec, 400) if number <= bound and numel <= budget]
    assert found.numel == max(affordable)


@pytest.mark.parametrize("spec", GROWING, ids=names)
@pytest.mark.parametrize("shape", [(6, 4), (2, 12), (12, 1)])
def test_at_its_bound_a_structure_holds_every_matrix(spec, shape):
    """So a budget never needs more."""
    if spec["kind"] == "blast" and shape[1] % 2:
        pytest.skip("two blocks do not divide one column")
    full = with_number(shape, spec, Structure.family(spec["kind"]).bound(with_number(shape, spec, 1)))
    w = torch.randn(shape, dtype=torch.float64)
    starts = [None] if full.optimal else [None, full.init(1.0, dtype=torch.float64)]
    fits = [full.dense(full.fit(w, start=start)) for start in starts]
    assert min((w - fitted).norm() for fitted in fits) < 1e-6 * w.norm()


def test_a_placed_matrix_grows_as_its_base_does():
    found = Structure.within(24, 36, {"kind": "placed", "base": {"kind": "low_rank"}}, 600)
    assert found == Scattered(base=LowRank(out_features=24, in_features=36, rank=10), out_features=24, in_features=36)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "dense"},
        {"kind": "low_rank", "rank": 2},
        {"kind": "tensor_train", "outs": [4, 2], "ins": [4, 2], "ranks": [3]},
        {"kind": "sum", "parts": [{"kind": "low_rank", "rank": 2}]},
        {"kind": "placed", "base": {"kind": "low_rank", "rank": 2}},
        {"kind": "placed"},
        {"kind": "sum"},
    ],
)
def test_what_does_not_grow_has_no_budget(spec):
    with pytest.raises(ValueError, match=f"{spec['kind']}.* no rank open"):
        Structure.within(8, 8, spec, 64)


def test_open_parts_of_a_sum_share_its_budget():
    """A part with a rank of its own keeps it, the others share what it leaves."""
    spec = {"kind": "sum", "parts": [{"kind": "low_rank"}, {"kind": "block_train"}, {"kind": "low_rank", "rank": 2}]}
    whole = Structure.within(48, 32, spec, 1500)
    first, second, fixed = whole.parts
    assert fixed.rank == 2 and fixed.numel == 2 * 80
    assert (first.numel, second.numel) == (640, 576)  # of 1,340: half, in ranks of 80, and what fits into the rest
    with pytest.raises(ValueError, match="leaves no rank open"):
        Structure.within(48, 32, {"kind": "sum", "parts": [{"kind": "low_rank", "rank": 2}]}, 900)
