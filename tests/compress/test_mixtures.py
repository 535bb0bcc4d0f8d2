"""Mixtures of experts compressed by activations, every expert by the tokens that are routed to it."""

import copy

import numpy as np
import pytest
import torch
from models import toys
from plain import moment, text
from test_compress import NARROW, compressed, size
from transformers import AutoModelForCausalLM

from tenfold.compression.activations import Activations
from tenfold.compression.compress import compress
from tenfold.compression.fisher import FisherPass
from tenfold.models.densify import densify
from tenfold.models.experts import unpack
from tenfold.models.sites import find_sites, group_by_block

WORDS = text(8)
each = pytest.mark.parametrize("name", toys.EXPERTS)


@each
def test_at_full_rank_nothing_changes(name):
    model = toys.build(name)
    rules = [
        {"path": site.path, "structure": {"kind": "low_rank", "rank": min(site.shape)}}
        for site in find_sites(model)
        if site.layer is not None
    ]
    after = compressed(model, rules, None)
    torch.testing.assert_close(toys.logits(after), toys.logits(model), atol=1e-4, rtol=0)


@each
@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_narrowed_a_mixture_meets_its_budget_and_stays_better_than_a_random_one(name, keep):
    model = toys.build(name)
    after = compressed(model, NARROW, keep, "model")
    assert size(after) <= keep * size(model)
    assert size(after) > (keep - 0.02) * size(model)
    worst = toys.logits(toys.build(name, seed=7)) - toys.logits(model)
    assert (toys.logits(after) - toys.logits(model)).norm() < 0.7 * worst.norm()


def passed_forward(model, batches):
    """Unpack ``model`` and run it; return the pass, and the paths of its sites and its input groups, block by block."""
    unpack(model)
    sites = group_by_block(find_sites(model))
    activations, groups = Activations(model, list(sites), batches), []
    look = FisherPass(activations)
    for number, some in enumerate(sites.values()):
        groups.append(activations.find_input_groups(number, some))
        look.forward(number, groups[-1])
    return look, [[site.path for site in some] for some in sites.values()], groups


ONE = torch.ones(1, 1, dtype=torch.long)  # a single token, for two of four experts
ONE_TOKEN = [{"input_ids": ONE, "attention_mask": ONE}]


def test_moments_are_those_of_the_tokens_an_expert_gets():
    model, words, path = toys.build("mixtral"), text(8, padded=True), "model.layers.0"
    look, _, (stages, _) = passed_forward(model, words.batches)
    seen, *_ = look.backward(0, stages, None)
    kept = torch.cat([batch["attention_mask"].flatten().bool() for batch in words.batches])
    experts, states, indices = model.model.layers[0].mlp.experts, [], []

    def catch(module, given):
        states.append(given[0])
        indices.append(given[1])

    hook = experts.register_forward_pre_hook(catch)
    with torch.no_grad():
        for batch in words.batches:
            model(**batch)
    hook.remove()
    states, indices = torch.cat(states)[kept].double(), torch.cat(indices)[kept]
    for number in range(4):
        rows = states[(indices == number).any(1)]
        stage = next(k for k, some in enumerate(stages) if f"{path}.mlp.experts.each.{number}.gate" in some)
        assert seen[stage].tokens == len(rows) > 0
        np.testing.assert_allclose(seen[stage].second.numpy(), moment(rows.numpy()), rtol=1e-4, atol=1e-6)
        expert = experts.each[number].double()
        hidden = expert.act(expert.gate(rows)) * expert.up(rows)
        stage = next(k for k, some in enumerate(stages) if f"{path}.mlp.experts.each.{number}.down" in some)
        np.testing.assert_allclose(seen[stage].second.numpy(), moment(hidden.detach().numpy()), rtol=1e-4, atol=1e-6)
        experts.each[number].float()


def test_an_expert_that_no_token_reaches_counts_like_the_others():
    """It keeps about as much as they do."""
    model = toys.build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = layer.mlp.gate.weight[0] * 0  # a router that never asks for expert 3
            layer.mlp.gate.weight[:3] *= 0
            layer.mlp.gate.weight[0, 0] = 1e-3
            layer.mlp.gate.register_forward_hook(
                lambda module, given, out: (out[0], out[1], out[2].clamp(max=2)) if out[2].max() > 2 else None
            )
    rules = [{"prune": "mlp"}]
    recipe = {"replace": rules, "calibrate": {}, "budget": {"keep": 0.6, "of": "sites"}}
    after, report = compress(copy.deepcopy(model), recipe, text=WORDS)
    kept = {choice["item"]: choice["parameters"] / choice["of"] for choice in report["choices"]}
    unseen = [share for name, share in kept.items() if ".each.3." in name]
    assert len(unseen) == 2
    assert min(unseen) > 0.3
    assert torch.isfinite(toys.logits(after)).all()


