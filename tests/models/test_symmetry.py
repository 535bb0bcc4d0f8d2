"""Symmetries: every change leaves the logits as they were, really changes the weights, or is refused in one sentence."""

from itertools import pairwise

import pytest
import torch
import toys
import transformers
from folding import LOW_RANK, fold
from transformers import AutoConfig, AutoModelForCausalLM

from tenfold.models.architectures import ARCHITECTURES, Architecture
from tenfold.models.attention_layout import heads_of
from tenfold.models.invariances.choice import Part, best_rotation, helmert, order_hidden, pca_rotation, stream_parts
from tenfold.models.invariances.free_symmetries import (
    center_residual,
    free_symmetries,
    fuse_norms,
    hidden_weights,
    permute_hidden,
    permute_residual,
    rotate_residual,
    turn_heads,
)
from tenfold.models.sites import find_sites, is_tied, weight_of
from tenfold.structure import BlockTensorTrain, Kronecker, LowRank

every = pytest.mark.parametrize("name", toys.TOYS)
ONES, ANY, ORDER = "rotation that keeps ones", "rotation", "permutation"

# name -> residual stream, head, queries; hidden units and values are free everywhere
FREE = {
    "gpt2": (ONES, "untie", "basis"),
    "gpt2-untied": (ONES, "keep", "basis"),
    "openai-gpt": (ORDER, "keep", "basis"),
    "gpt_neox": (ONES, "keep", "pairs"),
    "gpt_neox-tied": (ONES, "untie", "pairs"),
    "opt": (ONES, "untie", "basis"),
    "opt-projected": (ONES, "keep", "basis"),  # the head lies behind a projection
    "llama": (ANY, "keep", "pairs"),
    "llama-tied": (ANY, "untie", "pairs"),
    "mistral": (ANY, "keep", "pairs"),
    "qwen2": (ANY, "keep", "pairs"),
    "qwen3": (ANY, "untie", "none"),
    "gemma3_text": (ORDER, "keep", "none"),
    "gemma3": ("none", "keep", "none"),
    "phi": (ONES, "keep", "pairs"),
    "bert": (ORDER, "keep", "basis"),
    "roberta": (ORDER, "keep", "basis"),
    "albert": (ORDER, "keep", "basis"),
    "albert-groups": (ORDER, "keep", "basis"),
    "t5": (ORDER, "keep", "basis"),
    "t5-gated": (ANY, "untie", "basis"),
}
TURNED = [name for name, (residual, _, _) in FREE.items() if residual in (ONES, ANY)]


@torch.no_grad()
def shake(model):
    """Norms and biases far from one and from zero."""
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or ".ln_" in name:
            parameter.uniform_(-0.6, 0.6) if name.endswith("bias") else parameter.uniform_(0.5, 2.0)
        elif name.endswith("bias"):
            parameter.uniform_(-0.3, 0.3)
    return model.eval()


def build(name, **changes):
    return shake(toys.build(name, **changes))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def untouched(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)  # some logits are larger than 10


def rotation(width, keeps_ones=False):
    if not keeps_ones:
        return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    basis = helmert(width)
    return torch.full((width, width), 1 / width).double() + basis @ rotation(width - 1) @ basis.T


def rotated(name, model):
    return rotate_residual(model, rotation(32, FREE[name][0] == ONES), untie=FREE[name][1] == "untie")


# what is free ----------------------------------------------------------------------------------------------------------


@every
def test_table_of_what_is_free(name):
    model = build(name)
    before = snapshot(model)
    free = free_symmetries(model)
    residual, head, queries = FREE[name]
    because = free.pop("because")
    assert free == {"hidden": ORDER, "residual": residual, "head": head, "values": "basis", "queries": queries}
    assert bool(because) == (residual not in (ONES, ANY))
    assert untouched(model, before)


def test_what_is_free_is_seen_in_half_precision_on_fresh_weights_and_in_training():
    for name in ("gpt2", "llama", "gpt_neox", "phi", "bert", "gemma3_text"):
        torch.manual_seed(0)
        fresh = getattr(transformers, toys.TOYS[name][0])(toys.config(name)).train()
        for model in (fresh, build(name).to(torch.bfloat16)):
            assert free_symmetries(model)["residual"] == FREE[name][0]
        assert all(module.training for module in fresh.modules())


