"""KFAC-SVD and LEMS: divergences measured by hand, ranks by every combination, gradients clipped one by one."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from plain import text
from toys import build

from tenfold.api import compress
from tenfold.baselines.lems import GAMMA, LEAST, REFERENCE, allocate_by_error_model, propagation
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.fisher import clip_norms
from tenfold.compression.resume_state import ResumeState
from tenfold.models.config import Calibrate
from tenfold.models.recipe import Budget, load_recipe
from tenfold.models.sites import find_sites, weight_of

WORDS = text(4, 40, padded=True)
toys = pytest.mark.parametrize("toy", ["gpt2", "llama"])


def recipe(keep: float = 0.6, **changes):
    found = load_recipe("kfac-svd-lems")
    settings = found.calibrate.model_copy(update=changes)
    return found.model_copy(update={"budget": Budget.model_construct(keep=keep, of="blocks"), "calibrate": settings})


def moments(model, path: str) -> torch.Tensor:
    rows = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: rows.append(a[0].double()))
    with torch.no_grad():
        for batch in WORDS.batches:
            model(**batch)
    hook.remove()
    mask = torch.cat([batch["attention_mask"] for batch in WORDS.batches]).bool()
    x = torch.cat(rows)[mask]
    return x.T @ x / len(x)


def root(matrix: torch.Tensor, power: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**power @ vectors.T


def shrunk(matrix: torch.Tensor, share: float) -> torch.Tensor:
    size = float(matrix.diagonal().mean())
    return (1 - share) * matrix + share * size * torch.eye(len(matrix), dtype=matrix.dtype)


def truncated(model, path: str, g: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the truncation of a matrix by KFAC-SVD, shrinking both moments, and its singular values."""
    w = weight_of(model.get_submodule(path)).detach().double()
    a, b = shrunk(moments(model, path), 0.1), shrunk(g, 0.3)
    u, s, v = torch.linalg.svd(root(b, 0.5) @ w @ root(a, 0.5), full_matrices=False)
    return root(b, -0.5) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ root(a, -0.5), s


@torch.no_grad()
def divergence(model, path: str, near: torch.Tensor) -> float:
    """Return the divergence in nats a token when one matrix is replaced."""
    other = copy.deepcopy(model)
    weight = other.get_submodule(path).weight
    weight.copy_(near if weight.shape == near.shape and "c_" not in path else near.T)
    total, tokens = 0.0, 0
    for batch in WORDS.batches:
        kept = batch["attention_mask"].bool()
        p, q = (m(**batch).logits[kept].double().log_softmax(-1) for m in (model, other))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + int(kept.sum())
    return total / tokens


@toys
def test_losses_are_scaled_to_the_measured_divergence(toy):
    before, state = build(toy), ResumeState()
    norm = before.get_submodule({"gpt2": "transformer.ln_f", "llama": "model.norm"}[toy])
    norm.weight.data.mul_(20)  # sure of itself, so that the divergence is not the same the other way round
    _, report = compress(copy.deepcopy(before), recipe(), text=WORDS, state=state)
    matters = {path: g for k in range(2) for path, g in state.statistics(k)[0].items()}
    seen = 0
    for choice in report["choices"]:
        if choice["chosen"] is None:
            continue
        path, rank = choice["item"], choice["chosen"]["rank"]
        out, inner = weight_of(before.get_submodule(path)).shape
        reference = max(1, int(REFERENCE * out * inner / (out + inner)))
        near, s = truncated(before, path, matters[path], reference)
        left = s.square().flip(0).cumsum(0).flip(0)
        measured = divergence(before, path, near)
        assert choice["loss"] == pytest.approx(measured * float(left[rank] / left[reference]), rel=0.02, abs=1e-7)
        seen += 1
    assert seen >= 5


@toys
def test_the_fit_is_optimal_in_the_shrunk_metrics(toy):
    before, state = build(toy), ResumeState()
    after, report = compress(copy.deepcopy(before), recipe(), text=WORDS, state=state)
    matters = {path: g for k in range(2) for path, g in state.statistics(k)[0].items()}
    folded = [choice for choice in report["choices"] if choice["chosen"] is not None]
    for choice in folded:
        path = choice["item"]
        best, _ = truncated(before, path, matters[path], choice["chosen"]["rank"])
        near = weight_of(after.get_submodule(path)).detach().double()
        torch.testing.assert_close(near, best, atol=2e-3, rtol=2e-2)


