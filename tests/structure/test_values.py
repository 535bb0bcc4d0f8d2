"""A structure is a value: it compares, hashes, prints as its own call and goes to JSON; and it says how to start."""

import json

import numpy as np
import pytest
import torch
from cases import ALL, FAMILIES, LOW_RANK, each, factors_of
from oracle import matrix

import tenfold.structure
from tenfold.structure import CP, Blast, CustomEinsum, LowRank, Scattered, Stacked, Structure, Sum, TensorTrain, Tucker

F64 = torch.float64


@each(ALL)
def test_json_and_back(structure):
    back = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert back == structure
    assert hash(back) == hash(structure)
    assert back.to_json() == structure.to_json()


@each(ALL)
def test_prints_as_its_own_call(structure):
    assert eval(repr(structure), vars(tenfold.structure)) == structure


def test_every_family_is_a_case():
    known = {name: value for name, value in vars(tenfold.structure).items() if isinstance(value, type)}
    families = {name for name, value in known.items() if issubclass(value, Structure) and value is not Structure}
    assert families == {type(structure).__name__ for structure in ALL.values()}


def test_fields_are_frozen_and_lists_become_tuples():
    train = TensorTrain(outs=[2, 2], ins=[2, 3], ranks=[3])
    assert train.outs == (2, 2)
    with pytest.raises(AttributeError):
        train.outs = (4, 1)


# init -------------------------------------------------------------------------------------------------------------


def draws(structure, std: float, number: int) -> torch.Tensor:
    """``number`` random matrices ``(number, out, in)``, all with the index maps of the first."""
    generator = torch.Generator().manual_seed(0)
    many = [structure.init(std, generator, F64) for _ in range(number)]
    maps = structure.index_shapes()
    factors = {name: v if name in maps else torch.stack([f[name] for f in many]) for name, v in many[0].items()}
    return torch.vmap(structure.dense, ({name: None if name in maps else 0 for name in factors},))(factors)


@each(ALL)
def test_init_gives_entries_of_the_standard_deviation_asked_for(structure):
    w = draws(structure, std=0.3, number=1500)
    ones = {n: torch.ones_like(v) if v.is_floating_point() else v for n, v in factors_of(structure).items()}
    w = w[:, structure.dense(ones) != 0]  # elements outside of the index maps are zero
    assert abs(w.mean()) < 0.03
    assert w.square().mean().sqrt() == pytest.approx(0.3, rel=0.12)
    assert w.square().mean(0).sqrt().max() < 2.0 * w.square().mean(0).sqrt().min()  # the same for all entries


@each(ALL)
def test_init_is_repeatable(structure):
    one, same, other = factors_of(structure, 3), factors_of(structure, 3), factors_of(structure, 4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@each({name: FAMILIES[name] for name in ("kronecker-scaled", "cp-weighted")})
def test_scalars_start_at_one(structure):
    name = "scale" if "scaled" in repr(structure) else "weights"
    assert (structure.init(0.02)[name] == 1).all()


# refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: LowRank(out_features=4, in_features=6, rank=5), "rank 5 .* 4"),
        (lambda: LowRank(out_features=4, in_features=6, rank=0), "rank 0 .* 4"),
        (lambda: LowRank(out_features=4, in_features=6, rank=2.0), "2.0"),
        (lambda: TensorTrain(outs=(2, 2), ins=(2, 3), ranks=(3, 3)), r"\(3, 3\)"),
        (lambda: TensorTrain(outs=(2, 2), ins=(2, 3), ranks=(0,)), "0"),
        (lambda: Tucker(outs=(4,), ins=(5,), ranks=(5, 2)), r"\(5, 2\).*\(4, 5\)"),
        (lambda: Blast(outs=(2, 2, 2), ins=(2, 2), rank=1), r"\(2, 2, 2\)"),
        (lambda: Sum(parts=()), r"\[\]"),
        (lambda: Sum(parts=(LOW_RANK, LowRank(out_features=6, in_features=4, rank=1))), r"\(4, 6\), \(6, 4\)"),
        (lambda: Stacked(parts=(LOW_RANK, LowRank(out_features=4, in_features=5, rank=1))), r"\(4, 6\), \(4, 5\)"),
        (lambda: Scattered(base=LOW_RANK, out_features=3, in_features=6), "4 rows .* 3 rows"),
    ],
)
def test_integers_that_make_no_matrix_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