# hidden units ----------------------------------------------------------------------------------------------------------


def mlps(model):
    """``{path of an output matrix: number of units}``"""
    return {site.path: site.shape[1] for site in find_sites(model) if site.role == "mlp.out"}


@every
def test_hidden_units_in_any_order(name):
    model = build(name)
    before, logits = snapshot(model), toys.logits(model)
    orders = {path: torch.randperm(units) for path, units in mlps(model).items()}
    assert permute_hidden(model, orders) is model
    close(toys.logits(model), logits)
    for site in find_sites(model):
        if site.role.startswith("mlp."):
            assert not torch.equal(model.state_dict()[f"{site.path}.weight"], before[f"{site.path}.weight"])
            if site.bias and site.role != "mlp.out":
                assert not torch.equal(model.state_dict()[f"{site.path}.bias"], before[f"{site.path}.bias"])


@pytest.mark.parametrize("where", [1, "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.up_proj"])
def test_an_mlp_is_named_by_its_number_or_path(where):
    model = build("llama")
    before, order = snapshot(model), list(reversed(range(48)))
    permute_hidden(model, {where: order})
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], before[name][order])


@pytest.fixture
def phi3():
    """Gate and input matrix in one, query, key and value in one with grouped heads."""
    paths = {"attn.qkv": "self_attn.qkv_proj", "attn.out": "self_attn.o_proj"}
    paths |= {"mlp.in_gate": "mlp.gate_up_proj", "mlp.out": "mlp.down_proj"}
    ARCHITECTURES["phi3"] = Architecture({role: f"layers.*.{path}" for role, path in paths.items()})
    torch.manual_seed(0)
    yield shake(AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **toys.GROUPED)))
    ARCHITECTURES.pop("phi3")


def test_fused_matrices_are_changed_part_by_part(phi3):
    logits = toys.logits(phi3)
    assert free_symmetries(phi3)["residual"] == ANY
    permute_hidden(phi3, {0: torch.randperm(48), 1: torch.randperm(48)})
    close(toys.logits(phi3), logits)
    turn_heads(phi3, 0, values=anything(2, 8), queries=pairs(2, 8, 8))
    close(toys.logits(phi3), logits)
    rotate_residual(phi3, rotation(32))
    close(toys.logits(phi3), logits)
    first, second, out = hidden_weights(phi3, 1)
    fused = phi3.model.layers[1].mlp.gate_up_proj.weight
    assert torch.equal(torch.cat([first, second]).float(), fused)
    assert torch.equal(out.T.float(), phi3.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("name", "orders", "message"),
    [
        ("llama", {7: range(48)}, r"^7 means 0 MLPs of this model; name one of model.layers.0, model.layers.1$"),
        ("llama", {"model": range(48)}, r"^'model' means 2 MLPs"),
        (
            "t5",
            {0: range(48)},
            r"^0 means 2 MLPs of this model; name one of encoder.block.0.layer.1, .*decoder.block.0",
        ),
        (
            "llama",
            {0: range(48), 1: range(47)},
            r"units of model.layers.1.* has shape \(47,\), but must hold each of 0 to 47",
        ),
        (
            "llama",
            {0: range(48), 1: [0] * 48},
            r"^the order of the hidden units of model.layers.1.mlp.down_proj has shape",
        ),
    ],
)
def test_orders_of_hidden_units_that_are_refused(name, orders, message):
    model = build(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        permute_hidden(model, {where: list(order) for where, order in orders.items()})
    assert untouched(model, before)


LLAMA = {
    role: f"layers.*.self_attn.{path}_proj" for role, path in (("attn.q", "q"), ("attn.k", "k"), ("attn.out", "o"))
}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            {"mlp.in": "layers.*.mlp.up_proj"},
            r"^model.layers.0.mlp.up_proj has no role mlp.out beside it; add it to the table",
        ),
        (
            {"mlp.in": "layers.*.self_attn.k_proj", "mlp.out": "layers.*.mlp.down_proj"},
            r"^the rows of model.layers.0.self_attn.k_proj alternate or are none of 48 units; leave their order$",
        ),
        (LLAMA, r"^the heads of model.layers.0.self_attn.q_proj are not known; leave them as they are$"),
        ({"attn.out": LLAMA["attn.out"]}, r"^the heads of model.layers.0.self_attn.o_proj are not known"),
    ],
)
def test_tables_that_do_not_say_enough(monkeypatch, paths, message):
    monkeypatch.setitem(ARCHITECTURES, "llama", Architecture(paths))
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        if "mlp.in" in paths:
            permute_hidden(model, {0: list(range(48))})
        else:
            assert free_symmetries(model)["values"] == free_symmetries(model)["queries"] == "none"
            turn_heads(model, 0, values=torch.eye(8))


