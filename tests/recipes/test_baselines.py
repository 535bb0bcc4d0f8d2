"""Every baseline on an invariant of its own, measured without the package where possible."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from toys import build, inputs, logits
from transformers import AutoModelForCausalLM

from tenfold.api import compress
from tenfold.baselines.drop_layers import measure_influence
from tenfold.baselines.modegpt import influence_ratios, leverage_scores
from tenfold.baselines.rotation import rotate_stream
from tenfold.baselines.slicegpt import slice_coordinates, slice_stream, stream_moment
from tenfold.compression.actions import plan_blocks
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.calibration import Calibration
from tenfold.compression.resume_state import ResumeState
from tenfold.compression.structured_pruning import PruneMlp
from tenfold.models.model_card import save_compressed
from tenfold.models.recipe import Budget, load_recipe
from tenfold.models.sites import count_parameters, find_sites, weight_of
from tenfold.structure.kronecker import rearrange

LOW_RANK = [
    "svd",
    "asvd",
    "svd-llm",
    "svd-llm-update",
    "fwsvd",
    "joint-svd",
    "joint-svd-llm",
    "svd-llm-v2",
    "kfac-svd-lems",
]
KRONECKER = ["van-loan", "krony-van-loan", "tqcompressor-keep"]
SHARED_OUT = [*LOW_RANK, *KRONECKER, "modegpt", "modegpt-uniform"]
STEPS = dict.fromkeys(KRONECKER, 0.03) | {
    "slicegpt": 0.04,
    "procrustesgpt": 0.04,
    "procrustesgpt-kronecker": 0.04,
}  # of one item of a toy
toys = pytest.mark.parametrize("toy", ["gpt2", "llama"])


def text(count: int = 4, length: int = 48) -> Calibration:
    ids = torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(1))
    return Calibration([{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)], {})


def at(name: str, keep: float = 0.6, of: str = "blocks"):
    return load_recipe(name).model_copy(update={"budget": Budget.model_construct(keep=keep, of=of)})


@cache
def compressed(toy: str, name: str, state: ResumeState | None = None):
    """Return the original and the compressed model, both read only."""
    model = build(toy)
    return model, compress(copy.deepcopy(model), at(name), text=text(), state=state)[0]


def matrices(model) -> dict[str, torch.Tensor]:
    sites = [site for site in find_sites(model) if site.layer is not None]
    return {site.path: weight_of(model.get_submodule(site.path)).detach().double() for site in sites}


@torch.no_grad()
def seen(model, path: str) -> torch.Tensor:
    """Return the inputs ``(tokens, in)`` of a site on the calibration text."""
    rows = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: rows.append(a[0].flatten(0, -2).double()))
    for batch in text().batches:
        model(**batch)
    hook.remove()
    return torch.cat(rows)


def truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """Return the nearest matrix of this rank, and the sum of the dropped squares."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank], float(s[rank:].square().sum())


def rank_of(model, path: str) -> int | None:
    return getattr(getattr(model.get_submodule(path), "structure", None), "rank", None)


def ranked(before, after):
    """Return ``(path, W, What, rank)`` of every factorised site."""
    near = matrices(after)
    return [(path, w, near[path], rank_of(after, path)) for path, w in matrices(before).items() if rank_of(after, path)]


# budgets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHARED_OUT, "slicegpt", "procrustesgpt", "procrustesgpt-kronecker"])
@toys
def test_all_get_the_same_budget(toy, name):
    """The size is within the budget, by no more than one step of one item."""
    before, after = compressed(toy, name)
    kept = count_parameters(after, "blocks") / count_parameters(before, "blocks")
    assert 0.6 - STEPS.get(name, 0.02) < kept <= 0.6


