"""Compression by activations, end to end."""

import copy
from itertools import cycle

import idle
import pytest
import torch
from models import toys
from plain import text, watched
from transformers import AutoModelForCausalLM

import tenfold
from tenfold.compression.compress import compress
from tenfold.models.sites import find_sites, group_by_block
from tenfold.nn import FactorizedLinear

WORDS = text(8)
NARROW = [{"prune": "mlp"}, {"prune": "attention"}]
MODELS = list(idle.HEADS)
each = pytest.mark.parametrize("name", MODELS)


def size(model) -> int:
    return sum(p.numel() for p in model.parameters())


def matrices(model) -> int:
    """Return the number of parameters of all matrices in the blocks."""
    return sum(site.shape[0] * site.shape[1] for site in find_sites(model) if site.layer is not None)


def compressed(model, rules=NARROW, keep: float | None = 0.7, of: str = "sites", words=WORDS, **settings):
    """Return a compressed copy of ``model``."""
    recipe = {"replace": rules, "calibrate": settings} | ({"budget": {"keep": keep, "of": of}} if keep else {})
    return compress(copy.deepcopy(model), recipe, text=words)[0]


def low_rank(model, rank: int | None = None, roles=None) -> list[dict]:
    """Return a rule for every role in the blocks, of full rank unless given."""
    shapes = {site.role: site.shape for site in find_sites(model) if site.layer is not None}
    return [
        {"role": role, "structure": {"kind": "low_rank", "rank": rank or min(shape)}}
        for role, shape in shapes.items()
        if roles is None or role in roles
    ]


# what must stay as it is ------------------------------------------------------------------------------------------


@each
def test_at_full_rank_nothing_changes(name):
    model = toys.build(name)
    after = compressed(model, low_rank(model), None)
    assert sum(isinstance(module, FactorizedLinear) for module in after.modules()) > 7
    torch.testing.assert_close(toys.logits(after), toys.logits(model), atol=1e-4, rtol=0)


@each
def test_what_is_idle_goes_first_and_is_not_missed(name):
    """In whatever basis the idle dimensions are."""
    model, gone = idle.build(name)
    after = compressed(model, NARROW, 1 - (gone - 0.5) / size(model), "model")
    assert size(after) == size(model) - gone
    torch.testing.assert_close(toys.logits(after), toys.logits(model), atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_and_what_is_outside_of_the_rules_stay(name, dtype, tmp_path):
    toys.build(name).to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    model.get_input_embeddings().requires_grad_(False)
    after = compressed(model, [{"prune": "mlp"}])
    assert {p.dtype for p in after.parameters()} == {dtype}
    left, flags = after.state_dict(), {path: p.requires_grad for path, p in after.named_parameters()}
    for path, value in model.state_dict().items():
        assert "mlp" in path or torch.equal(left[path], value)
    for path, buffer in model.named_buffers():
        assert after.get_buffer(path).dtype == buffer.dtype and torch.equal(after.get_buffer(path), buffer)
    for path, p in model.named_parameters():
        assert flags.get(path, p.requires_grad) == p.requires_grad
    assert not after.training and torch.isfinite(toys.logits(after)).all()


def test_dropout_is_off_while_a_model_in_training_is_compressed():
    model = toys.build("gpt2")
    expected = compressed(model)
    after = compressed(model.train())
    assert after.training and all(module.training for module in after.modules())
    assert all(p.grad is None for p in after.parameters())
    torch.testing.assert_close(after.state_dict(), expected.state_dict(), atol=0, rtol=0)


# what comes out ---------------------------------------------------------------------------------------------------


@each
def test_narrowed_models_keep_the_budget_and_are_saved_and_unfolded(name, tmp_path):
    model = toys.build(name)
    words = text(8, padded=name == "bert")
    after = compressed(model, words=words)
    dropped = size(model) - size(after)
    assert 0.3 * matrices(model) <= dropped <= 0.32 * matrices(model)
    logits = toys.logits(after)
    assert torch.isfinite(logits).all()
    after.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(toys.logits(again), logits) and size(again) == size(after)
    plain = tenfold.densify(again)
    assert not any(type(module).__module__.startswith("tenfold") for module in plain.modules())
    assert plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(toys.logits(plain), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "opt"])
def test_a_budget_of_the_whole_model(name):
    model = toys.build(name)
    after = compressed(model, NARROW, 0.8, "model")
    assert 0.78 * size(model) <= size(after) <= 0.8 * size(model)


def test_layers_and_rules_of_two_kinds():
    """The first rule that matches a matrix wins; the other block stays as it is."""
    model = toys.build("llama")
    rules = [{"prune": "mlp", "layers": [1]}, *low_rank(model, 4, ("attn.q", "mlp.in"))]
    after = compressed(model, rules, 0.5)
    changed = {
        path.removeprefix("model.layers.") for path, m in after.named_modules() if isinstance(m, FactorizedLinear)
    }
    narrowed = {f"1.mlp.{which}_proj" for which in ("gate", "up", "down")}
    assert changed == {"0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"} | narrowed


def test_the_decoder_of_a_model_that_sees_images():
    model = toys.build("gemma3")
    assert size(compressed(model)) <= size(model) - 0.3 * matrices(model)


SETTINGS = [
    {},
    {"refit": False},
    {"bias_correction": False},
    {"output_metric": "row"},
    {"output_metric": "none", "input_metric": "none"},
    {"input_metric": "diagonal", "power": 0.5},
    {"input_metric": "diagonal", "output_metric": "none", "refit": False, "bias_correction": False},
    {"allocate": "uniform"},
    {"fisher_tokens": 40},
]


