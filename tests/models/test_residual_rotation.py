"""Rotations of the residual stream: the logits stay as they were, or the model is refused in one sentence and untouched."""

import pytest
import torch
import toys
import transformers
from folding import LOW_RANK, fold
from transformers import AutoConfig, AutoModelForCausalLM

from tenfold.models.architectures import ARCHITECTURES, Architecture
from tenfold.models.invariances.residual_rotation import center_residual, fuse_norms, rotate_residual
from tenfold.models.invariances.stream import prenorms
from tenfold.models.sites import is_tied

# models that can be rotated: whether their norms subtract the mean, and whether their head gets a matrix of its own
ROTATED = {
    "gpt2": (True, True),
    "gpt2-untied": (True, False),
    "gpt_neox": (True, False),
    "gpt_neox-tied": (True, True),
    "opt": (True, True),
    "llama": (False, False),
    "llama-tied": (False, True),
    "mistral": (False, False),
    "qwen2": (False, False),
    "qwen3": (False, True),
    "phi": (True, False),
}
rotatable = pytest.mark.parametrize("name", ROTATED)
CHANGES = (fuse_norms, lambda model: rotate_residual(model, toys.rotation(32)))


def build(name):
    return toys.shake(toys.build(name))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)  # some logits are larger than 10


# which models ----------------------------------------------------------------------------------------------------------


def classifier():
    """Return a model whose last layer has no role."""
    return toys.shake(transformers.LlamaForSequenceClassification(toys.config("llama")))


def opt(**changes):
    return toys.shake(transformers.OPTForCausalLM(AutoConfig.for_model("opt", **toys.OPT, **changes)))


def zero_gains():
    """Return a model whose last norm shifts where it has no gain, before a head without a bias."""
    model = build("gpt_neox")
    torch.nn.init.zeros_(model.gpt_neox.final_layer_norm.weight[3:5])
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda name=name: build(name), r"names no norms before all that reads the stream; take a pre-norm model")
          for name in toys.TOYS if name not in (*ROTATED, "opt-projected")),
        (lambda: build("opt-projected"), r"of this opt can't be rotated: no role says what model.decoder.project_out does"),
        (lambda: opt(do_layer_norm_before=False), r"it has no norm at decoder.final_layer_norm"),
        (classifier, r"no role says what score does"),
        (lambda: build("llama").model, r"no matrix reads norm; take a pre-norm model with its head"),
        (zero_gains, r"2 gains of gpt_neox.final_layer_norm are nearly zero where it shifts, and \w+ has no bias"),
    ],
)  # fmt: skip
def test_models_that_are_not_rotated(make, message):
    model = make()
    before = toys.snapshot(model)
    for change in CHANGES:
        with pytest.raises(ValueError, match=message):
            change(model)
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


# rotating and fusing ---------------------------------------------------------------------------------------------------


@rotatable
def test_rotated_models_compute_the_same(name, tmp_path):
    model, (keeps_ones, untied) = build(name), ROTATED[name]
    assert {norm.mean for norm in prenorms(model)} == {keeps_ones}
    embedding = model.get_input_embeddings().weight.detach().clone()
    logits, q = toys.logits(model), toys.rotation(32, keeps_ones)
    assert rotate_residual(model, q) is model
    close(toys.logits(model), logits)
    close(model.get_input_embeddings().weight, (embedding.double() @ q).float())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(toys.logits(again), toys.logits(model))
    assert not untied or not is_tied(model)
    rotate_residual(model, toys.rotation(32, keeps_ones))
    close(toys.logits(model), logits)


def test_a_tied_head_stays_tied_behind_a_norm_with_one_gain():
    model = build("llama-tied")
    torch.nn.init.constant_(model.model.norm.weight, 1.5)
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, toys.rotation(32))), logits)
    assert is_tied(model)


@pytest.mark.parametrize("parallel", [True, False])
def test_blocks_of_gpt_neox(parallel):
    config = AutoConfig.for_model("gpt_neox", **toys.ENCODER, use_parallel_residual=parallel)
    model = toys.shake(AutoModelForCausalLM.from_config(config))
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, toys.rotation(32, True))), logits)


def test_an_architecture_with_a_new_table(monkeypatch):
    """Gate and input matrix in one, query, key and value in one with grouped heads."""
    paths = {"attn.qkv": "self_attn.qkv_proj", "attn.out": "self_attn.o_proj"}
    paths |= {"mlp.in_gate": "mlp.gate_up_proj", "mlp.out": "mlp.down_proj"}
    norms = {"layers.*.input_layernorm": ("attn.qkv",), "layers.*.post_attention_layernorm": ("mlp.in_gate",)}
    table = Architecture({role: f"layers.*.{path}" for role, path in paths.items()}, norms=norms | {"norm": ("head",)})
    monkeypatch.setitem(ARCHITECTURES, "phi3", table)
    torch.manual_seed(0)
    model = toys.shake(AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **toys.GROUPED)))
    logits = toys.logits(model)
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
    assert fuse_norms(model) is model
    close(toys.logits(model), logits)
    wide = build(name).double()
    logits = toys.logits(wide)
    torch.testing.assert_close(toys.logits(fuse_norms(wide)), logits)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and m.weight.shape == (32,)]
    assert norms
    assert all(torch.equal(norm.weight, torch.ones(32)) for norm in norms)
    assert not is_tied(model)


def test_shifts_behind_gains_of_zero_go_to_the_biases():
    model = build("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.layers[0].input_layernorm.weight[3] = 0.0
        model.gpt_neox.layers[1].post_attention_layernorm.weight[:5] = 1e-7
        model.gpt_neox.final_layer_norm.weight[3:5] = model.gpt_neox.final_layer_norm.bias[3:5] = 0.0
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, toys.rotation(32, True))), logits)


def test_a_stream_without_mean():
    model = build("gpt2")
    logits = toys.logits(model)
    assert center_residual(model) is model
    close(toys.logits(model), logits)
    with torch.no_grad():
        states = model(**toys.inputs(model), output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    assert max(float(state.mean(-1).abs().max()) for state in states) < 1e-6