@pytest.mark.parametrize(
    "toy, name",
    [("llama", name) for name in (*SHARED_OUT, "drop-layers", "procrustesgpt", "procrustesgpt-kronecker")]
    + [(toy, "slicegpt") for toy in ("llama", "gpt2", "llama-tied")],
)
def test_result_is_a_checkpoint(toy, name, tmp_path):
    _, after = compressed(toy, name)
    save_compressed(after, tmp_path / "folded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(logits(again), logits(after), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("of", ["model", "without_head", "blocks"])
@pytest.mark.parametrize("toy", ["llama", "gpt2", "llama-tied"])
def test_slicing_keeps_its_budget_whatever_it_is_a_share_of(toy, of):
    model = build(toy)
    before = count_parameters(model, of)
    after = compress(model, at("slicegpt", 0.8, of), text=text())[0]
    assert 0.7 * before < count_parameters(after, of) <= 0.8 * before


# low rank ---------------------------------------------------------------------------------------------------------------


@toys
def test_svd_is_the_nearest_matrix(toy):
    for _, w, near, rank in ranked(*compressed(toy, "svd")):
        best, dropped = truncated(w, rank)
        torch.testing.assert_close(near, best, atol=1e-5, rtol=1e-4)
        assert float((w - near).square().sum()) == pytest.approx(dropped, rel=1e-4)


@toys
def test_svd_llm_drops_what_is_measured(toy):
    """The dropped squared singular values are the mean squared error at the output of the original model."""
    before, after = compressed(toy, "svd-llm")
    found = ranked(before, after)
    assert len(found) >= 8
    for path, w, near, rank in found:
        x = seen(before, path)
        lower = torch.linalg.cholesky(x.T @ x / len(x) + 1e-9 * torch.eye(x.shape[1], dtype=x.dtype))
        measured = float((x @ (w - near).T).square().sum(1).mean())
        assert measured == pytest.approx(truncated(w @ lower, rank)[1], rel=2e-3)


@toys
def test_asvd_scales_every_input(toy):
    before, after = compressed(toy, "asvd")
    for path, w, near, rank in ranked(before, after):
        scale = seen(before, path).square().mean(0).sqrt() ** 0.5
        torch.testing.assert_close(near * scale, truncated(w * scale, rank)[0], atol=1e-4, rtol=1e-3)


@toys
def test_fwsvd_weighs_every_row(toy):
    state = ResumeState()
    before, after = compressed(toy, "fwsvd", state)
    weights = {path: g.diagonal().sqrt() for k in range(2) for path, g in state.statistics(k)[0].items()}
    for path, w, near, rank in ranked(before, after):
        weight = weights[path].clamp_min(1e-3 * float(weights[path].square().mean().sqrt()))[:, None]
        torch.testing.assert_close(weight * near, truncated(weight * w, rank)[0], atol=1e-5, rtol=1e-3)
    assert max(float(g.max() / g.min()) for g in weights.values()) > 2


@toys
def test_svd_llm_update_reads_what_sites_get_now(toy):
    """The last site is nearer to the original output, for the inputs that it gets, than any matrix fitted without them."""
    before, plain = compressed(toy, "svd-llm")
    _, updated = compressed(toy, "svd-llm-update")
    path = list(matrices(before))[-1]
    x, z, w = seen(before, path), seen(updated, path), matrices(before)[path]
    bias = before.get_submodule(path).bias
    assert rank_of(updated, path) == rank_of(plain, path)
    goal = x @ w.T

    def error(near):
        return float((goal - z @ near.T).square().sum())

    lower = torch.linalg.cholesky(z.T @ z / len(z) + 1e-9 * torch.eye(z.shape[1], dtype=z.dtype))
    original = (
        truncated(w @ lower, rank_of(updated, path))[0] @ lower.inverse()
    )  # the original matrix, on the new inputs
    assert error(matrices(updated)[path]) < min(error(original), error(matrices(plain)[path]))
    assert bias is None or torch.equal(bias, updated.get_submodule(path).bias)


@pytest.mark.parametrize("name", ["joint-svd", "joint-svd-llm"])
def test_joint_factor_is_that_of_the_stack(name):
    before, after = compressed("llama", name)
    here, near = matrices(before), matrices(after)
    for group in ("self_attn.q_proj", "self_attn.k_proj"), ("mlp.gate_proj", "mlp.up_proj"):
        paths = [f"model.layers.1.{path}" for path in group]
        modules = [after.get_submodule(path) for path in paths]
        assert torch.equal(*(module.factors()["right"] for module in modules))
        assert len({module.shared["right"] for module in modules}) == 1
        x = seen(before, paths[0])
        lower = torch.linalg.cholesky(x.T @ x / len(x) + 1e-9 * torch.eye(x.shape[1], dtype=x.dtype))
        lower = torch.eye(x.shape[1], dtype=x.dtype) if name == "joint-svd" else lower
        stack = torch.cat([here[path] for path in paths])
        best = truncated(stack @ lower, modules[0].structure.rank)[0]
        torch.testing.assert_close(torch.cat([near[path] for path in paths]) @ lower, best, atol=1e-4, rtol=1e-3)


# Kronecker --------------------------------------------------------------------------------------------------------------


@toys
def test_van_loan_drops_singular_values_of_the_rearranged_matrix(toy):
    before, after = compressed(toy, "van-loan")
    for path, w, near in [(path, w, matrices(after)[path]) for path, w in matrices(before).items()]:
        structure = getattr(after.get_submodule(path), "structure", None)
        if structure is not None:
            dropped = truncated(rearrange(w, structure.outs, structure.ins), structure.terms)[1]
            assert float((w - near).square().sum()) == pytest.approx(dropped, rel=1e-3)


@toys
def test_krony_gives_the_norm_back(toy):
    before, after = compressed(toy, "krony-van-loan")
    _, plain = compressed(toy, "van-loan")
    lost = []
    for path, w in matrices(before).items():
        assert float(matrices(after)[path].norm()) == pytest.approx(float(w.norm()), rel=1e-4)
        lost.append(float(matrices(plain)[path].norm() / w.norm()))
    assert min(lost) < 0.95


@toys
def test_pruning_keeps_every_second_unit(toy):
    before, model = matrices(build(toy)), build(toy)
    after = matrices(compress(model, "krony-prune", text=text())[0])
    for path, w in before.items():
        if path.endswith(("c_fc", "up_proj", "gate_proj")):
            torch.testing.assert_close(after[path], torch.stack([w[::2], 0.1 * w[::2]], 1).flatten(0, 1))
        elif "mlp" in path:
            torch.testing.assert_close(after[path], torch.stack([w[:, ::2], 0.1 * w[:, ::2]], 2).flatten(1))


def test_permutations_only_help():
    before, after = compressed("gpt2", "tqcompressor-keep")
    _, plain = compressed("gpt2", "van-loan")
    here, found, other = matrices(before), matrices(after), matrices(plain)
    errors = [(float((w - found[p]).norm()), float((w - other[p]).norm())) for p, w in here.items()]
    assert sum(one for one, _ in errors) < 0.97 * sum(two for _, two in errors)


# MoDeGPT ----------------------------------------------------------------------------------------------------------------


def narrowed(toy: str, units=None, values=None, queries=None):
    """Prune every block to so many units, dimensions of values and units of queries; all of them unless given."""
    before, after = build(toy), build(toy)
    chosen = {}
    for work in plan_blocks(before, load_recipe("modegpt")):
        for action in work.actions:
            if isinstance(action, PruneMlp):
                chosen[action.name] = units or action.out.shape[1]
                continue
            for group in range(action.heads.groups):
                free = action.heads.freedom != "none"
                chosen[f"{action.out.path} v{group}"] = values or action.heads.size
                chosen[f"{action.out.path} q{group}"] = (queries or len(action.units)) if free else None
    compress(after, at("modegpt"), text=text(), state=Settled(chosen))
    return before, after


class Settled(ResumeState):
    """State of a run with fixed choices, whatever the budget."""

    def __init__(self, wanted: dict):
        super().__init__()
        self.wanted = wanted

    def save_choices(self, chosen, choices):
        super().save_choices(self.wanted, [])


@pytest.mark.parametrize("toy", ["gpt2", "llama", "qwen3", "gpt_neox", "opt"])
def test_modegpt_at_full_width_is_exact(toy):
    before, after = narrowed(toy)
    torch.testing.assert_close(logits(after), logits(before), atol=2e-4, rtol=1e-3)


def block_path(model) -> str:
    return next(site.path for site in find_sites(model) if site.layer == 0).split(".0.")[0] + ".0."


@toys
def test_nystroem_is_least_squares_on_the_units_of_highest_leverage(toy):
    before, after = narrowed(toy, units=20)
    path = next(
        p
        for p in matrices(before)
        if p.startswith(block_path(before)) and "mlp" in p and p.endswith(("down_proj", "c_proj"))
    )
    h, w = seen(before, path), matrices(before)[path]
    second = h.T @ h / len(h)
    ridge = float(second.diagonal().mean()) * torch.eye(len(second), dtype=torch.float64)
    scores = (second @ torch.linalg.inv(second + ridge)).diagonal()
    torch.testing.assert_close(leverage_scores(second), scores, atol=1e-10, rtol=1e-8)
    kept = scores.argsort(descending=True)[:20].sort().values
    best = torch.linalg.lstsq(h[:, kept], h @ w.T).solution.T
    torch.testing.assert_close(matrices(after)[path], best, atol=1e-3, rtol=1e-2)


@toys
def test_values_lose_the_dropped_singular_values(toy):
    """Compare ``||X (Wv Wo - Wv' Wo')||^2`` of every head; where heads share values, of their stacked output matrices."""
    before, after = narrowed(toy, values=3)
    prefix = block_path(before)
    if toy == "gpt2":
        v, o, x = f"{prefix}attn.c_attn", f"{prefix}attn.c_proj", seen(before, f"{prefix}attn.c_attn")
        pick = lambda model: matrices(model)[v][64:]  # noqa: E731
    else:
        v, o = f"{prefix}self_attn.v_proj", f"{prefix}self_attn.o_proj"
        pick, x = lambda model: matrices(model)[v], seen(before, v)
    one = before.get_submodule(v).bias
    for group in range(len(pick(before)) // 8):
        rows = slice(8 * group, 8 * group + 8)
        each = 4 // (len(pick(before)) // 8)
        columns = torch.arange(8 * group * each, 8 * (group + 1) * each)
        reads = [torch.cat(list(matrices(m)[o][:, columns].split(8, 1))) for m in (before, after)]
        bias = [
            torch.zeros(8) if one is None else m.get_submodule(v).bias.detach()[-len(pick(m)) :][rows]
            for m in (before, after)
        ]
        made = [(x @ pick(m)[rows].T + b) @ r.T for m, b, r in zip((before, after), bias, reads, strict=True)]
        _, dropped = truncated(made[0], 3)
        assert float((made[0] - made[1]).square().sum()) == pytest.approx(dropped, rel=1e-3)


def test_queries_and_keys_keep_the_dimensions_of_largest_product():
    before, after = narrowed("gpt2", queries=5)
    path = "transformer.h.0.attn.c_attn"
    made = seen(before, path) @ matrices(before)[path].T + before.get_submodule(path).bias.detach()
    second, kept = made.square().mean(0), matrices(after)[path].abs().sum(1) > 0
    for head in range(4):
        at_q, at_k = slice(8 * head, 8 * head + 8), slice(32 + 8 * head, 40 + 8 * head)
        best = set((second[at_q] * second[at_k]).topk(5).indices.tolist())
        assert set(kept[at_q].nonzero()[:, 0].tolist()) == set(kept[at_k].nonzero()[:, 0].tolist()) == best


def test_pairs_of_rotary_positions_go_together():
    _, after = narrowed("llama", queries=2)
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        rows = matrices(after)[f"model.layers.0.self_attn.{name}"].abs().sum(1) > 0
        for head in rows.reshape(heads, 2, 4):
            assert torch.equal(head[0], head[1]) and int(head[0].sum()) == 2


def test_shares_by_influence():
    curves = [
        TradeoffCurve(f"h.{k}.x", np.array([1, 50, 100]), np.array([2.0, 1.0, 0.0]), [1, 50, 100]) for k in range(4)
    ]
    influence = {"h.0": 0.9, "h.1": 0.1, "h.2": 0.1, "h.3": 0.5}
    shares = influence_ratios(curves, influence, 240, 0.5)
    assert 100 * sum(shares.values()) == pytest.approx(240, abs=1e-6)
    lost = {name: 1 - share for name, share in shares.items()}
    assert lost["h.1.x"] == pytest.approx(lost["h.2.x"]) and lost["h.0.x"] < lost["h.3.x"] < lost["h.1.x"]
    assert lost["h.1.x"] / lost["h.0.x"] == pytest.approx(np.exp(0.8 / 0.5))
    tight = influence_ratios(curves, influence, 120, 0.05)
    assert 100 * sum(tight.values()) == pytest.approx(120, abs=1e-6) and min(tight.values()) >= 0.01 - 1e-9


# whole models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ["gpt2", "llama", "llama-tied", "qwen3", "opt", "phi"])
def test_slicing_nothing_is_exact(toy):
    before, after = build(toy), build(toy)
    report = slice_stream(after, at("slicegpt", 1.0), text())
    assert report["left"] == report["width"] == 32
    torch.testing.assert_close(logits(after), logits(before), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("toy, needed", [("llama", 6), ("gpt2", 7)])
def test_slicing_a_stream_of_few_dimensions_is_exact(toy, needed):
    """All writers of the stream span six dimensions; LayerNorm needs one more coordinate."""
    model = build(toy).double()
    space = torch.linalg.qr(torch.randn(32, 6).double())[0]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight", "c_proj.weight", "c_proj.bias")):
                p.copy_(p @ space @ space.T)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                p.copy_(space @ space.T @ p)
    before, recipe = logits(model), at("slicegpt", 1.0)
    slice_stream(model, recipe, text())
    slice_coordinates(model, needed)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-3)


def test_stream_moment_is_that_of_normed_states():
    model = build("llama")
    assert float(stream_moment(model, text()).trace()) == pytest.approx(32, rel=1e-4)
    norms = [
        model.model.norm,
        *(n for b in model.model.layers for n in (b.input_layernorm, b.post_attention_layernorm)),
    ]
    rows = []
    for norm in norms:
        norm.register_forward_hook(lambda m, a, out: rows.append((out / m.weight).detach().flatten(0, 1).double()))
    for batch in text().batches:
        model(**batch)
    made = torch.cat(rows)
    torch.testing.assert_close(stream_moment(model, text()), made.T @ made / len(made), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("toy", ["gpt2", "llama", "gemma3_text"])
def test_a_block_that_does_nothing_is_dropped_and_nothing_changes(toy, tmp_path):
    model = build(toy)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".0." in name and name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight", "c_proj.bias")):
                p.zero_()
    before = logits(model)
    after, report = compress(model, at("drop-layers", 0.9), text=text())
    assert len(report["dropped"]) == 1 and report["dropped"][0].endswith(".0")
    assert report["influence"][report["dropped"][0]] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(logits(after), before)
    after.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 1
    torch.testing.assert_close(logits(again), before)
    assert len(again(**inputs(again), use_cache=True).past_key_values) == 1


def test_influence_is_what_hidden_states_say():
    model = build("llama")
    batches = text()
    found = measure_influence(model, ["model.layers.0", "model.layers.1"], batches)
    pairs = []
    with torch.no_grad():
        for batch in batches.batches:
            states = model(**batch, output_hidden_states=True).hidden_states
            pairs.append((states[0], states[1]))
    cosine = torch.cat([torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs])
    assert found["model.layers.0"] == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["procrustesgpt", "procrustesgpt-kronecker"])
@toys
def test_rotating_towards_a_structure_only_helps_and_changes_nothing(toy, name):
    model = build(toy)
    recipe = at(name)
    before = logits(model)
    errors = rotate_stream(model, recipe, text())["errors"]
    assert all(two <= one + 1e-9 for one, two in pairwise(errors)) and errors[-1] < 0.95
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-3)
