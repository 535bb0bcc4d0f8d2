"""The permutation search finds planted orders, beats chance, and never makes things worse."""

import sys

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tenfold.structure import BlockTensorTrain, Kronecker, LowRank, Scattered, Sum, TensorTrain, permutation_search
from tenfold.structure.permutation_search import search

F64 = torch.float64
BASES = {
    "kronecker": Kronecker(outs=(8, 2), ins=(6, 2), terms=2),
    "kronecker-large-inner": Kronecker(outs=(2, 8), ins=(2, 6), terms=2),
    "kronecker-three": Kronecker(outs=(6, 2, 2), ins=(5, 1, 2), terms=2),
    "kronecker-last": Kronecker(outs=(2, 2, 6), ins=(2, 1, 5), terms=2, scaled=True),
    "tensor_train": TensorTrain(outs=(4, 4), ins=(3, 4), ranks=(3,)),
    "block_train": BlockTensorTrain(outs=(4, 4), ins=(4, 3), rank=1),
    "sum": Sum(parts=(LowRank(out_features=16, in_features=12, rank=1), Kronecker(outs=(8, 2), ins=(6, 2)))),
}


def placed(base, rows: bool = True, columns: bool = True) -> Scattered:
    return Scattered(
        base=base, out_features=base.shape[0], in_features=base.shape[1], map_rows=rows, map_columns=columns
    )


def kronecker(outs, ins, terms: int = 1, **more) -> Scattered:
    """Rows are mapped unless every block has one row only, as of an embedding."""
    return placed(Kronecker(outs=outs, ins=ins, terms=terms, **more), rows=sum(outs[1:]) > len(outs[1:]))


def error(structure, factors, weight) -> float:
    return float((weight - structure.dense(factors)).norm() / weight.norm())


def search_error(structure, weight, **options) -> float:
    return error(structure, search(structure, weight, **options), weight)


def planted(structure: Scattered, noise: float, seed: int):
    """A permuted member with noise on it, and its own error."""
    generator = torch.Generator().manual_seed(seed)
    factors = structure.init(1.0, generator, F64)
    weight = structure.dense(factors)
    weight = weight + noise * torch.randn(weight.shape, generator=generator, dtype=F64)
    maps = [factors.get(side, torch.arange(n)) for side, n in zip(("rows", "columns"), weight.shape, strict=True)]
    return weight, error(structure, structure.fit_at(weight, *maps), weight)