def test_errors_of_early_blocks_count_more():
    names = [f"model.layers.{block}.mlp.up_proj" for block in (0, 1, 2, 4)]
    np.testing.assert_allclose(propagation(names), [1 + GAMMA, 1 + 0.75 * GAMMA, 1 + 0.5 * GAMMA, 1])
    assert propagation(["h.0.x", "h.0.y"]) == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("keep", [0.35, 0.6, 0.8])
def test_ranks_have_the_least_modelled_error(seed, keep):
    draw, curves = np.random.default_rng(seed), []
    for layer in range(3):
        costs = np.sort(draw.choice(np.arange(1, 20), 5, replace=False))
        costs = np.append(costs, 20)
        losses = np.append(np.sort(draw.exponential(size=5))[::-1], 0.0)
        curves.append(TradeoffCurve(f"h.{layer}.x", costs, losses, list(costs)))
    budget, least = keep * 60, LEAST[0] if keep >= 0.5 else LEAST[1]
    ways = []
    for way in product(*(range(6) for _ in curves)):
        cost = [curve.costs[k] for curve, k in zip(curves, way, strict=True)]
        error = sum((1 + 5 * (2 - n) / 2) * c.losses[k] for n, (c, k) in enumerate(zip(curves, way, strict=True)))
        if sum(cost) <= budget and min(cost) >= least * 20:
            ways.append((error, cost))
    if not ways:
        return
    chosen = allocate_by_error_model(Calibrate(), curves, budget, {})
    at = [c.options.index(chosen[c.name]) for c in curves]
    error = sum((1 + 5 * (2 - n) / 2) * c.losses[k] for n, (c, k) in enumerate(zip(curves, at, strict=True)))
    assert error == pytest.approx(min(error for error, _ in ways))


def test_where_the_least_share_is_too_much_less_is_kept():
    curves = [TradeoffCurve(f"h.{k}.x", [1, 30, 100], [2.0, 1.0, 0.0], ["least", "more", "whole"]) for k in range(2)]
    assert set(allocate_by_error_model(Calibrate(), curves, 12, {}).values()) == {"least"}


def test_gradients_are_clipped_token_by_token():
    rows = torch.randn(50, 6) * torch.logspace(-4, 4, 50)[:, None]
    rows[7] = 0
    norms = [float(row.norm()) for row in rows]
    mean = sum(norms) / 49
    for row, new, norm in zip(rows, clip_norms(rows), norms, strict=True):
        wanted = min(max(norm, 0.1 * mean), 10 * mean) if norm else 0.0
        assert float(new.norm()) == pytest.approx(wanted, rel=1e-4)
        torch.testing.assert_close(new * norm, row * wanted, rtol=1e-4, atol=1e-4 * wanted)


def test_clipping_changes_the_metric_of_the_outputs():
    """At least one token of a toy has a gradient far below the mean."""
    metrics = []
    for weights in ("clipped", "none"):
        state = ResumeState()
        compress(build("llama"), recipe(token_weights=weights), text=WORDS, state=state)
        metrics.append(state.statistics(0)[0])
    path = "model.layers.0.self_attn.q_proj"
    assert metrics[0].keys() == metrics[1].keys() and not torch.equal(metrics[0][path], metrics[1][path])


def test_no_damping_of_outputs_of_their_own_is_that_of_inputs():
    path, after = "model.layers.1.mlp.up_proj", {}
    for name, given in {"own": {"output_damping": 0.2}, "one": {"output_damping": None}, "other": {}}.items():
        model, _ = compress(build("llama"), recipe(damping=0.2, allocate="uniform", **given), text=WORDS)
        after[name] = weight_of(model.get_submodule(path)).detach()
    torch.testing.assert_close(after["own"], after["one"])
    assert not torch.allclose(after["own"], after["other"], rtol=1e-3)


def test_sites_are_all_measured():
    report = compress(build("llama"), recipe(0.9), text=WORDS)[1]
    assert {c["item"] for c in report["choices"]} == {s.path for s in find_sites(build("llama")) if s.layer is not None}
    assert {choice["unit"] for choice in report["choices"]} == {"nats a token"}
