"""Estimated losses of pruning, from gradients and activations of plain runs in float64."""

import numpy as np
import pytest
import torch
from idle import HEADS
from models import toys
from plain import gradients, moment, seen, text
from transformers.pytorch_utils import Conv1D

from tenfold.compression import block, head_pruning, pruning_criteria, structured_pruning
from tenfold.compression.compress import compress
from tenfold.compression.evidence import scale_losses
from tenfold.models.sites import find_sites

WORDS = text(16)


@pytest.fixture
def by_moments(monkeypatch):
    """Leave the curves as moments give them, not scaled by gradients token by token."""
    for module in (structured_pruning, head_pruning):
        monkeypatch.setattr(module, "scale_losses", lambda losses, measured: losses)
    monkeypatch.setattr(block, "fisher_losses", lambda *given: (0.0, 0.0))
    monkeypatch.setattr(structured_pruning, "split_halves", lambda *given: [])


PAIRS = {  # dimensions of queries and keys that go together
    "llama": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "phi": [[0, 2], [1, 3], [4], [5], [6], [7]],
    "gpt_neox": [[0, 1], [2], [3], [4], [5], [6], [7]],
}


def foreseen(model, kind: str) -> dict[str, tuple[int, float]]:
    """Return ``{item: (how many stay, nats)}`` in the last block."""
    told: list[dict] = []
    recipe = {"replace": [{"prune": kind, "layers": [1]}], "budget": {"keep": 0.6}, "calibrate": {"damping": 1e-8}}
    compress(model, recipe, text=WORDS, announce=told.extend)
    return {choice["item"]: (choice["chosen"], choice["loss"]) for choice in told}


def path_of(model, *roles: str) -> str:
    return next(site.path for site in find_sites(model) if site.layer == 1 and site.role in roles)


def matrix(model, path: str) -> np.ndarray:
    module = model.get_submodule(path)
    weight = module.weight.detach().double().numpy()
    return weight.T if isinstance(module, Conv1D) else weight


def centred(x: np.ndarray, free: bool) -> np.ndarray:
    """Subtract the mean where a bias absorbs it."""
    return x - x.mean(0) if free else x


def dropped(outputs: np.ndarray, inputs: np.ndarray, kept: int) -> float:
    """Return the least ``tr(G (1 - P) C (1 - P)^T) / 2`` over all ``P`` of this rank (Eckart-Young)."""
    left, right = (np.linalg.cholesky(m + 1e-12 * np.trace(m) * np.eye(len(m))) for m in (outputs, inputs))
    return float((np.linalg.svd(left.T @ right, compute_uv=False)[kept:] ** 2).sum()) / 2


def greedy(lost: np.ndarray, count: int) -> float:
    """Return half the mean square of the sum of ``count`` columns of ``lost (tokens, units)``, chosen one at a time."""
    gone: list[int] = []
    for _ in range(count):
        costs = {k: (lost[:, [*gone, k]].sum(1) ** 2).mean() for k in range(lost.shape[1]) if k not in gone}
        gone.append(min(costs, key=costs.get))
    return float((lost[:, gone].sum(1) ** 2).mean()) / 2


def head(x: np.ndarray, number: int, size: int) -> np.ndarray:
    return x[..., number * size : (number + 1) * size]