def trained_like(out: int, inner: int, seed: int = 0) -> torch.Tensor:
    """Singular values that fall like a power, in bases that are not the axes', and rows and columns of unequal norm."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(out, inner, generator=generator, dtype=F64)
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    spectrum = torch.arange(1, len(v) + 1, dtype=F64) ** -0.5
    scales = [torch.randn(n, generator=generator, dtype=F64).mul(0.2).exp() for n in (out, inner)]
    return scales[0][:, None] * ((u * spectrum) @ v) * scales[1]


def best_of_random(structure: Scattered, weight: torch.Tensor, draws: int = 100) -> float:
    generator = torch.Generator().manual_seed(0)
    identity = [torch.arange(n) for n in weight.shape]
    errors = []
    for _ in range(draws):
        maps = [torch.randperm(len(i), generator=generator) for i in identity]
        maps = [m if mapped else i for m, i, mapped in zip(maps, identity, (structure.map_rows, True), strict=True)]
        errors.append(error(structure, structure.fit_at(weight, *maps), weight))
    return min(errors)


# what it finds ----------------------------------------------------------------------------------------------------


PLANTED = {"columns": (kronecker((48, 1), (24, 2)), 0.1, 0), "large inner": (kronecker((2, 16), (2, 24)), 0.1, 2)}


@pytest.mark.parametrize(("structure", "noise", "seed"), PLANTED.values(), ids=PLANTED)
def test_planted_order_is_found_under_noise(structure, noise, seed):
    weight, reached = planted(structure, noise, seed)
    assert error(structure, structure.closed_form(weight), weight) > 2 * reached
    assert search_error(structure, weight, starts=3) <= reached + 1e-9


@pytest.mark.parametrize("structure", [kronecker((64, 2), (48, 2)), kronecker((48, 1, 1), (16, 2, 2))])
def test_planted_order_of_rows_and_columns_is_found_exactly(structure):
    weight, _ = planted(structure, noise=0.0, seed=1)
    assert search_error(structure, weight) < 1e-6


TRAINED = {  # shares of the random one's error that falling norms alone do not reach
    "rows and columns": (kronecker((64, 4), (32, 2), terms=4), 0.75),
    "one term": (kronecker((64, 2), (32, 2), terms=1), 0.8),
    "columns": (kronecker((256, 1), (32, 2)), 0.83),
    "three factors": (kronecker((256, 1, 1), (16, 2, 2)), 0.88),
    "three factors, rows too": (kronecker((16, 2, 2), (12, 1, 2), terms=2), 0.8),
}


@pytest.mark.parametrize(("structure", "share"), TRAINED.values(), ids=TRAINED)
def test_beats_the_identity_and_the_best_of_a_hundred_random_orders(structure, share):
    weight = trained_like(*structure.shape)
    found = search_error(structure, weight)
    assert found < share * error(structure, structure.closed_form(weight), weight)
    assert found < share * best_of_random(structure, weight)


def test_a_general_base_gains_too():
    structure, weight = placed(BASES["sum"]), trained_like(16, 12)
    start = search_error(structure, weight, starts=0)
    assert search_error(structure, weight) < 0.89 * start < search_error(structure, weight, rounds=0)


# what it never does -----------------------------------------------------------------------------------------------


EACH = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


@EACH
def test_never_farther_than_with_the_identity(base):
    structure, weight = placed(base), torch.randn(base.shape, dtype=F64)
    found = search_error(structure, weight, rounds=1)
    assert found <= error(structure, structure.fit(weight, sweeps=50), weight) + 1e-9


@EACH
def test_a_member_in_order_stays_as_it_is(base):
    structure = placed(base)
    weight = base.dense(base.init(1.0, torch.Generator().manual_seed(0), F64))
    assert search_error(structure, weight, rounds=1) < 1e-4


@EACH
def test_the_error_never_grows_and_is_what_the_factors_leave(base):
    structure, weight = placed(base), trained_like(*base.shape)
    assign, generator = linear_sum_assignment, torch.Generator().manual_seed(0)
    kind = permutation_search.KroneckerTrial if isinstance(base, Kronecker) else permutation_search.Trial
    orders = {side: torch.randperm(n) for side, n in zip(permutation_search.SIDES, base.shape, strict=True)}
    trial = kind(structure, weight).restart(orders)
    first = trial.error
    for step in range(12):
        before, side = trial.error, permutation_search.SIDES[step % 2]
        exchange = trial.draw_exchange(side, generator)
        order = exchange.assign_rows(assign)
        saved = float(exchange.gains(order).sum())
        assert saved >= -1e-5 * first  # of float32
        trial.move(side, exchange, order)
        assert trial.error <= before - saved + 1e-9 * first  # the fit that follows can only add to it
    assert error(structure, trial.factors(), weight) ** 2 * weight.square().sum() == pytest.approx(trial.error)
    assert trial.error < 0.999 * first or not isinstance(base, Kronecker)


@pytest.mark.parametrize("side", permutation_search.SIDES)
def test_an_exchange_knows_its_gain_before_any_fit(side):
    """``sum x^T (1 - P) x`` over the blocks, before and after: random orders, so the gain may be a loss."""
    structure = kronecker((6, 3), (5, 2), terms=2)
    trial = permutation_search.KroneckerTrial(structure, torch.randn(structure.shape, dtype=F64))
    generator = torch.Generator().manual_seed(0)
    rest = trial.complement
    for _ in range(5):
        exchange = trial.draw_exchange(side, generator)
        order = torch.randperm(len(exchange.items))
        lost = [left_by(rest, trial.blocks)]
        trial.fit = lambda: None  # the projection stays
        trial.move(side, exchange, order)
        lost.append(left_by(rest, trial.blocks))
        assert float(exchange.gains(order).sum()) == pytest.approx(lost[0] - lost[1], abs=1e-9)


def left_by(rest, blocks) -> float:
    flat = blocks.flatten(2).flatten(0, 1)
    return float(torch.einsum("nb,bc,nc->", flat, rest, flat))


def test_more_rounds_and_more_starts_are_never_worse():
    structure, weight = kronecker((16, 4), (16, 2), terms=2), trained_like(64, 32)
    rounds = [search_error(structure, weight, rounds=n) for n in range(5)]
    structure, weight = kronecker((16, 1), (12, 2)), trained_like(16, 24, seed=3)
    starts = [search_error(structure, weight, rounds=1, starts=n) for n in range(6)]
    assert [rounds, starts] == [sorted(errors, reverse=True) for errors in (rounds, starts)]
    assert rounds[-1] < rounds[1] and starts[5] < starts[1] < starts[0]


def test_a_seed_fixes_everything():
    structure, weight = kronecker((16, 2), (12, 2)), trained_like(32, 24)
    one, same, other = (search(structure, weight, starts=3, rounds=1, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["rows"], other["rows"])


# what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kronecker", "kronecker-last", "block_train"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", ""])
@pytest.mark.parametrize("columns", [True, False], ids=["columns", ""])
def test_maps_are_whole_permutations_of_the_mapped_sides(kind, rows, columns):
    structure = placed(BASES[kind], rows, columns)
    weight = torch.randn(structure.shape)
    factors = search(structure, weight, starts=3, rounds=1)
    structure.check_factors(factors)
    assert {side for side in permutation_search.SIDES if side in factors} == set(structure.index_shapes())
    for side in structure.index_shapes():
        assert factors[side].dtype == torch.int32
        assert factors[side].sort().values.equal(torch.arange(len(factors[side]), dtype=torch.int32))
    others = [value for name, value in factors.items() if name not in permutation_search.SIDES]
    assert all(value.dtype == F64 for value in others)
    assert (
        error(structure, factors, weight.double()) <= error(structure, structure.fit(weight, sweeps=50), weight) + 1e-9
    )


def test_factors_share_their_norm_and_the_scalars_are_one():
    structure = kronecker((6, 2), (5, 2), terms=2, scaled=True)
    factors = search(structure, torch.randn(12, 10))
    assert factors["outer"].norm(dim=(1, 2)).tolist() == pytest.approx(factors["inner"].norm(dim=(1, 2)).tolist())
    assert factors["scale"].tolist() == [1, 1]


def test_two_stages_are_one_order():
    """What both stages lose adds up: the table that the second folds is a projection of the weight."""
    whole, weight = kronecker((24, 2, 2), (12, 1, 2)), trained_like(96, 24)
    trial = permutation_search.KroneckerTrial(whole, weight)
    [orders] = trial.search_stages(rounds=2, seed=0)
    pairs, folded = kronecker((48, 2), (12, 2)), kronecker((24, 2), (12, 1))
    first = search(pairs, weight, rounds=2)
    table = first["outer"][0] * first["inner"].norm()
    second = search(folded, table, rounds=2)
    lost = error(pairs, first, weight) ** 2 + (error(folded, second, table) * table.norm() / weight.norm()) ** 2
    assert trial.restart(orders).error / weight.square().sum() <= lost + 1e-9


def test_a_large_matrix_is_exchanged_in_parts(monkeypatch):
    monkeypatch.setattr(permutation_search, "LARGEST", 10)
    structure, weight = kronecker((32, 2), (24, 2)), trained_like(64, 48)
    assert (
        len(permutation_search.KroneckerTrial(structure, weight).draw_exchange("rows", torch.Generator()).items) == 10
    )
    found = search_error(structure, weight, rounds=3)
    assert found < 0.97 * best_of_random(structure, weight)


def test_many_rows_that_stay_cost_no_more_than_their_gram_matrix():
    structure, weight = kronecker((500, 1), (6, 2)), trained_like(500, 12)
    trial = permutation_search.KroneckerTrial(structure, weight)
    assert trial.source.shape == (12, 12)
    assert trial.error == pytest.approx(float(weight.square().sum()) * error(structure, trial.factors(), weight) ** 2)


# what it refuses --------------------------------------------------------------------------------------------------


def test_without_scipy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'tenfold\[search\]'"):
        search(kronecker((4, 2), (3, 2)), torch.randn(8, 6))


@pytest.mark.parametrize(
    ("structure", "weight", "words"),
    [
        (kronecker((4, 2), (3, 2)), torch.ones(6, 8), r"\(6, 8\)"),
        (kronecker((4, 2), (3, 2)), torch.full((8, 6), torch.nan), "NaN"),
        (
            Scattered(base=Kronecker(outs=(4, 2), ins=(3, 2)), out_features=9, in_features=6),
            torch.ones(9, 6),
            "whole",
        ),
    ],
)
def test_refuses_what_it_cannot_search(structure, weight, words):
    with pytest.raises(ValueError, match=words):
        search(structure, weight)
