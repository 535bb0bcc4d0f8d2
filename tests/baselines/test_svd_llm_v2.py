"""SVD-LLM v2: shares by hand, and the paper's two SVDs, in plain NumPy."""

import copy

import numpy as np
import pytest
import torch
from toys import build

from tenfold.api import compress
from tenfold.baselines.svd_llm_v2 import TOKENS, allocate_by_type, removed_ratios
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.calibration import Calibration
from tenfold.models.config import Calibrate
from tenfold.models.recipe import load_recipe
from tenfold.models.sites import find_sites, weight_of
from tenfold.structure import LowRank


def test_shares_within_a_type_go_with_the_inverse_logarithm():
    losses = np.array([1e3, 1e5, 1e7])
    lost = removed_ratios(losses, 0.4, np.full(3, 0.99))
    inverse = 1 / np.log(losses)
    np.testing.assert_allclose(lost, 3 * 0.4 * inverse / inverse.sum())
    assert lost.mean() == pytest.approx(0.4) and (np.diff(lost) < 0).all()


def test_what_a_matrix_cant_lose_the_others_do():
    lost = removed_ratios(np.array([3.0, 1e9, 1e9]), 0.6, np.array([0.7, 0.9, 0.9]))
    np.testing.assert_allclose(lost, [0.7, 0.55, 0.55])


def test_losses_too_small_for_a_logarithm_count_as_the_least():
    np.testing.assert_allclose(removed_ratios(np.array([0.0, 0.5, 1.0, 2.0]), 0.3, np.ones(4)), 0.3)


def test_each_type_has_the_budget_to_itself():
    """There are two types in two layers; the loss that counts is that at the uniform ratio."""
    costs = np.arange(1, 1001)

    def curve(name: str, norm: float) -> TradeoffCurve:
        half = norm**2 / TOKENS / 2  # of the mean squared error, where 40 % stay
        return TradeoffCurve(name, costs, half * (1000 - costs) / 600, list(costs))

    norms = {"h.0.a": 1e2, "h.1.a": 1e4, "h.0.b": 1e3, "h.1.b": 1e6}
    chosen = allocate_by_type(Calibrate(), [curve(*pair) for pair in norms.items()], 1600, {})
    for kind in "ab":
        inverse = np.array([1 / np.log(norms[f"h.{layer}.{kind}"]) for layer in (0, 1)])
        best = 1000 * (1 - 2 * 0.6 * inverse / inverse.sum())
        np.testing.assert_allclose([chosen[f"h.{layer}.{kind}"] for layer in (0, 1)], best, atol=1.5)
    assert sum(chosen.values()) <= 1600


@pytest.mark.parametrize("seed", range(3))
def test_two_svds_truncate_to_the_same_matrix(seed):
    """Also for inputs of few dimensions, on which a Cholesky decomposition fails."""
    draw = np.random.default_rng(seed)
    x, w = draw.normal(size=(200, 5)) @ draw.normal(size=(5, 12)), draw.normal(size=(9, 12))
    second = x.T @ x / len(x)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(second - 1e-12 * np.eye(12))
    us, ss, _ = np.linalg.svd(second)
    u, s, v = np.linalg.svd(w @ us * np.sqrt(ss), full_matrices=False)
    best = ((u[:, :3] * s[:3]) @ v[:3] / np.sqrt(ss)) @ us.T
    structure = LowRank(out_features=9, in_features=12, rank=3)
    near = structure.dense(structure.fit(torch.tensor(w), torch.tensor(second), None)).numpy()
    np.testing.assert_allclose(x @ near.T, x @ best.T, atol=1e-3)


def test_the_model_loses_what_is_left_over():
    ids = torch.randint(3, 97, (4, 48), generator=torch.Generator().manual_seed(1))
    text = Calibration([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], {})
    before = build("llama")
    after, report = compress(copy.deepcopy(before), load_recipe("svd-llm-v2"), text=text)
    ranks = {choice["item"]: choice["chosen"] for choice in report["choices"]}
    sites = [site for site in find_sites(before) if site.layer is not None]
    assert len(ranks) == len(sites)
    for site in sites:
        rows = []
        hook = before.get_submodule(site.path).register_forward_pre_hook(
            lambda m, a, rows=rows: rows.append(a[0].flatten(0, 1).double())
        )
        with torch.no_grad():
            before(ids)
        hook.remove()
        w, near = (weight_of(m.get_submodule(site.path)).detach().double() for m in (before, after))
        dropped = torch.linalg.svdvals(rows[0] @ w.T)[ranks[site.path]["rank"] :].square().sum()
        assert float((rows[0] @ (w - near).T).square().sum()) == pytest.approx(float(dropped), rel=5e-3)