def test_folded_models_are_refused():
    model = build("llama")
    fold(model, [{"role": "mlp.in", "structure": LOW_RANK}])
    for change in (
        lambda: permute_hidden(model, {0: list(range(48))}),
        lambda: permute_residual(model, list(range(32))),
        lambda: rotate_residual(model, torch.eye(32)),
    ):
        with pytest.raises(
            ValueError, match=r"layers.0.mlp.up_proj is folded: change the basis before folding, or make"
        ):
            change()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(toys.config("llama"))
    with pytest.raises(ValueError, match=r"is not in memory"):
        permute_residual(empty, list(range(32)))


# the residual stream: permutations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in toys.TOYS if FREE[name][0] != "none"])
def test_the_stream_in_any_order(name):
    model = build(name)
    before, logits = snapshot(model), toys.logits(model)
    tied, order = is_tied(model), torch.randperm(32)
    assert permute_residual(model, order) is model
    close(toys.logits(model), logits)
    assert is_tied(model) == tied
    for site in find_sites(model):
        if site.role in ("attn.out", "mlp.out"):  # the rows that write, and no others, are in the new order
            new, old = (state[f"{site.path}.weight"] for state in (model.state_dict(), before))
            rows = old[:, order] if name.startswith(("gpt2", "openai")) else old[order]
            assert torch.equal(new, rows)
    permute_residual(model, order.argsort())
    assert untouched(model, before)


def test_images_do_not_reach_the_stream_of_text():
    model = build("gemma3")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^model.multi_modal_projector.mm_input_projection_weight \(16, 32\) has an axis as"
    ):
        permute_residual(model, torch.randperm(32))
    assert untouched(model, before)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "BertForSequenceClassification"),
        ("bert", "BertForTokenClassification"),
        ("bert", "BertForPreTraining"),
        ("llama", "LlamaForSequenceClassification"),
        ("gpt2", "GPT2ForTokenClassification"),
        ("roberta", "RobertaForSequenceClassification"),
    ],
)
def test_matrices_without_a_role_follow(name, kind):
    model = shake(getattr(transformers, kind)(toys.config(name)))
    ids = toys.inputs(model)["input_ids"][:1]
    before = [value for value in model(ids).to_tuple() if isinstance(value, torch.Tensor)]
    permute_residual(model, torch.randperm(32))
    after = [value for value in model(ids).to_tuple() if isinstance(value, torch.Tensor)]
    assert len(before) == len(after) == (2 if kind == "BertForPreTraining" else 1)
    for one, other in zip(before, after, strict=True):
        close(one, other)


def test_hidden_states_of_a_model_without_head_come_in_the_new_order():
    model = shake(transformers.BertModel(toys.config("bert")))
    ids, order = toys.inputs(model)["input_ids"], torch.randperm(32)
    states, pooled = model(ids).to_tuple()
    permute_residual(model, order)
    new, new_pooled = model(ids).to_tuple()
    close(new, states[..., order])
    close(new_pooled, pooled[..., order])