def test_gate_and_up_of_every_expert_share_a_factor():
    model = toys.build("qwen2_moe")
    rule = {"role": ["mlp.gate", "mlp.in"], "structure": {"kind": "low_rank"}}
    after = compressed(model, [rule | {"share": {"factors": ["right"], "across": "roles"}}], 0.7)
    experts = after.model.layers[0].mlp.experts.each
    for expert in experts:
        assert expert.gate.factors()["right"] is not None
        assert expert.gate.shared == expert.up.shared
    assert experts[0].gate.shared != experts[1].gate.shared
    assert torch.isfinite(toys.logits(after)).all()


ALLOCATORS = {"share": {"factors": ["right"], "across": "experts"}}


def shared(roles=("mlp.in", "mlp.gate"), **rule) -> list[dict]:
    return [{"role": [*roles], "structure": {"kind": "low_rank"}, **ALLOCATORS, **rule}]


@each
def test_experts_share_a_factor_that_is_fitted_to_all_their_tokens(name, tmp_path):
    """The error is lower than without activations, at the same size."""
    model = toys.build(name)
    metric = compressed(model, shared(keep=0.5), None)
    nearest = compress(copy.deepcopy(model), {"replace": shared(keep=0.5)})[0]
    assert size(metric) == size(nearest) < size(model)
    errors = [(logits_on(one) - logits_on(model)).norm() for one in (metric, nearest)]
    assert errors[0] < errors[1]
    mixture = next(layer.mlp for layer in metric.model.layers if hasattr(layer.mlp, "experts"))
    expert, other = mixture.experts.each[:2]
    assert expert.up.factors()["right"] is other.up.factors()["right"]
    assert expert.up.factors()["right"] is not expert.gate.factors()["right"]
    assert torch.equal(toys.logits(reloaded(metric, tmp_path)), toys.logits(metric))


@torch.no_grad()
def logits_on(model):
    return torch.cat([model(**batch).logits for batch in WORDS.batches])


@pytest.mark.parametrize("keep", [0.65, 0.6])
def test_what_experts_share_is_in_the_budget(keep):
    model = toys.build("mixtral")
    rules = [*shared(keep=0.6), {"role": ["attn.q", "attn.out", "mlp.out"], "structure": {"kind": "low_rank"}}]
    after = compressed(model, rules, keep, "model")
    assert (keep - 0.02) * size(model) < size(after) <= keep * size(model)


def test_what_experts_can_not_share_is_said():
    model = toys.build("mixtral")
    with pytest.raises(ValueError, match=r"how much experts that share factors keep .* a keep or a size of its own"):
        compressed(model, shared(), 0.7)
    with pytest.raises(ValueError, match="there is no factor 'core_1' to share; it has left, right"):
        compressed(model, shared(keep=0.5, share={"factors": ["core_1"], "across": "experts"}), None)
    narrowed = compressed(model, [{"prune": "mlp"}], 0.6)
    with pytest.raises(ValueError, match="experts of different widths can't share a factor"):
        compressed(narrowed, shared(keep=0.5), None)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_layers_of_a_mixture_are_dropped(name, tmp_path):
    model = toys.build(name)
    recipe = {"transform": "drop-layers", "budget": {"keep": 0.7, "of": "model"}, "calibrate": {}}
    after, _ = compress(model, recipe, text=WORDS)
    torch.testing.assert_close(toys.logits(reloaded(after, tmp_path)), toys.logits(after), atol=1e-5, rtol=0)


def test_a_refused_recipe_leaves_a_model_that_is_saved_and_read(tmp_path):
    model = toys.build("mixtral")
    before = toys.logits(model)
    with pytest.raises(ValueError, match="pooler"):
        compress(model, {"replace": [{"role": "pooler", "structure": {"kind": "low_rank", "rank": 2}}]})
    torch.testing.assert_close(toys.logits(reloaded(model, tmp_path)), before, atol=1e-5, rtol=0)


