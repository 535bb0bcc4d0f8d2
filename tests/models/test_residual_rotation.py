"""Rotations of the residual stream: the logits stay as they were, or the model is refused in one sentence and untouched."""

import pytest
import torch
import toys
import transformers
from folding import LOW_RANK, fold
from transformers import AutoConfig, AutoModelForCausalLM

from tenfold.models.architectures import ARCHITECTURES
from tenfold.models.invariances.residual_rotation import (
    center_residual,
    check_rotatable,
    fuse_norms,
    rotate_residual,
)
from tenfold.models.sites import is_tied

# models that can be rotated: whether their norms subtract the mean, and whether their head is untied for that
ROTATED = {
    "gpt2": (True, True),
    "gpt2-untied": (True, False),
    "gpt_neox": (True, False),
    "gpt_neox-tied": (True, True),
    "opt": (True, True),
    "opt-projected": (True, False),  # the head lies behind a projection
    "llama": (False, False),
    "llama-tied": (False, True),
    "mistral": (False, False),
    "qwen2": (False, False),
    "qwen3": (False, True),
    "phi": (True, False),
    "t5-gated": (False, True),
}
rotatable = pytest.mark.parametrize("name", ROTATED)


def build(name):
    return toys.shake(toys.build(name))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)  # some logits are larger than 10


# which models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", toys.TOYS)
def test_models_that_can_be_rotated(name):
    model = build(name)
    before = toys.snapshot(model)
    if name in ROTATED:
        assert check_rotatable(model) == ROTATED[name][0]
    else:
        with pytest.raises(ValueError, match=r"^the residual stream of this [\w-]+ can't be rotated: "):
            check_rotatable(model)
    assert toys.is_untouched(model, before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "phi"])
def test_rotatable_in_half_precision_on_fresh_weights_and_in_training(name):
    torch.manual_seed(0)
    fresh = getattr(transformers, toys.TOYS[name][0])(toys.config(name)).train()
    for model in (fresh, build(name).to(torch.bfloat16)):
        assert check_rotatable(model) == ROTATED[name][0]
    assert all(module.training for module in fresh.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bert",
            r"pre-norm .* input of bert.encoder.layer.0.attention.output.LayerNorm is no sum .*\(post-norm\)",
        ),
        ("openai-gpt", r"the input of transformer.h.0.ln_2 is no sum of what was written before \(post-norm\)"),
        (
            "gemma3_text",
            r"post_attention_layernorm stands between model.layers.0.self_attn.o_proj and the stream \(sandwich",
        ),
        ("t5", r"lm_head reads something else than the output of one norm"),
        ("gemma3", r"^model.multi_modal_projector.mm_input_projection_weight \(16, 32\) has an axis as wide"),
        (
            "gpt2",
            r"^the head of this model is tied to its embedding, .* output of transformer.ln_f; untie=True .* 3,104 para",
        ),
        ("llama-tied", r"^the head of this model is tied to its embedding, .* output of model.norm; untie=True"),
    ],
)
def test_models_that_are_not_rotated(name, message):
    model = build(name)
    before = toys.snapshot(model)
    for change in (lambda: rotate_residual(model, torch.eye(32)), lambda: fuse_norms(model)):
        with pytest.raises(ValueError, match=message):
            change()
    assert toys.is_untouched(model, before)


def test_factorised_and_empty_models_are_refused():
    model = build("llama")
    fold(model, [{"role": "mlp.in", "structure": LOW_RANK}])
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj is factorised: change the basis before compression"):
        rotate_residual(model, torch.eye(32))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(toys.config("llama"))
    with pytest.raises(ValueError, match=r"is not in memory"):
        rotate_residual(empty, torch.eye(32))


def test_additions_to_the_stream_that_no_module_makes_are_noticed():
    model = build("llama")
    fixed = torch.randn(32)
    model.model.layers[1].register_forward_pre_hook(lambda module, given: (given[0] + fixed, *given[1:]))
    with pytest.raises(ValueError, match=r"the input of model.layers.1.input_layernorm is no sum of what was written"):
        rotate_residual(model, toys.rotation(32))


def test_a_classifier_as_wide_as_the_stream_is_not_taken_for_a_part_of_it():
    config = toys.config("llama")
    config.num_labels = 32
    model = toys.shake(transformers.LlamaForSequenceClassification(config))
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=r"score makes vectors of its width, and no role says that they are added"):
        rotate_residual(model, torch.eye(32))
    assert toys.is_untouched(model, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_remove_final_layer_norm": True}, r"no norm reads all that opt writes to it; take another model"),
        ({"do_layer_norm_before": False}, r"post-norm"),
    ],
)
def test_opt_without_a_norm_before_every_reader_is_not_rotated(changes, message):
    model = toys.shake(transformers.OPTModel(AutoConfig.for_model("opt", **toys.OPT, **changes)))
    with pytest.raises(ValueError, match=message):
        rotate_residual(model, torch.eye(32))


