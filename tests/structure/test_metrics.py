"""Fits where errors count by what they do: ``tr(G E C E^T)`` with metrics of the inputs ``C`` and of the outputs ``G``."""

import numpy as np
import pytest
import torch
from cases import ALL, FAMILIES, each

from tenfold.structure import Dense, Kronecker, LowRank, Stacked, Structure, Sum
from tenfold.structure.linalg import roots

F64 = torch.float64
LOW = LowRank(out_features=6, in_features=8, rank=2)
SOME = {name: FAMILIES[name] for name in ("low_rank", "kronecker", "tensor_train", "block_train", "blast", "cp")}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def moment(size: int, seed: int) -> torch.Tensor:
    """Of correlated vectors whose directions matter very differently."""
    vectors = drawn(3 * size, size, seed=seed) * 1.5 ** torch.arange(size, dtype=F64) @ drawn(size, size, seed=9)
    return vectors.T @ vectors / vectors.square().sum()


def problem(structure) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``W``, ``C`` and ``G``."""
    out, inner = structure.shape
    return drawn(out, inner, seed=3), moment(inner, 5), moment(out, 6)


def lost(structure, factors, w, inputs, outputs) -> float:
    """``tr(G E C E^T)``, entry by entry."""
    rest = (w - structure.dense(factors)).numpy()
    return float(np.einsum("op,pi,ij,oj->", outputs.numpy(), rest, inputs.numpy(), rest))


def least(w, inputs, outputs, rank: int) -> float:
    """Of all matrices of this rank: the dropped squares of ``R^T W L`` (Eckart-Young)."""
    left, right = np.linalg.cholesky(outputs.numpy()), np.linalg.cholesky(inputs.numpy())
    return float((np.linalg.svd(left.T @ w.numpy() @ right, compute_uv=False)[rank:] ** 2).sum())


def eyes(structure) -> tuple[torch.Tensor, torch.Tensor]:
    out, inner = structure.shape
    return torch.eye(inner, dtype=F64), torch.eye(out, dtype=F64)


# where the best is known ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", range(1, 7))
@pytest.mark.parametrize("sides", ["both", "inputs", "outputs"])
def test_low_rank_is_the_best_in_both_metrics(rank, sides):
    low = LowRank(out_features=6, in_features=8, rank=rank)
    w, inputs, outputs = problem(low)
    plain_inputs, plain_outputs = eyes(low)
    factors = low.fit(w, None if sides == "outputs" else inputs, None if sides == "inputs" else outputs)
    metrics = (plain_inputs if sides == "outputs" else inputs, plain_outputs if sides == "inputs" else outputs)
    whole = lost(low, {name: 0 * value for name, value in factors.items()}, w, *metrics)
    assert lost(low, factors, w, *metrics) == pytest.approx(least(w, *metrics, rank), rel=1e-6, abs=1e-9 * whole)


def test_the_sizes_of_low_rank_tell_the_loss_of_every_rank():
    w, inputs, outputs = problem(LOW)
    sizes = LowRank.errors_by_size(w, {"kind": "low_rank"}, inputs, outputs)
    assert [structure.rank for structure, _ in sizes] == [1, 2, 3]  # at 4 a dense matrix is as small
    for structure, loss in sizes:
        assert loss == pytest.approx(least(w, inputs, outputs, structure.rank), rel=1e-6)


@pytest.mark.parametrize("kind", ["kronecker", "blast", "tensor_train", "tucker"])
def test_sizes_grow_and_tell_a_loss_that_a_fit_can_reach(kind):
    spec = {"kind": kind} | ({"outs": [4, 3], "ins": [4, 2]} if kind == "blast" else {})
    w, inputs, outputs = drawn(12, 8, seed=3), moment(8, 5), moment(12, 6)
    sizes = Structure.family(kind).errors_by_size(w, spec, inputs, outputs)
    counts = [structure.numel for structure, _ in sizes]
    assert counts == sorted(set(counts)) and len(counts) > 1
    for structure, loss in sizes:
        start = structure.metric_form(w, inputs, outputs) or structure.closed_form(w)
        start = start or structure.fit(w, inputs, start=structure.fit(w, sweeps=3), sweeps=3)
        assert loss == pytest.approx(lost(structure, start, w, inputs, outputs), rel=1e-9)
        assert lost(structure, structure.fit(w, inputs, outputs, sweeps=5), w, inputs, outputs) <= loss * (1 + 1e-9)


def test_a_dense_matrix_loses_nothing():
    dense = Dense(out_features=3, in_features=4)
    w, *metrics = problem(dense)
    assert torch.equal(dense.fit(w, *metrics)["matrix"], w)


def test_stacked_parts_are_the_best_where_the_metric_does_not_couple_them():
    parts = (LowRank(out_features=4, in_features=6, rank=1), LowRank(out_features=3, in_features=6, rank=2))
    stacked = Stacked(parts=parts)
    w, inputs, _ = problem(stacked)
    upper, lower = moment(4, 7), moment(3, 8)
    factors = stacked.metric_form(w, inputs, torch.block_diag(upper, lower))
    best = least(w[:4], inputs, upper, 1) + least(w[4:], inputs, lower, 2)
    assert lost(stacked, factors, w, inputs, torch.block_diag(upper, lower)) == pytest.approx(best, rel=1e-6)


def test_a_sum_fits_its_second_part_to_what_the_first_leaves():
    both = Sum(parts=(Kronecker(outs=(2, 3), ins=(4, 2)), LOW))
    w, inputs, outputs = problem(both)
    first = both.parts[0].closed_form(w)
    factors = both.metric_form(w, inputs, outputs)
    best = least(w - both.parts[0].dense(first), inputs, outputs, 2)
    assert lost(both, factors, w, inputs, outputs) == pytest.approx(best, rel=1e-6)


def test_low_ranks_with_one_right_factor_are_the_svd_of_their_whitened_stack():
    pair, inputs, rows = [drawn(6, 8, seed=k) for k in (1, 2)], moment(8, 5), [moment(6, 6), moment(6, 7)]
    factors = LOW.fit(pair, [inputs] * 2, rows, ["right"], sweeps=200)
    mine = [{"left": left, "right": factors["right"]} for left in factors["left"]]
    total = sum(lost(LOW, own, w, inputs, row) for own, w, row in zip(mine, pair, rows, strict=True))
    stack = np.concatenate([np.linalg.cholesky(row.numpy()).T @ w.numpy() for w, row in zip(pair, rows, strict=True)])
    values = np.linalg.svd(stack @ np.linalg.cholesky(inputs.numpy()), compute_uv=False)
    assert total == pytest.approx((values[2:] ** 2).sum(), rel=1e-4)


# where it is not --------------------------------------------------------------------------------------------------


@each(ALL)
@pytest.mark.parametrize("sides", ["outputs", "both"])
def test_a_fit_in_the_metrics_is_no_worse_in_them(structure, sides):
    """Than the fit without, from which it starts; and its factors fit the structure."""
    w, inputs, outputs = problem(structure)
    given = inputs if sides == "both" else None
    plain = structure.fit(w, sweeps=5)
    factors = structure.fit(w, given, outputs, start=plain, sweeps=5)
    structure.check_factors(factors)
    metrics = (eyes(structure)[0] if given is None else inputs, outputs)
    assert lost(structure, factors, w, *metrics) <= lost(structure, plain, w, *metrics) * (1 + 1e-9) + 1e-12


@each(SOME)
def test_metrics_gain(structure):
    w, inputs, outputs = problem(structure)
    ours = lost(structure, structure.fit(w, inputs, outputs, sweeps=50), w, inputs, outputs)
    for given in ((), (inputs,), (None, outputs)):
        assert ours < 0.99 * lost(structure, structure.fit(w, *given, sweeps=50), w, inputs, outputs)


@each({name: ALL[name] for name in ("low_rank", "kronecker", "block_train", "cp", "sum", "placed")})
def test_the_slope_is_small_at_the_end(structure):
    w, inputs, outputs = problem(structure)
    factors = structure.fit(w, inputs, outputs, sweeps=200)
    leaves = {name: factors[name].clone().requires_grad_() for name in structure.factor_shapes()}
    rest = w - structure.dense(factors | leaves)
    loss = (rest * (outputs @ rest @ inputs)).sum()
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    worst = max(float((slope * leaf.detach()).abs().sum()) for slope, leaf in zip(slopes, leaves.values(), strict=True))
    assert worst <= 1e-3 * float((w * (outputs @ w @ inputs)).sum())


def test_the_unit_of_a_metric_does_not_matter():
    w, inputs, outputs = problem(LOW)
    one, other = (LOW.dense(LOW.fit(w, 1e-6 * inputs * unit, outputs * unit)) for unit in (1.0, 1e12))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# roots -----------------------------------------------------------------------------------------------


def test_roots():
    gram = moment(7, 4)
    root, inverse = roots(gram)
    torch.testing.assert_close(root @ root, gram)
    torch.testing.assert_close(root @ inverse, torch.eye(7, dtype=F64), atol=1e-6, rtol=0)
    flat = torch.diag(torch.tensor([4.0, 1.0, 0.0, -1e-9], dtype=F64))
    root, inverse = roots(flat, floor=1e-4)
    torch.testing.assert_close(root, torch.diag(torch.tensor([2.0, 1.0, 0.02, 0.02], dtype=F64)))
    torch.testing.assert_close(root @ inverse, torch.eye(4, dtype=F64))