def members(name: str, group: int) -> range:
    query, groups, _, _ = HEADS[name]
    return range(group * query // groups, (group + 1) * query // groups)


@pytest.mark.parametrize("name", HEADS)
def test_values_lose_what_the_output_matrix_would_miss(name, known_draws, by_moments):
    model, size = toys.build(name), HEADS[name][2]
    path = path_of(model, "attn.out")
    inputs, reads, matters = seen(model, WORDS, path)[0], matrix(model, path), moment(gradients(model, WORDS, path))
    inputs = centred(inputs, model.get_submodule(path).bias is not None)
    found = foreseen(toys.build(name), "attention")
    for group in range(HEADS[name][1]):
        mine = members(name, group)
        outputs = sum(head(reads, h, size).T @ matters @ head(reads, h, size) for h in mine)
        second = sum(moment(head(inputs, h, size)) for h in mine) / len(mine)
        kept, nats = found[f"{path} v{group}"]
        assert nats == pytest.approx(dropped(outputs, second, kept), rel=1e-2)


@pytest.mark.parametrize("name", [name for name, (*_, idle) in HEADS.items() if idle != []])
def test_queries_lose_what_the_scores_would_miss(name, known_draws, by_moments):
    model, size = toys.build(name), HEADS[name][2]
    path, out = path_of(model, "attn.q", "attn.qkv"), path_of(model, "attn.out")
    made, matters = seen(model, WORDS, path)[1], gradients(model, WORDS, path)
    found = foreseen(toys.build(name), "attention")
    for group in range(HEADS[name][1]):
        mine = [3 * h if name == "gpt_neox" else h for h in members(name, group)]  # there keys and values lie between
        outputs = sum(moment(head(matters, h, size)) for h in mine)
        second = sum(moment(head(made, h, size)) for h in mine) / len(mine)
        kept, nats = found[f"{out} q{group}"]
        if name in PAIRS:
            each = [head(made, h, size) * head(matters, h, size) for h in mine]
            lost = np.stack([sum(one[:, unit].sum(1) for one in each) for unit in PAIRS[name]], 1)
            expected = greedy(lost, len(PAIRS[name]) - kept)
        else:
            expected = dropped(outputs, second, kept)
        assert nats == pytest.approx(expected, rel=3e-2)  # one may go for another that costs as much


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_queries_and_keys_with_norms_stay(name):
    model = toys.build(name)
    found = foreseen(model, "attention")
    assert {item[-2:]: kept for item, (kept, _) in found.items() if item[-2] == "q"} == {"q0": None, "q1": None}
    names = {site.role: type(model.get_submodule(site.path)).__name__ for site in find_sites(model) if site.layer == 1}
    assert names["attn.q"] == names["attn.k"] == "Linear" and names["attn.v"] == "FactorizedLinear"


@pytest.mark.parametrize("name", HEADS)
def test_hidden_units_lose_what_the_others_cant_make_up_for(name, known_draws, by_moments):
    model, after = toys.build(name), toys.build(name)
    path, into = path_of(model, "mlp.out"), path_of(model, "mlp.in")
    hidden, reads, matters = seen(model, WORDS, path)[0], matrix(model, path), gradients(model, WORDS, path)
    ((kept, nats),) = foreseen(after, "mlp").values()
    rows, left = matrix(model, into), after.get_submodule(into).dense().detach().double().numpy()
    found = [int(((rows - row) ** 2).sum(1).argmin()) for row in left]  # which units stayed
    assert len(set(found)) == kept < len(rows)
    hidden = centred(hidden, model.get_submodule(path).bias is not None)
    wanted = hidden @ reads.T @ matters.T
    rest = wanted - hidden[:, found] @ np.linalg.lstsq(hidden[:, found], wanted, rcond=None)[0]
    assert nats == pytest.approx(float((rest**2).sum()) / len(hidden) / len(matters) / 2, rel=1e-2)


def test_what_tokens_cost_together_raises_all_curves_alike(known_draws, monkeypatch):
    losses = []
    for times in (1.0, 3.0):
        monkeypatch.setattr(block, "fisher_losses", lambda *given, times=times: (1e-3, times * 1e-3))
        losses.append(foreseen(toys.build("llama"), "mlp"))
    for item, (kept, nats) in losses[0].items():
        assert losses[1][item] == (kept, pytest.approx(3 * nats, rel=1e-9)) and nats > 0


@pytest.mark.parametrize("worse", ["by moments", "by gradients"])
def test_the_better_of_two_orders_of_units_is_taken(worse, monkeypatch):
    """One order is by moments, one by gradients; here one of them drops the best units first."""
    taken = []

    def watched(order: str, choose):
        def chosen(*given):
            found, losses = choose(*given)
            found = found[::-1] if order == worse else found
            taken.append((order, found))
            return found, losses

        return chosen

    for module, order, choose in (
        (pruning_criteria, "by moments", "order_units_by_covariance"),
        (structured_pruning, "by gradients", "order_units_by_products"),
    ):
        monkeypatch.setattr(module, choose, watched(order, getattr(module, choose)))
    model, after = toys.build("gpt2"), toys.build("gpt2")
    with torch.no_grad():  # some units that matter, and many that do not
        for one in (model, after):
            one.get_submodule(path_of(one, "mlp.out")).weight[4:].mul_(0.01)
    ((kept, _),) = foreseen(after, "mlp").values()
    into = path_of(model, "mlp.in")
    rows, left = matrix(model, into), after.get_submodule(into).dense().detach().double().numpy()
    found = {int(((rows - row) ** 2).sum(1).argmin()) for row in left}
    orders = dict(taken[:2])  # what comes behind is of halves of the text
    assert found != set(orders[worse][:kept]) and set(range(4)) <= found


@pytest.mark.parametrize("name", ["gpt2", "phi", "gpt_neox"])
def test_dropped_rows_say_nothing(name):
    """Their biases are zero, too, which rotary positions would pass on."""
    model = toys.build(name)
    foreseen(model, "attention")
    for site in find_sites(model):
        if site.layer == 1 and site.role in ("attn.q", "attn.k", "attn.v", "attn.qkv"):
            made = seen(model, WORDS, site.path)[1]
            assert made.any(0).sum() == len(model.get_submodule(site.path).rows) < site.shape[0]


def test_a_curve_is_scaled_by_what_gradients_say(known_draws, monkeypatch):
    """The scale is the ratio of the losses at three sizes, by gradients and by moments, in the mean of logarithms."""
    seen_before: list[tuple[np.ndarray, dict]] = []
    monkeypatch.setattr(head_pruning, "scale_losses", lambda losses, told: seen_before.append((losses, told)) or losses)
    foreseen(toys.build("llama"), "attention")
    assert sorted({len(told) for _, told in seen_before}) == [0, 3]  # pairs go by gradients in the first place
    for losses, told in (pair for pair in seen_before if pair[1]):
        found = scale_losses(losses, told)
        apart = [np.log(loss / found[k]) for k, loss in told.items()]
        scale = found[losses > 0] / losses[losses > 0]
        assert abs(np.mean(apart)) < 1e-9 and np.allclose(scale, scale[0])