def test_what_uses_the_stream_unseen_is_noticed_and_undone():
    model = build("llama")
    fixed = torch.randn(32)
    model.model.layers[1].register_forward_pre_hook(lambda module, given: (given[0] + fixed, *given[1:]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^something in this llama uses the residual stream and has no role"):
        permute_residual(model, torch.arange(32).roll(1))
    assert untouched(model, before)
    with pytest.raises(
        ValueError, match=r"what model.layers.1.input_layernorm gets is no sum of what was written before"
    ):
        rotate_residual(model, rotation(32))
    with pytest.raises(
        ValueError, match=r"^the order of the residual stream has shape \(31,\), but must hold each of 0 to 31"
    ):
        permute_residual(model, torch.arange(31))


# the residual stream: rotations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TURNED)
def test_the_stream_in_any_basis(name, tmp_path):
    model = build(name)
    embedding = model.get_input_embeddings().weight.detach().clone()
    logits, turn = toys.logits(model), rotation(32, FREE[name][0] == ONES)
    assert rotate_residual(model, turn, untie=FREE[name][1] == "untie") is model
    close(toys.logits(model), logits)
    if name != "opt-projected":
        close(model.get_input_embeddings().weight, (embedding.double() @ turn).float())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(toys.logits(again), toys.logits(model))
    if FREE[name][1] == "untie":
        assert not is_tied(model)
    rotate_residual(model, rotation(32, FREE[name][0] == ONES))  # its gains are all one: no need to untie any more
    close(toys.logits(model), logits)


@pytest.mark.parametrize("kind", ["parallel", "one after the other"])
def test_blocks_of_gpt_neox(kind):
    config = AutoConfig.for_model("gpt_neox", **toys.ENCODER, use_parallel_residual=kind == "parallel")
    model = shake(AutoModelForCausalLM.from_config(config))
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, rotation(32, True))), logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bert",
            r"^only permutations .* bert.encoder.layer.0.attention.output.LayerNorm gets is no sum .*\(post-norm\)$",
        ),
        ("openai-gpt", r"transformer.h.0.ln_2 gets is no sum of what was written before \(post-norm\)$"),
        (
            "gemma3_text",
            r"post_attention_layernorm stands between model.layers.0.self_attn.o_proj and the stream \(sandwich",
        ),
        ("t5", r"^lm_head reads something else than the output of one norm, so that only permutations"),
        (
            "gpt2",
            r"^the head of this model is tied to its embedding, but only the head .*ln_f makes; untie=True .* 3,104 para",
        ),
        ("llama-tied", r"^the head of this model is tied to its embedding, .* model.norm makes; untie=True"),
    ],
)
def test_models_that_are_not_rotated(name, message):
    model = build(name)
    before = snapshot(model)
    for change in (lambda: rotate_residual(model, torch.eye(32)), lambda: fuse_norms(model)):
        with pytest.raises(ValueError, match=message):
            change()
    assert untouched(model, before)


def test_a_classifier_as_wide_as_the_stream_is_not_taken_for_a_part_of_it():
    config = toys.config("llama")
    config.num_labels = 32
    model = shake(transformers.LlamaForSequenceClassification(config))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^score makes vectors as wide as the residual stream that no role says are added"
    ):
        rotate_residual(model, torch.eye(32))
    with pytest.raises(ValueError, match=r"^something in this llama .*; its matrices without a role are score$"):
        permute_residual(model, torch.arange(32).roll(1))
    assert untouched(model, before)


def test_norms_of_heads_as_wide_as_the_stream_stay_as_they_are():
    config = AutoConfig.for_model("qwen3", **toys.GROUPED, head_dim=32, tie_word_embeddings=False)
    model = shake(AutoModelForCausalLM.from_config(config))
    logits, gains = toys.logits(model), model.model.layers[0].self_attn.q_norm.weight.clone()
    close(toys.logits(permute_residual(model, torch.randperm(32))), logits)
    close(toys.logits(rotate_residual(model, rotation(32))), logits)
    assert torch.equal(model.model.layers[0].self_attn.q_norm.weight, gains)


def test_a_stream_that_no_norm_reads_to_the_end_is_not_rotated():
    config = AutoConfig.for_model("opt", **toys.OPT, _remove_final_layer_norm=True)
    with pytest.raises(ValueError, match=r"no rotations: no norm reads all that opt writes to it$"):
        rotate_residual(shake(transformers.OPTModel(config)), torch.eye(32))


def test_opt_with_its_norms_behind_is_not_rotated():
    config = AutoConfig.for_model("opt", **toys.OPT, do_layer_norm_before=False)
    with pytest.raises(ValueError, match=r"post-norm"):
        rotate_residual(AutoModelForCausalLM.from_config(config), torch.eye(32))