@pytest.mark.parametrize(
    ("name", "matrix", "message"),
    [
        ("llama", torch.eye(31), r"^the rotation has shape \(31, 31\), but the residual stream needs \(32, 32\)$"),
        ("llama", 1.01 * torch.eye(32), r"^the rotation is not orthogonal: Q\^T Q differs from the identity by 0.02"),
        ("llama", torch.full((32, 32), torch.nan), r"^the rotation is not orthogonal: Q\^T Q differs .* by nan"),
        ("gpt_neox", -torch.eye(32), r"only rotations with Q 1 = 1 are free, but here Q 1 differs from 1 by 2;"),
    ],
)
def test_matrices_that_are_no_rotation(name, matrix, message):
    model = build(name)
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=message):
        rotate_residual(model, matrix)
    assert toys.is_untouched(model, before)


# rotating and fusing ---------------------------------------------------------------------------------------------------


@rotatable
def test_rotated_models_compute_the_same(name, tmp_path):
    model, (keeps_ones, untie) = build(name), ROTATED[name]
    embedding = model.get_input_embeddings().weight.detach().clone()
    logits, q = toys.logits(model), toys.rotation(32, keeps_ones)
    assert rotate_residual(model, q, untie=untie) is model
    close(toys.logits(model), logits)
    if name != "opt-projected":
        close(model.get_input_embeddings().weight, (embedding.double() @ q).float())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(toys.logits(again), toys.logits(model))
    if untie:
        assert not is_tied(model)
    rotate_residual(model, toys.rotation(32, keeps_ones))  # its gains are all one: no need to untie any more
    close(toys.logits(model), logits)


@pytest.mark.parametrize("parallel", [True, False])
def test_blocks_of_gpt_neox(parallel):
    config = AutoConfig.for_model("gpt_neox", **toys.ENCODER, use_parallel_residual=parallel)
    model = toys.shake(AutoModelForCausalLM.from_config(config))
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, toys.rotation(32, True))), logits)


@pytest.mark.parametrize(
    ("kind", "paths", "changes"),
    [
        ("gemma", {}, {"head_dim": 8, "tie_word_embeddings": False}),  # norms whose weight is added to one
        (
            "phi3",  # gate and input matrix in one, query, key and value in one with grouped heads
            {
                "attn.qkv": "self_attn.qkv_proj",
                "attn.out": "self_attn.o_proj",
                "mlp.in_gate": "mlp.gate_up_proj",
                "mlp.out": "mlp.down_proj",
            },
            {},
        ),
    ],
)
def test_architectures_with_a_new_table(kind, paths, changes, monkeypatch):
    table = {role: f"layers.*.{path}" for role, path in paths.items()}
    monkeypatch.setitem(ARCHITECTURES, kind, type(ARCHITECTURES["llama"])(table or ARCHITECTURES["llama"].paths))
    torch.manual_seed(0)
    model = toys.shake(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **toys.GROUPED, **changes)))
    logits = toys.logits(model)
    fuse_norms(model)
    gain = 0.0 if kind == "gemma" else 1.0
    for norm in (model.model.norm, *[block.input_layernorm for block in model.model.layers]):
        assert torch.equal(norm.weight, torch.full((32,), gain))
    close(toys.logits(model), logits)
    close(toys.logits(rotate_residual(model, toys.rotation(32))), logits)


def test_norms_of_heads_as_wide_as_the_stream_stay_as_they_are():
    config = AutoConfig.for_model("qwen3", **toys.GROUPED, head_dim=32, tie_word_embeddings=False)
    model = toys.shake(AutoModelForCausalLM.from_config(config))
    logits, gains = toys.logits(model), model.model.layers[0].self_attn.q_norm.weight.clone()
    close(toys.logits(rotate_residual(model, toys.rotation(32))), logits)
    assert torch.equal(model.model.layers[0].self_attn.q_norm.weight, gains)


@rotatable
def test_fused_norms_have_gain_one(name):
    model = build(name)
    logits = toys.logits(model)
    assert fuse_norms(model, untie=True) is model
    close(toys.logits(model), logits)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and m.weight.shape == (32,)]
    assert norms
    assert all(torch.equal(norm.weight, torch.ones(32)) for norm in norms)
    assert is_tied(model) == (name == "opt-projected")


def test_shifts_behind_gains_of_zero_go_to_the_biases_or_are_refused():
    model = build("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.layers[0].input_layernorm.weight[3] = 0.0
        model.gpt_neox.layers[1].post_attention_layernorm.weight[:5] = 1e-7
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, toys.rotation(32, True))), logits)
    model = build("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight[3:5] = 0.0
    before, message = toys.snapshot(model), r"2 gains of gpt_neox.final_layer_norm are zero .* has no bias to absorb"
    for refuse in (lambda: rotate_residual(model, toys.rotation(32, True)), lambda: check_rotatable(model)):
        with pytest.raises(ValueError, match=message):
            refuse()
    assert toys.is_untouched(model, before)
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias[3:5] = 0.0
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, toys.rotation(32, True))), logits)


def test_a_norm_that_nothing_reads_keeps_its_gains():
    model = build("llama").model
    with pytest.raises(ValueError, match=r"^no matrix of this model reads norm, so that its gains have nowhere to go"):
        rotate_residual(model, toys.rotation(32))
    torch.nn.init.constant_(model.norm.weight, 1.5)
    ids, q = torch.arange(3, 9)[None], toys.rotation(32)
    states = model(ids)[0]
    close(rotate_residual(model, q)(ids)[0], (states.double() @ q).float())


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