@pytest.mark.parametrize(("settings", "name"), [*zip(SETTINGS, cycle(["gpt2", "llama"]))], ids=str)
def test_every_setting_is_sound_and_repeats(name, settings):
    model = toys.build(name)
    mixed = [
        {"prune": "attention"},
        *low_rank(model, 8, ("mlp.in",)),
        {"role": "mlp.out", "structure": {"kind": "low_rank"}},
    ]
    one, other = (compressed(model, mixed, 0.8, **settings) for _ in range(2))
    assert torch.isfinite(toys.logits(one)).all() and size(one) <= size(model) - 0.2 * matrices(model) * 0.9
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


@each
def test_activations_make_low_rank_better(name):
    """On the calibration text the outputs of the blocks are nearer to the original ones than with the nearest matrices."""
    model = toys.build(name)
    rules, recipe = low_rank(model, 6), {"replace": low_rank(model, 6)}
    by_text, by_weights = (
        compressed(model, rules, None, output_metric="none"),
        compress(copy.deepcopy(model), recipe)[0],
    )
    blocks = group_by_block(find_sites(model))
    wanted, *others = (watched(other, WORDS, blocks) for other in (model, by_text, by_weights))
    for path in blocks:
        ours, theirs = (((other[path][1] - wanted[path][1]) ** 2).mean() for other in others)
        assert ours < theirs


# what a rule means ------------------------------------------------------------------------------------------------

FOUR = {"structure": {"kind": "low_rank", "rank": 4}}
RULES = {
    "fixed": {"role": "mlp.in", **FOUR},
    "by path": {"path": "mlp.c_proj", **FOUR, "layers": [1]},
    "without bias": {"role": "mlp.in", **FOUR, "bias": "drop"},
    "with a keep": {"role": "mlp.in", "structure": {"kind": "low_rank"}, "keep": 0.4},
    "other kinds": {"role": "mlp.in", "structure": {"kind": "kronecker", "terms": 3}},
}
NOT_WITH_TEXT = {
    "split": {"role": "attn.qkv", **FOUR, "split": 3},
    "with an adapter": {"role": "mlp.in", **FOUR, "adapter_rank": 2},
    "frozen": {"role": "mlp.in", **FOUR, "freeze": ["left"]},
    "shared by layers": {"role": "mlp.in", **FOUR, "share": {"factors": ["right"]}},
}


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_means_the_same_with_a_text_as_without(name):
    model = toys.build("gpt2")
    by_text = compressed(model, [RULES[name]], None)
    by_weights = compress(copy.deepcopy(model), {"replace": [RULES[name]]})[0]
    assert by_text.config.quantization_config.sites == by_weights.config.quantization_config.sites


@pytest.mark.parametrize("name", list(NOT_WITH_TEXT))
def test_what_a_text_does_not_guide_is_refused(name):
    with pytest.raises(ValueError, match="is not done with a calibration text"):
        compressed(toys.build("gpt2"), [NOT_WITH_TEXT[name]], None)


def test_a_rule_with_a_keep_of_its_own_is_not_in_the_budget():
    rules = [RULES["with a keep"], {"role": "mlp.out", "structure": {"kind": "low_rank"}}]
    after = compressed(toys.build("gpt2"), rules, 0.8)
    assert {after.get_submodule(f"transformer.h.{k}.mlp.c_fc").structure.rank for k in range(2)} == {10}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_reads_the_values_of_a_head_has_columns_of_one_length(name):
    """A quantiser gives several columns one scale."""
    model = toys.build(name)
    for site in find_sites(model):
        if site.role == "attn.out":
            weight = model.get_submodule(site.path).weight
            with torch.no_grad():
                (weight.T if name == "llama" else weight).mul_(torch.logspace(-1, 1, 32)[:, None])
    after = compressed(model, [{"prune": "attention"}], 0.5)
    modules = [after.get_submodule(site.path) for site in find_sites(after) if site.role == "attn.out"]
    narrowed = [module for module in modules if isinstance(module, FactorizedLinear)]  # others stay as they are
    for module in narrowed:
        heads = module.dense().norm(dim=0).detach().reshape(4, -1)
        assert all(head[head > 0].max() < 2 * head[head > 0].min() for head in heads)
    assert narrowed


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_what_is_written_and_what_reads_it_weigh_the_same(name):
    """Head by head, so that an optimizer takes equally large steps in both."""
    model, heads = toys.build(name), idle.HEADS[name]
    roles = {"attn.v": 1e-3, "attn.out": 1e3} | ({"attn.q": 1e-2, "attn.k": 1e2} if name == "opt" else {})
    with torch.no_grad():
        for site in (site for site in find_sites(model) if site.layer is not None):
            module = model.get_submodule(site.path)
            module.weight.mul_(roles.get(site.role, 1))
            if module.bias is not None and site.role != "attn.out":
                module.bias.mul_(roles.get(site.role, 1))
    after = compressed(model, [{"prune": "attention"}], 0.7)
    found = {}
    for site in (site for site in find_sites(after) if site.layer is not None):
        module = after.get_submodule(site.path)
        found[site.layer, site.role] = module.dense() if isinstance(module, FactorizedLinear) else module.weight
    for layer in {layer for layer, _ in found}:
        q, k, v, out = (found[layer, f"attn.{which}"].detach() for which in ("q", "k", "v", "out"))
        rows = v.unflatten(0, (heads[1], -1)).flatten(1).norm(dim=1)
        columns = out.unflatten(1, (heads[1], -1)).movedim(1, 0).flatten(1).norm(dim=1) / (heads[0] / heads[1]) ** 0.5
        assert ((rows / columns).log2().abs() < 1).all()
        if name == "opt":
            assert ((q.norm() / k.norm()).log2().abs() < 1).all()