GOOD = {
    "factors": (("left", ("o", "k")), ("right", ("k", "i"))),
    "outs": ("o",),
    "ins": ("i",),
    "sizes": (("o", 2), ("i", 3), ("k", 2)),
}


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"outs": ("o", "z")}, "'z'.* no factor"),
        ({"sizes": (("o", 2), ("i", 3))}, "'k' has no size"),
        ({"factors": (("left", ("o", "o", "k")), ("right", ("k", "i")))}, "'left' has a label twice"),
        ({"outs": ("o",), "ins": ("i", "o")}, "must not share"),
        ({"sizes": (("o", 2), ("i", 3), ("k", -1))}, "'k' has size -1"),
        ({"factors": (("left", ("o", "(rows)")), ("right", ("(rows)", "i"))),
          "sizes": (("o", 2), ("i", 3), ("(rows)", 2))}, r"'\(rows\)'"),
        ({"factors": (("same", ("o", "k")), ("same", ("k", "i")))}, "'same'"),
    ],
)  # fmt: skip
def test_diagrams_that_make_no_matrix_are_refused(wrong, says):
    CustomEinsum(**GOOD)
    with pytest.raises(ValueError, match=says):
        CustomEinsum(**GOOD | wrong)


@pytest.mark.parametrize(
    "data, says",
    [
        ({"kind": "low_rang"}, "'low_rang'.*low_rank"),
        ({}, "None.*low_rank"),
        ({"kind": "low_rank", "out_features": 4, "in_features": 6, "rang": 2}, "'rang'.*rank"),
        ({"kind": "low_rank", "out_features": 4}, "in_features, rank"),
    ],
)
def test_json_of_no_structure_is_refused(data, says):
    with pytest.raises(ValueError, match=says):
        Structure.from_json(data)


def test_outputs_and_inputs_are_split_into_parts_of_their_own():
    assert CP.for_shape(12, 7, {"kind": "cp", "parts": [2, 1], "rank": 3}) == CP(outs=(4, 3), ins=(7,), rank=3)
    assert CP.for_shape(12, 6, {"kind": "cp", "parts": 2, "rank": 3}) == CP(outs=(4, 3), ins=(3, 2), rank=3)
    for wrong in ([1, 2, 3], "ab", [2, "x"], 1.5, None):
        with pytest.raises(ValueError, match=r"parts is .*, but into how many factors to split is one number, or two"):
            CP.for_shape(12, 6, {"kind": "cp", "parts": wrong, "rank": 3})


@each(ALL)
@pytest.mark.parametrize("rows", [(), (5,), (2, 3)], ids=str)
def test_where_matrices_are_told_their_product_is_the_whole(structure, rows):
    names, (out, inner) = structure.matrices, structure.shape
    if names is not None:
        factors, generator = factors_of(structure), torch.Generator().manual_seed(1)
        x, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((*rows, inner), (out,)))
        expected = x.numpy() @ matrix(structure, factors).T
        np.testing.assert_allclose(structure._apply_matrices(factors, x).numpy(), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            structure._apply_matrices(factors, x, bias).numpy(), expected + bias.numpy(), atol=1e-12
        )
    kinds = {"dense": ("matrix",), "low_rank": ("left", "right"), "kronecker": None, "stacked": None, "sum": None}
    assert names == kinds.get(structure.kind, names)


def test_a_label_that_three_factors_have_is_in_no_product_of_matrices():
    sizes = tuple({"o": 3, "i": 4, "r": 2, "s": 5}.items())

    def written(*factors):
        return CustomEinsum(
            factors=[(str(k), tuple(labels)) for k, labels in enumerate(factors)], outs="o", ins="i", sizes=sizes
        )

    three = written("or", "rs", "si")
    factors, x = factors_of(three), torch.eye(4, dtype=torch.float64)
    assert three.matrices == ("0", "1", "2")
    np.testing.assert_allclose(
        three._apply_matrices(factors, x).T.numpy(), matrix(three, factors), rtol=1e-12, atol=1e-12
    )
    for factors in (("oi", "ir", "ri"), ("or", "is"), ("ro", "ri"), ("o", "i"), ("or", "ri", "r")):
        assert written(*factors).matrices is None
