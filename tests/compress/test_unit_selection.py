"""Units and bases against least squares on samples, one subset at a time."""

from itertools import combinations

import numpy as np
import pytest
import torch

from tenfold.compression import unit_selection
from tenfold.compression.unit_selection import best_basis, order_units_by_covariance, order_units_by_variance

OUT, UNITS, SAMPLES = 5, 7, 40
seeds = pytest.mark.parametrize("seed", range(4))


def moment(samples: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(samples.T @ samples / len(samples))


def problem(seed: int):
    """Return a reader ``(out, units)``, gradients ``(n, out)``, and correlated units ``(n, units)``."""
    draw = np.random.default_rng(seed)
    units = draw.normal(size=(SAMPLES, UNITS)) @ draw.normal(size=(UNITS, UNITS)) + draw.normal(size=UNITS)
    return draw.normal(size=(OUT, UNITS)), draw.normal(size=(2 * OUT, OUT)), units


def chosen_by(reader, directions, units):
    return order_units_by_covariance(torch.from_numpy(reader), moment(directions), moment(units))


def nats_left(reader, directions, units, kept) -> float:
    """Return the least loss over all matrices on the units ``kept``: half the mean square along the gradients."""
    wanted = units @ reader.T @ directions.T
    made = units[:, kept] @ np.linalg.lstsq(units[:, kept], wanted, rcond=None)[0] if kept else 0
    return float(((wanted - made) ** 2).sum()) / len(units) / len(directions) / 2


# units ------------------------------------------------------------------------------------------------------------


@seeds
def test_single_precision_chooses_as_well(seed):
    """Single precision is used where there are many units."""
    reader, directions, units = problem(seed)
    exact, nearly = (
        order_units_by_covariance(torch.from_numpy(reader), moment(directions), moment(units).to(kind))
        for kind in (torch.float64, torch.float32)
    )
    assert exact[0] == nearly[0]
    np.testing.assert_allclose(nearly[1], exact[1], rtol=1e-3, atol=1e-4 * exact[1][0])


@seeds
def test_the_losses_are_those_of_least_squares(seed):
    given = problem(seed)
    order, losses = chosen_by(*given)
    assert sorted(order) == list(range(UNITS))
    slow = [nats_left(*given, order[:k]) for k in range(UNITS + 1)]
    np.testing.assert_allclose(losses, slow, rtol=1e-8, atol=1e-10 * slow[0])
    assert (np.diff(losses) <= 0).all() and losses[-1] <= 1e-12 * losses[0]


@seeds
def test_every_unit_is_the_best_one_next_to_those_chosen(seed):
    given = problem(seed)
    order, _ = chosen_by(*given)
    for k in range(UNITS):
        tries = {unit: nats_left(*given, [*order[:k], unit]) for unit in order[k:]}
        assert tries[order[k]] <= min(tries.values()) * (1 + 1e-9) + 1e-12


@seeds
def test_a_copy_and_a_unit_that_is_not_read_come_last(seed):
    reader, directions, units = problem(seed)
    units[:, 3] = -2 * units[:, 5]
    units[:, 2] = np.random.default_rng(seed).normal(size=SAMPLES)
    reader[:, 2] = 0.0
    order, losses = chosen_by(reader, directions, units)
    assert np.isfinite(losses).all() and losses[UNITS - 2] <= 1e-10 * losses[0] < losses[UNITS - 3]
    assert len({2, 3, 5} & set(order[: UNITS - 2])) == 1  # one of the copies


@seeds
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_several_at_once_are_chosen_nearly_as_well(seed, steps, monkeypatch):
    """The losses are still those of least squares, and their sum is below that of random orders."""
    given = reader, directions, units = problem(seed)
    monkeypatch.setattr(unit_selection, "MAX_STEPS", steps)
    order, losses = chosen_by(*given)
    slow = [nats_left(*given, order[:k]) for k in range(UNITS + 1)]
    np.testing.assert_allclose(losses, slow, rtol=1e-6, atol=1e-10 * slow[0])
    others = [np.random.default_rng(k).permutation(UNITS).tolist() for k in range(8)]
    at_random = [sum(nats_left(*given, other[:k]) for k in range(UNITS + 1)) for other in others]
    assert sorted(order) == list(range(UNITS)) and sum(losses) < min(at_random)
    units[:, 3] = -2 * units[:, 5]
    order, losses = chosen_by(reader, directions, units)
    assert np.isfinite(losses).all() and sorted(order) == list(range(UNITS))


def test_units_that_matter_for_nothing_have_an_order_too():
    _, directions, units = problem(0)
    order, losses = chosen_by(np.zeros((OUT, UNITS)), directions, units)
    assert sorted(order) == list(range(UNITS)) and not losses.any()


# bases ------------------------------------------------------------------------------------------------------------


def nats_lost(outputs: torch.Tensor, second: torch.Tensor, near: torch.Tensor) -> float:
    """Return ``1/2 tr(G (1 - P) C (1 - P)^T)``, entry by entry."""
    rest = np.eye(len(near)) - near.numpy()
    return float(np.einsum("ab,bc,cd,ad->", outputs.numpy(), rest, second.numpy(), rest)) / 2


def first(there: torch.Tensor, back: torch.Tensor, k: int) -> torch.Tensor:
    return back[:, :k] @ there[:k]


@seeds
def test_a_basis_goes_there_and_back_and_loses_what_it_says(seed):
    _, directions, units = problem(seed)
    outputs, second = moment(directions @ np.random.default_rng(9).normal(size=(OUT, UNITS))), moment(units)
    outputs += 0.1 * torch.eye(UNITS)
    basis = best_basis(outputs, second)
    torch.testing.assert_close(basis.forward @ basis.inverse, torch.eye(UNITS, dtype=torch.float64))
    slow = [nats_lost(outputs, second, first(basis.forward, basis.inverse, k)) for k in range(UNITS + 1)]
    np.testing.assert_allclose(basis.losses, slow, rtol=1e-8, atol=1e-10 * slow[0])


@seeds
def test_no_other_basis_is_better(seed):
    """The least loss is the sum of the dropped singular values of the product of any two roots (Eckart-Young)."""
    _, directions, units = problem(seed)
    outputs, second = moment(directions)[:4, :4] + 0.1 * torch.eye(4), moment(units[:, :4])
    losses = best_basis(outputs, second).losses
    values = np.linalg.svd(np.linalg.cholesky(outputs).T @ np.linalg.cholesky(second), compute_uv=False)
    np.testing.assert_allclose(losses, [(values[k:] ** 2).sum() / 2 for k in range(5)], atol=1e-10 * losses[0])
    for other in torch.randn(50, 4, 4, dtype=torch.float64):
        tries = [nats_lost(outputs, second, first(other, other.inverse(), k)) for k in range(5)]
        assert (losses <= np.array(tries) + 1e-9 * losses[0]).all()


@seeds
def test_units_that_go_together_are_ranked_by_what_they_lose(seed):
    """Where the dimensions are not correlated: the losses are the measured ones, and no other set of units loses less."""
    units = [[0, 3], [1, 4], [2, 5], [6]]
    _, directions, samples = problem(seed)
    outputs = moment(directions @ np.random.default_rng(9).normal(size=(OUT, UNITS)))
    second = moment(samples).diagonal().diag()
    order, losses = order_units_by_variance(outputs, second, units)
    assert sorted(order) == [0, 1, 2, 3]

    def lost(kept) -> float:
        stays = torch.zeros(UNITS, dtype=torch.float64)
        stays[[i for unit in kept for i in units[unit]]] = 1.0
        return nats_lost(outputs, second, stays.diag())

    np.testing.assert_allclose(losses, [lost(order[:k]) for k in range(5)], atol=1e-10 * losses[0])
    for k in range(5):
        assert losses[k] <= min(lost(kept) for kept in combinations(range(4), k)) + 1e-10 * losses[0]