@pytest.mark.parametrize(
    ("name", "turn", "message"),
    [
        ("llama", torch.eye(31), r"^the rotation has shape \(31, 31\), but the residual stream needs \(32, 32\)$"),
        ("llama", 1.01 * torch.eye(32), r"^the rotation is not orthogonal: Q\^T Q differs from the identity by 0.02"),
        ("llama", torch.full((32, 32), torch.nan), r"^the rotation is not orthogonal: Q\^T Q differs .* by nan"),
        ("gpt_neox", -torch.eye(32), r"only rotations with Q 1 = 1 are free, but here Q 1 differs from 1 by 2;"),
    ],
)
def test_matrices_that_are_no_rotation(name, turn, message):
    model = build(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        rotate_residual(model, turn)
    assert untouched(model, before)


@pytest.fixture
def gemma():
    """Norms whose weight is added to one, and none behind a writer."""
    ARCHITECTURES["gemma"] = ARCHITECTURES["llama"]
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma", **toys.GROUPED, head_dim=8, tie_word_embeddings=False)
    yield shake(AutoModelForCausalLM.from_config(config))
    ARCHITECTURES.pop("gemma")


def test_gains_that_are_added_to_one(gemma):
    logits = toys.logits(gemma)
    fuse_norms(gemma)
    assert not any(norm.weight.any() for norm in (gemma.model.norm, *[b.input_layernorm for b in gemma.model.layers]))
    close(toys.logits(gemma), logits)
    close(toys.logits(rotate_residual(gemma, rotation(32))), logits)


@pytest.mark.parametrize("name", TURNED)
def test_fused_norms_have_gain_one(name):
    model = build(name)
    logits = toys.logits(model)
    assert fuse_norms(model, untie=True) is model
    close(toys.logits(model), logits)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and m.weight.shape == (32,)]
    assert norms
    assert all(torch.equal(norm.weight, torch.ones(32)) for norm in norms)
    assert is_tied(model) == (name == "opt-projected")


def test_gains_of_zero_go_to_the_biases_or_are_refused():
    model = build("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.layers[0].input_layernorm.weight[3] = 0.0
        model.gpt_neox.layers[1].post_attention_layernorm.weight[:5] = 1e-7
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, rotation(32, True))), logits)
    model = build("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight[3:5] = 0.0
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^2 gains of gpt_neox.final_layer_norm are zero .* lm_head has no bias to take"
    ):
        rotate_residual(model, rotation(32, True))
    assert untouched(model, before)
    assert free_symmetries(model)["residual"] == ORDER
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias[3:5] = 0.0
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, rotation(32, True))), logits)


def test_a_norm_that_nothing_reads_keeps_its_gains():
    model = build("llama").model
    with pytest.raises(
        ValueError, match=r"^no matrix of this model reads norm, so that its gains have nowhere to go; give"
    ):
        rotate_residual(model, rotation(32))
    torch.nn.init.constant_(model.norm.weight, 1.5)
    ids, turn = torch.arange(3, 9)[None], rotation(32)
    states = model(ids)[0]
    close(rotate_residual(model, turn)(ids)[0], (states.double() @ turn).float())


