"""Role tables: the matrices of every architecture are found, mean what their role says, and fold, save and unfold."""

import copy
import re
from collections import Counter

import pytest
import torch
import toys
from folding import LOW_RANK, TRAIN, fold, reference, rules
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import tenfold.models.loading  # noqa: F401 - registers the hook
from tenfold.models.architectures import ARCHITECTURES, Architecture
from tenfold.models.checkpoint_format import describe, read_plan
from tenfold.models.cost import count, site_flops
from tenfold.models.densify import densify
from tenfold.models.plan import make_plan
from tenfold.models.recipe import parse_recipe
from tenfold.models.sites import base_path, find_sites, is_tied
from tenfold.models.surgery import install_empty

every = pytest.mark.parametrize("name", toys.TOYS)
TIED = [name for name in toys.TOYS if name not in ("gpt2-untied", "gpt_neox", "llama", "mistral", "qwen2", "phi")]

# role -> how many of what shape, and whether they have biases; embedding and head apart
SELF = dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.out"), (2, (32, 32), True))
FEED = {"mlp.in": (2, (48, 32), True), "mlp.out": (2, (32, 48), True)}
FUSED = {"attn.qkv": (2, (96, 32), True), "attn.out": (2, (32, 32), True)}
GPT = FUSED | {"mlp.in": (2, (128, 32), True), "mlp.out": (2, (32, 128), True)}


def without_bias(table):
    return {role: (number, shape, False) for role, (number, shape, _) in table.items()}


GROUPED = SELF | {"attn.k": (2, (16, 32), True), "attn.v": (2, (16, 32), True)}
LLAMA = without_bias(GROUPED | FEED | {"mlp.gate": (2, (48, 32), True)})
QWEN2 = LLAMA | {role: (number, shape, True) for role, (number, shape, _) in GROUPED.items() if role != "attn.out"}
WIDE = without_bias(SELF | {"attn.q": (2, (64, 32), True), "attn.out": (2, (32, 64), True)})
T5 = {role: (6, shape, False) for role, (_, shape, _) in SELF.items()}
T5 |= {role: (4, shape, False) for role, (_, shape, _) in FEED.items()}
ONCE = {role: (1, shape, True) for role, (_, shape, _) in (SELF | FEED).items()} | {
    "embed.project": (1, (32, 16), True)
}
EXPECTED = {
    "gpt2": GPT,
    "gpt2-untied": GPT,
    "openai-gpt": GPT,
    "gpt_neox": FUSED | FEED,
    "gpt_neox-tied": FUSED | FEED,
    "opt": SELF | FEED,
    "opt-projected": SELF | FEED | {"embed.project": (2, (32, 16), False)},  # and (16, 32)
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "mistral": LLAMA,
    "qwen2": QWEN2,
    "qwen3": LLAMA | WIDE,
    "gemma3_text": LLAMA,
    "gemma3": LLAMA,
    "phi": GROUPED | FEED,
    "bert": SELF | FEED,
    "roberta": SELF | FEED,
    "albert": ONCE,
    "albert-groups": SELF | FEED | {"embed.project": (1, (32, 16), True)},
    "t5": T5,
    "t5-gated": T5 | {"mlp.gate": (4, (48, 32), False)},
}


@every
def test_every_matrix_is_found(name):
    model = toys.build(name)
    sites = find_sites(model)
    inner = [site for site in sites if site.role not in ("embed", "head")]
    assert Counter(site.role for site in inner) == {role: number for role, (number, _, _) in EXPECTED[name].items()}
    for site in inner:
        _, shape, bias = EXPECTED[name][site.role]
        assert site.shape == shape or site.path.endswith("project_out")
        assert site.bias == bias
        assert site.layer == (None if site.role == "embed.project" else int(re.findall(r"\.(\d+)\.", site.path)[0]))
    embed, head = (next(site for site in sites if site.role == role) for role in ("embed", "head"))
    assert embed.shape == head.shape == (97, 16 if name.startswith(("albert", "opt-")) else 32)
    missed = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    missed -= {site.path for site in sites}
    heads_own = {"cls.predictions.transform.dense", "lm_head.dense", "predictions.dense"}
    assert all(path in heads_own or "vision_tower" in path for path in missed), missed


# what the roles mean: changes that leave the function of a network as it is ------------------------------------------


@torch.no_grad()
def scale(model, role, by, layer=1, rows=slice(None), bias=True):
    """The matrices of ``role`` in one layer times ``by``, and their biases."""
    scaled = [site for site in find_sites(model) if site.role == role and site.layer == layer]
    for site in scaled or [site for site in find_sites(model) if site.role == role]:  # ALBERT has one layer only
        module = model.get_submodule(site.path)
        (module.weight.T if isinstance(module, Conv1D) else module.weight)[rows] *= by
        if bias and module.bias is not None:
            module.bias[rows] *= by