def test_experts_of_different_widths_that_no_token_reaches():
    model = compressed(toys.build("mixtral"), [{"prune": "mlp"}], 0.6)
    rule = {"role": ["mlp.in", "mlp.gate"], "structure": {"kind": "low_rank"}, "keep": 0.7}
    after = compressed(model, [rule], None, words=text(2, window=2, seed=4))
    assert torch.isfinite(toys.logits(after)).all()


def test_unseen_experts_are_like_other_experts_not_like_attention():
    model = toys.build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(30)
    look, _, (stages, _) = passed_forward(model, ONE_TOKEN)
    seen, *_ = look.backward(0, stages, None)
    traces = [float(seen[k].second.trace()) for k, stage in enumerate(stages) if stage[0].endswith("gate")]
    tokens = [seen[k].tokens for k, stage in enumerate(stages) if stage[0].endswith("gate")]
    assert min(tokens) == 0 < max(tokens)
    assert max(traces) < 3 * min(traces)


def test_outputs_of_unseen_experts_matter_as_those_of_the_others_on_average():
    look, paths, stages = passed_forward(toys.build("mixtral"), ONE_TOKEN)
    look.start_backward()
    ups = [path for path in paths[-1] if path.endswith(".up")]
    _, matters, _ = look.backward(len(paths) - 1, stages[-1], set(ups))
    traces = np.array([float(matters[path].trace()) for path in ups])
    far = np.abs(traces[:, None] - traces).argsort(1)[:, 1]
    unseen = [k for k in range(4) if torch.equal(matters[ups[k]], matters[ups[int(far[k])]])]
    seen = [k for k in range(4) if k not in unseen]
    assert len(unseen) == len(seen) == 2
    torch.testing.assert_close(matters[ups[unseen[0]]], sum(matters[ups[k]] for k in seen) / 2)


@each
def test_narrow_experts_are_put_together_again(name):
    """Their units are at the positions of the fused weights of both matrices."""
    after = compressed(toys.build(name), [{"prune": "mlp"}], 0.7)
    before = toys.logits(after)
    torch.testing.assert_close(toys.logits(densify(after)), before, atol=1e-5, rtol=0)


def test_a_rule_for_a_part_of_an_expert_leaves_it_to_no_narrowing():
    rule = {"path": "experts.each.0.up", "structure": {"kind": "low_rank", "rank": 4}}
    with pytest.raises(ValueError, match=r"prune: mlp needs all its matrices, but another rule before it takes mlp.in"):
        compressed(toys.build("mixtral"), [rule, {"prune": "mlp"}])


def test_experts_that_share_all_their_factors_are_put_together_again():
    model = toys.build("mixtral")
    rule = {"role": ["mlp.out", "mlp.gate", "mlp.in"], "structure": {"kind": "low_rank", "rank": 8}}
    compress(model, {"replace": [rule | {"share": {"factors": ["left", "right"], "across": "experts"}}]})
    before = toys.logits(model)
    torch.testing.assert_close(toys.logits(densify(model)), before, atol=1e-5, rtol=0)


def test_all_experts_are_read_by_one_pass_each(monkeypatch):
    """There are two passes in all, not one per expert."""
    calls, moments = [], Activations.sum_moments
    monkeypatch.setattr(Activations, "sum_moments", lambda self, *rest: calls.append(rest) or moments(self, *rest))
    rule = {"role": ["mlp.in", "mlp.gate", "mlp.out"], "structure": {"kind": "low_rank", "rank": 8}}
    compressed(toys.build("mixtral"), [rule], None)
    assert len(calls) == 2 * 2  # in two blocks


def test_the_order_of_experts_does_not_depend_on_where_tokens_are_sent():
    model = toys.build("mixtral")
    unpack(model)
    sites, found = group_by_block(find_sites(model)), []
    path = next(iter(sites))
    for token in range(6):
        one = torch.full((1, 1), 3 + token)  # for two of four experts
        activations = Activations(model, list(sites), [{"input_ids": one, "attention_mask": torch.ones_like(one)}])
        found.append(activations.find_input_groups(0, sites[path]))
    assert all(stages == found[0] for stages in found)
    assert sorted(p for stage in found[0] for p in stage) == sorted(site.path for site in sites[path])