def test_a_stream_without_mean():
    model = build("gpt2")
    logits = toys.logits(model)
    with pytest.raises(ValueError, match=r"^the head of this model is tied"):
        center_residual(model)
    assert center_residual(model, untie=True) is model
    close(toys.logits(model), logits)
    with torch.no_grad():
        states = model(**toys.inputs(model), output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    assert max(float(state.mean(-1).abs().max()) for state in states) < 1e-6
    with pytest.raises(ValueError, match=r"^the norms of this model keep the mean \(RMSNorm\)"):
        center_residual(build("llama"))


# heads -----------------------------------------------------------------------------------------------------------------


def anything(groups, size):
    """A basis for every group that is far from orthogonal, and can be inverted well."""
    turns = [torch.linalg.qr(torch.randn(groups, size, size))[0] for _ in range(2)]
    return turns[0] @ torch.empty(groups, size).uniform_(0.3, 3.0).diag_embed() @ turns[1]


def pairs(groups, size, rotary):
    """Turns and scales of every pair, any basis of what is not rotated."""
    half, bases = rotary // 2, torch.zeros(groups, size, size)
    bases[:, rotary:, rotary:] = anything(groups, size - rotary)
    for group in range(groups):
        for i in range(half):
            a, b = 0.3 + torch.rand(2)
            bases[group, i, i] = bases[group, i + half, i + half] = a
            bases[group, i, i + half], bases[group, i + half, i] = -b, b
    return bases


def attentions(model):
    """The path of every output matrix, and its heads."""
    sites = find_sites(model)
    inside = {
        site.path.rpartition(".")[0] for site in sites if site.role.startswith("attn.") and site.role != "attn.out"
    }
    heads = heads_of(model, model.get_submodule(sorted(inside)[0]))
    return [site.path for site in sites if site.role == "attn.out"], heads


@every
def test_values_in_any_basis(name):
    model = build(name)
    before, logits = snapshot(model), toys.logits(model)
    paths, heads = attentions(model)
    for path in paths:
        assert turn_heads(model, path, values=anything(heads.groups, heads.size)) is model
        assert not torch.equal(model.state_dict()[f"{path}.weight"], before[f"{path}.weight"])
    close(toys.logits(model), logits)


@pytest.mark.parametrize("name", [name for name in toys.TOYS if FREE[name][2] != "none"])
def test_queries_and_keys_in_any_basis_that_is_free(name):
    model = build(name)
    before, logits = snapshot(model), toys.logits(model)
    paths, heads = attentions(model)
    for path in paths:
        turn = (
            anything(heads.groups, heads.size)
            if FREE[name][2] == "basis"
            else pairs(heads.groups, heads.size, heads.rotary)
        )
        turn_heads(model, path, queries=turn)
    close(toys.logits(model), logits)
    for site in find_sites(model):
        if site.role in ("attn.q", "attn.k", "attn.qkv"):
            assert not torch.equal(model.state_dict()[f"{site.path}.weight"], before[f"{site.path}.weight"])
    if FREE[name][2] == "pairs":
        assert (heads.rotary < heads.size) == (name.startswith(("gpt_neox", "phi")))
        before = snapshot(model)
        with pytest.raises(
            ValueError, match=rf"rotated by position in pairs \(i, i \+ {heads.rotary // 2}\), so that only"
        ):
            turn_heads(model, paths[0], queries=torch.eye(heads.size) + 0.01 * torch.randn(heads.size, heads.size))
        assert untouched(model, before)


@pytest.mark.parametrize(
    ("name", "layer", "bases", "message"),
    [
        (
            "qwen3",
            0,
            {"queries": torch.eye(16)},
            r"^a norm stands between model.layers.0.self_attn.q_proj and the product",
        ),
        ("gemma3", 1, {"queries": torch.eye(8)}, r"^a norm stands between model.language_model.layers.1"),
        (
            "llama",
            0,
            {"values": torch.eye(7)},
            r"^the basis of the values has shape \(7, 7\), but the heads need \(2, 8, 8\)",
        ),
        (
            "llama",
            0,
            {"values": torch.ones(8, 8)},
            r"^the basis of the values of group 0 has condition number .* below 1e\+06",
        ),
        (
            "t5",
            1,
            {"values": torch.eye(8)},
            r"^1 means 3 attentions of this model; name one of encoder.block.0.layer.0, ",
        ),
    ],
)
def test_bases_that_are_refused(name, layer, bases, message):
    model = build(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        turn_heads(model, layer, **bases)
    assert untouched(model, before)


@every
def test_all_together(name):
    model = build(name)
    logits = toys.logits(model)
    permute_hidden(model, {path: torch.randperm(units) for path, units in mlps(model).items()})
    paths, heads = attentions(model)
    for path in paths:
        turn_heads(model, path, values=rotation(heads.size))
    if FREE[name][0] != "none":
        permute_residual(model, torch.randperm(32))
    if name in TURNED:
        rotated(name, model)
    close(toys.logits(model), logits)


# choices ---------------------------------------------------------------------------------------------------------------


def second_moment(width, generator=None):
    scale = torch.logspace(0, -2, width, dtype=torch.float64)
    x = torch.randn(4 * width, width, dtype=torch.float64) * scale @ rotation(width) + 0.3
    return x.T @ x / len(x)


def test_principal_components_come_first():
    second = second_moment(12)
    turn = pca_rotation(second)
    close(turn.T @ turn, torch.eye(12).double())
    energies = turn.T @ second @ turn
    close(energies, energies.diagonal().diag())
    assert bool((energies.diagonal().diff() <= 0).all())


def test_principal_components_beside_the_ones():
    """The leading ``k`` in the complement of the ones lie on the first ``k + 1`` coordinates; what is left is the mean."""
    second = second_moment(12)
    turn, flat = pca_rotation(second, layer_norm=True), torch.full((12, 12), 1 / 12).double()
    close(turn.T @ turn, torch.eye(12).double())
    close(turn.sum(1), torch.ones(12).double())
    centred = (torch.eye(12) - flat) @ second @ (torch.eye(12) - flat)
    values, vectors = torch.linalg.eigh(centred)
    for k in range(1, 12):
        x = vectors[:, -k:] @ torch.randn(k).double() + 0.7
        new = turn.T @ x
        assert new.mean() == pytest.approx(x.mean())
        close(new[k + 1 :], torch.full((12 - k - 1,), float(x.mean())).double())
        kept = turn[:, : k + 1] - turn[:, : k + 1].mean(1, keepdim=True)  # vectors of zero sum on the first coordinates
        assert torch.linalg.matrix_rank(kept, rtol=1e-9) == k
        held = torch.linalg.qr(kept)[0][:, :k] if k < 11 else torch.linalg.svd(kept)[0][:, :k]
        assert float((held.T @ centred @ held).trace()) == pytest.approx(float(values[-k:].sum()))


def test_helmert_basis():
    basis = helmert(5)
    close(basis.T @ basis, torch.eye(4).double())
    close(basis.sum(0), torch.zeros(4).double())
    assert torch.equal(basis[:, 1] * 6**0.5, torch.tensor([1.0, 1, -2, 0, 0]).double())


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (torch.ones(3, 4), r"^the second moment has shape \(3, 4\)"),
        (torch.ones(3, 3).triu(), r"not symmetric, or holds NaN or Inf: it differs by 1;"),
        (torch.full((3, 3), torch.nan), r"or holds NaN or Inf"),
    ],
)
def test_second_moments_that_are_refused(second, message):
    with pytest.raises(ValueError, match=message):
        pca_rotation(second)