def parts(name, model):
    """Role and rows of query, key and value."""
    if name in ("gpt2", "gpt2-untied", "openai-gpt"):
        return [("attn.qkv", slice(32 * k, 32 * (k + 1))) for k in range(3)]
    if name.startswith("gpt_neox"):  # head by head
        heads = torch.arange(96).reshape(4, 3, 8)
        return [("attn.qkv", heads[:, k].flatten()) for k in range(3)]
    return [(f"attn.{letter}", slice(None)) for letter in "qkv"]


def same(name, *changes):
    model = toys.build(name)
    before = toys.logits(model)
    for role, by, rows, bias in changes:
        scale(model, role, by, rows=rows, bias=bias)
    return torch.allclose(toys.logits(model), before, rtol=1e-4, atol=1e-5)


@every
def test_values_and_outputs_are_told_apart(name):
    """Twice the values and half the output weights is the same function; either alone is another one."""
    role, rows = parts(name, None)[2]
    assert same(name, (role, 2.0, rows, True), ("attn.out", 0.5, slice(None), False))
    assert not same(name, (role, 2.0, rows, True))
    assert not same(name, ("attn.out", 0.5, slice(None), False))


@every
def test_queries_and_keys_are_told_apart(name):
    """Twice the queries and half the keys is the same function; with norms on both, either alone is, too."""
    (query, q_rows), (key, k_rows), _ = parts(name, None)
    assert same(name, (query, 2.0, q_rows, True), (key, 0.5, k_rows, True))
    normed = name.startswith(("qwen3", "gemma3"))
    assert same(name, (query, 2.0, q_rows, True)) == normed
    assert same(name, (key, 2.0, k_rows, True)) == normed


@pytest.mark.parametrize("name", [name for name in toys.TOYS if "mlp.gate" in EXPECTED[name]])
def test_gates_are_told_from_what_they_gate(name):
    assert same(name, ("mlp.in", 2.0, slice(None), True), ("mlp.out", 0.5, slice(None), False))
    assert not same(name, ("mlp.gate", 2.0, slice(None), True), ("mlp.out", 0.5, slice(None), False))


def test_interleaved_rows_are_not_split():
    model = toys.build("gpt_neox")
    recipe = {"replace": [{"role": "attn.qkv", "split": 3, "structure": LOW_RANK}]}
    with pytest.raises(
        ValueError, match=r"query_key_value \(96x32\): .* head by head, so split: 3 can't part them; leave"
    ):
        make_plan(model, parse_recipe(recipe, "test"))
    gpt2 = toys.build("gpt2")
    dense = copy.deepcopy(gpt2)
    fold(gpt2, recipe["replace"])
    torch.testing.assert_close(toys.logits(gpt2), toys.logits(reference(dense, gpt2)))


# heads and counts --------------------------------------------------------------------------------------------------


@every
def test_parameters_are_counted_once(name):
    """Each tensor in memory once; the head only where it has a matrix of its own; the same without any memory."""
    model = toys.build(name)
    assert is_tied(model) == (name in TIED)
    memory = {value.data_ptr(): value.numel() for value in model.state_dict().values() if value.is_floating_point()}
    total, head = sum(memory.values()), 0 if name in TIED else 97 * 32
    dense = {"total": total, "without_head": total - head, "trainable": total}
    with torch.device("meta"):
        empty = type(model)(toys.config(name))
    assert count(model) == count(empty) == dense
    fold(model, rules(model))
    memory = {value.data_ptr(): value.numel() for value in model.state_dict().values() if value.is_floating_point()}
    install_empty(empty, read_plan(empty, describe(model)))
    assert count(model) == count(empty)
    own = (
        0
        if name in TIED
        else sum(p.numel() for key, p in model.get_output_embeddings().named_parameters() if key != "bias")
    )
    assert count(model)["total"] == sum(memory.values()) == count(model)["without_head"] + own < total


def test_a_layer_that_runs_often_is_counted_once_and_priced_often():
    model = toys.build("albert-groups")  # 4 layers, 2 groups
    site = next(site for site in find_sites(model) if site.role == "mlp.in" and site.layer == 1)
    assert site.calls == 2
    assert site_flops(site, model.get_submodule(site.path), rows=10) == 2 * (2 * 10 * 48 * 32)


# folding -----------------------------------------------------------------------------------------------------------


def variants():
    for name in toys.TOYS:
        yield pytest.param(name, False, id=name)
        if name in TIED:
            yield pytest.param(name, True, id=f"{name}-own-head")


@pytest.mark.parametrize(("name", "untie"), variants())
def test_folded_saved_read_and_made_dense_again(name, untie, tmp_path):
    """All is folded: the function is that of the slow dense twin, to the bit after reading, and plain once dense."""
    dense, model = toys.build(name), toys.build(name)
    more = [{"role": "head", "structure": TRAIN}] if untie else []
    fold(model, rules(model) + more, untie=untie)
    expected = toys.logits(model)
    torch.testing.assert_close(expected, toys.logits(reference(dense, model)), rtol=1e-4, atol=1e-5)
    for size in ("20KB",) if untie else ("5GB",) if name in TIED else ("5GB", "20KB"):  # of either tied head, one
        model.save_pretrained(tmp_path, max_shard_size=size)
        again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert torch.equal(toys.logits(again), expected)
        assert count(again) == count(model)
    base = AutoModel.from_pretrained(tmp_path)
    if base_path(model):
        assert torch.equal(toys.logits(base), toys.logits(model.base_model))
    plain = densify(again)
    torch.testing.assert_close(toys.logits(plain), expected, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    last = type(model).from_pretrained(tmp_path)
    assert count(plain) == count(last)
    assert torch.equal(toys.logits(last), toys.logits(plain))
    assert count(last)["total"] == count(dense)["total"] + untie * dense.get_output_embeddings().weight.numel()
    assert [type(module) for module in last.modules()] == [type(module) for module in dense.modules()]


def test_scaled_embeddings_keep_their_rounded_scale():
    """Gemma multiplies by sqrt(width) rounded to the type of its weights."""
    model = toys.build("gemma3_text").to(torch.bfloat16)
    fold(model, [{"role": "embed", "structure": {"kind": "low_rank", "rank": 32}}])
    embedding = model.get_input_embeddings()
    plain = densify(copy.deepcopy(model)).get_input_embeddings()
    ids = torch.arange(97)
    assert embedding.multiplier == pytest.approx(32**0.5)
    scale = torch.tensor(32**0.5).bfloat16()
    torch.testing.assert_close(embedding(ids) / plain(ids), torch.ones(97, 32).bfloat16(), rtol=0, atol=0.01)
    assert torch.equal(embedding(ids), embedding.structure.rows(embedding.factors(), ids) * scale)


# architectures without a table ---------------------------------------------------------------------------------------


@pytest.fixture
def stranger():
    torch.manual_seed(0)
    blocks = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
    }
    config = AutoConfig.for_model("gpt_neo", **toys.SMALL, **blocks, num_heads=4, max_position_embeddings=32)
    yield AutoModelForCausalLM.from_config(config).eval()
    ARCHITECTURES.pop("gpt_neo", None)


def test_an_unknown_architecture_is_told_how_to_become_known(stranger, tmp_path):
    with pytest.raises(ValueError) as raised:
        find_sites(stranger)
    message = str(raised.value)
    assert message.startswith(
        "there is no role table for model_type 'gpt_neo' (is it like 'gpt_neox'?); its linear layers"
    )
    assert "h.*.attn.attention.k_proj 32x32, " in message
    assert "h.*.mlp.c_fc 48x32" in message
    assert 'ARCHITECTURES["gpt_neo"] = Architecture({"mlp.in": "h.*.attn.attention.k_proj", ...})' in message
    ARCHITECTURES["gpt_neo"] = Architecture({"mlp.in": "h.*.mlp.c_fc", "mlp.out": "h.*.mlp.c_proj"})
    dense = copy.deepcopy(stranger)
    fold(stranger, rules(stranger))
    torch.testing.assert_close(toys.logits(stranger), toys.logits(reference(dense, stranger)))
    stranger.save_pretrained(tmp_path)
    ARCHITECTURES.pop("gpt_neo")  # the checkpoint says it all
    assert torch.equal(toys.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), toys.logits(stranger))


# matrices that can't be folded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("share", [None, {"factors": ["core_1"]}])
def test_values_that_are_no_numbers_name_the_site_and_change_nothing(value, share):
    model = toys.build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = value
    rule = {"role": "mlp.in", "structure": TRAIN} | ({"share": share} if share else {})
    with pytest.raises(
        ValueError, match=r"^the weight of transformer.h.1.mlp.c_fc holds 1 values that are NaN or Inf; mend"
    ):
        fold(model, [rule])
    assert [type(module) for module in model.modules()] == [type(module) for module in toys.build("gpt2").modules()]


def test_weights_that_are_not_there_name_the_site():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(toys.config("gpt2"))
    with pytest.raises(ValueError, match=r"^the weight of transformer.h.0.mlp.c_fc is not in memory"):
        fold(model, [{"role": "mlp.in", "structure": LOW_RANK}])


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"^source is 'nosie'; it must be 'weights' or 'noise'$"):
        fold(toys.build("gpt2"), [{"role": "mlp.in", "structure": LOW_RANK}], source="nosie")