KRONECKER = Kronecker(outs=(6, 2), ins=(6, 2), terms=1)


def parts(metric=False, noise=0.0):
    """Readers and a writer that are Kronecker products after the rotation that comes with them; ``metric``: for which."""
    turn = rotation(12, True)
    exact = [KRONECKER.dense(KRONECKER.init(1.0, dtype=torch.float64)) for _ in range(3)]
    exact = [weight + noise * torch.randn(12, 12) for weight in exact]
    weights = [exact[0] @ turn.T, exact[1] @ turn.T, turn @ exact[2]]
    metrics = [second_moment(12) if metric is True or (metric == "writers" and k == 2) else None for k in range(3)]
    return turn, [Part(w, KRONECKER, k < 2, c) for k, (w, c) in enumerate(zip(weights, metrics, strict=True))]


def error(part, turn):
    """The least error of a part after a rotation, from the definition."""
    weight = part.weight @ turn if part.reads else turn.T @ part.weight
    metric = torch.eye(12).double() if part.metric is None else part.metric
    metric = turn.T @ metric @ turn if part.reads else metric
    rest = weight - KRONECKER.dense(KRONECKER.fit(weight, metric, sweeps=50))
    return float((rest @ torch.linalg.cholesky(metric)).square().sum())


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("metric", [False, True])
def test_rotations_towards_a_structure(metric, layer_norm):
    """The error never grows, ends where it is said to, and falls far below that of the matrices as they are."""
    _, given = parts(metric, noise=0.05)
    turn, losses = best_rotation(given, layer_norm=layer_norm, rounds=25, sweeps=3)
    close(turn.T @ turn, torch.eye(12).double())
    assert (float((turn.sum(1) - 1).abs().max()) < 1e-9) == layer_norm
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]
    assert sum(error(part, turn) for part in given) <= losses[-1] * (1 + 1e-6)


@pytest.mark.parametrize("metric", [False, True])
def test_a_rotation_that_was_hidden_is_found_from_nearby(metric):
    turn, given = parts(metric)
    assert sum(error(part, turn) for part in given) < 1e-12
    near = torch.linalg.qr(turn + 0.02 * torch.randn(12, 12))[0]
    near = near * (near * turn).sum(0).sign()
    _, losses = best_rotation(given, start=near, rounds=120, steps=20, tolerance=0.0)
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("metric", [False, "writers"])
def test_one_step_is_the_best_rotation_for_what_was_fitted(metric):
    _, given = parts(metric, noise=0.3)
    fits = [KRONECKER.dense(KRONECKER.fit(*part.turned(torch.eye(12).double()), sweeps=50)) for part in given]
    turn, _ = best_rotation(given, rounds=2, tolerance=-1.0, sweeps=50)
    for _ in range(20):
        skew = 1e-3 * torch.randn(12, 12).double().triu(1)
        other = turn @ torch.linalg.matrix_exp(skew - skew.T)
        loss = [sum(part.loss(q, fit) for part, fit in zip(given, fits, strict=True)) for q in (turn, other)]
        assert loss[0] <= loss[1]


def test_a_fit_goes_on_from_the_last_one():
    turn = torch.eye(12).double()
    for part in parts(True, noise=0.5)[1]:
        last = part.fitted(turn, None, {"sweeps": 100})
        loss = [part.loss(turn, KRONECKER.dense(f)) for f in (last, part.fitted(turn, last, {"sweeps": 1}))]
        assert loss[1] <= loss[0] * (1 + 1e-12)


def test_rotations_of_a_model():
    model = fuse_norms(build("llama"))
    block = {"kind": "block_train", "rank": 2}
    structures = {
        site.path: LowRank.for_shape(
            *site.shape, block | {"outs": [site.shape[0] // 4, 4], "ins": [4, site.shape[1] // 4]}
        )
        for site in find_sites(model)
        if site.role in ("attn.q", "mlp.in", "mlp.out")
    }
    given = stream_parts(model, structures)
    assert [part.reads for part in given] == [not path.endswith("down_proj") for path in structures]
    turn, losses = best_rotation(given, rounds=3)
    assert len(losses) == 3
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, turn)), logits)
    left = 0.0
    for path, structure in structures.items():
        weight = weight_of(model.get_submodule(path)).detach().double()
        left += float((weight - structure.dense(structure.fit(weight))).square().sum())
    assert left == pytest.approx(losses[-1], rel=1e-4)
    assert left < losses[0]
    with pytest.raises(ValueError, match=r"^model.norm has role None: it neither reads nor writes"):
        stream_parts(model, {"model.norm": KRONECKER})
    with pytest.raises(ValueError, match=r"^the parts lie at streams of widths \[\]"):
        best_rotation([])


@pytest.mark.parametrize(
    "structure", [Kronecker(outs=(6, 2), ins=(5, 2)), BlockTensorTrain(outs=(6, 2), ins=(5, 2), rank=1)]
)
def test_hidden_units_in_a_better_order(structure):
    factors = [structure.init(1.0, dtype=torch.float64) for _ in range(2)]
    if isinstance(structure, Kronecker):
        factors[1]["inner"] = factors[0]["inner"]
    exact = [structure.dense(each) for each in factors]
    mixed = torch.randperm(12)
    weights = [weight[mixed] + 0.01 * torch.randn(12, 10) for weight in exact]

    def lost(order):
        return sum(
            float((w[order] - structure.dense(structure.fit(w[order]))).square().sum())
            for w in (w.double() for w in weights)
        )

    order = order_hidden(weights, structure, rounds=10, starts=8)
    assert lost(order) < (0.05 if isinstance(structure, Kronecker) else 0.9) * lost(torch.arange(12))
    again = order_hidden([weight[order] for weight in weights], structure, rounds=1)
    assert sorted(again.tolist()) == list(range(12))
    assert lost(order[again]) <= lost(order)


def test_an_order_that_is_the_best_one_stays():
    """The search shares the inner factor, and so does not see that two of them fit exactly as they are."""
    structure = Kronecker(outs=(6, 2), ins=(5, 2))
    for _ in range(3):
        weights = [structure.dense(structure.init(1.0, dtype=torch.float64)) for _ in range(2)]
        order = order_hidden(weights, structure)
        assert all(float((structure.dense(structure.fit(w[order])) - w[order]).norm()) < 1e-6 for w in weights)


def test_orders_that_can_not_be_searched():
    with pytest.raises(
        ValueError, match=r"has no outs and ins, so that the order of its rows can't be searched; take Kron"
    ):
        order_hidden([torch.randn(12, 10)], LowRank(out_features=12, in_features=10, rank=2))
    with pytest.raises(
        ValueError, match=r"^a weight has shape \(10, 12\) but Kronecker.* is \(12, 10\): \(units, width\)"
    ):
        order_hidden([torch.randn(10, 12)], Kronecker(outs=(6, 2), ins=(5, 2)))
