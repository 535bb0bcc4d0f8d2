"""GGUF: the library reads back the matrices that the model has, in llama.cpp's layout; what it can't hold is refused."""

import json
import subprocess

import numpy as np
import pytest
import small
import torch
import toys
from exports import prune
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tenfold.export.formats import export
from tenfold.train.tokenizer import train_tokenizer

gguf = pytest.importorskip("gguf")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def folder(path, name="llama", units=(24, 40), groups=(1, 2), **changes):
    """Write a pruned toy with a tokenizer."""
    tokenizer = train_tokenizer([small.text()], 300, 64)
    torch.manual_seed(0)
    kind = getattr(__import__("transformers"), toys.TOYS[name][0])
    model = kind(toys.config(name, **{"vocab_size": len(tokenizer), **changes})).eval()
    if units:
        prune(model, units, groups)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def read(path):
    reader = gguf.GGUFReader(path / "model.gguf")
    tensors = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def unpaired(matrix, heads):
    """Rows as transformers has them, by a loop: llama.cpp has dimension i and i + size / 2 of a head side by side."""
    size = len(matrix) // heads
    order = [head * size + 2 * (i % (size // 2)) + i // (size // 2) for head in range(heads) for i in range(size)]
    return matrix[order]


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_free_widths_are_read_back(outtype, tmp_path):
    """Every matrix holds the rows and columns of the model's that are not zero, and zeros up to a whole block of Q8_0."""
    model = folder(tmp_path / "compressed")
    fields, tensors = read(export(tmp_path / "compressed", "gguf", tmp_path / "out", outtype=outtype))
    assert fields["general.architecture"] == "deci"
    assert list(fields["deci.attention.head_count"]) == [2, 4]
    assert list(fields["deci.attention.head_count_kv"]) == [1, 2]
    assert list(fields["deci.feed_forward_length"]) == ([32, 48] if outtype == "q8_0" else [24, 40])
    tolerance = {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[outtype]
    for layer in range(2):
        for path, name in NAMES.items():
            whole = model.get_submodule(f"model.layers.{layer}.{path}").dense().detach().numpy()
            found = tensors[f"blk.{layer}.{name}.weight"]
            if name in ("attn_q", "attn_k"):
                found = unpaired(found, found.shape[0] // 8)
            mine = [side[np.abs(side).sum(1) > 0] for side in (whole, found)]
            mine = [side[:, np.abs(side).sum(0) > 0] for side in mine]
            np.testing.assert_allclose(mine[1], mine[0], atol=tolerance)
    np.testing.assert_array_equal(
        tensors["blk.0.attn_norm.weight"], model.model.layers[0].input_layernorm.weight.detach()
    )


@pytest.mark.parametrize(
    ("name", "arch"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gpt2", "gpt2")]
)
def test_one_width_is_the_architecture_itself(name, arch, tmp_path):
    folder(tmp_path / "compressed", name, None)
    fields, tensors = read(export(tmp_path / "compressed", "gguf", tmp_path / "out", outtype="f32"))
    assert fields["general.architecture"] == arch
    assert fields[f"{arch}.block_count"] == 2
    assert len([key for key in tensors if key.startswith("blk.1.")]) >= 9


def test_transformers_reads_back_a_llama(tmp_path):
    model = folder(
        tmp_path / "compressed",
        units=(24, 24),
        groups=(2, 2),
        rope_parameters={"rope_type": "default", "rope_theta": 5e3},
    )
    out = export(tmp_path / "compressed", "gguf", tmp_path / "out", outtype="f32")
    again = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf")
    assert again.config.intermediate_size == 24
    torch.testing.assert_close(toys.logits(again), toys.logits(model), atol=1e-5, rtol=1e-5)
    text = "It was a bright cold day."
    assert (
        AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")(text).input_ids
        == AutoTokenizer.from_pretrained(out)(text).input_ids
    )


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def test_frequencies_of_llama3(tmp_path):
    model = folder(tmp_path / "compressed", rope_parameters=LLAMA3)
    _, tensors = read(export(tmp_path / "compressed", "gguf", tmp_path / "out"))
    plain = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=9))
    expected = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    np.testing.assert_allclose(tensors["rope_freqs.weight"], expected, rtol=1e-6)


REFUSED = {
    "gemma3_text": ({}, "models of type llama, mistral, qwen2, qwen3, gpt2, and this is a gemma3_text; export to onnx"),
    "llama": ({"hidden_act": "gelu"}, "llama.cpp computes silu in a llama, not gelu; export to onnx"),
    "mistral": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "not linear; export to onnx",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(name, tmp_path):
    changes, words = REFUSED[name]
    folder(tmp_path / "compressed", name, None, **changes)
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "compressed", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.engines
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "gpt2", "qwen3"])
def test_llama_cpp_generates_the_same(name, tmp_path):
    from pathlib import Path

    root = Path(__file__).parents[2]
    packages = root / "out" / "engines" / "node_modules"
    if not packages.is_dir():
        pytest.skip("make anywhere installs node-llama-cpp")
    groups = (1, 2) if name in ("llama", "llama-tied", "mistral") else (2, 2)
    units = None if name == "gpt2" else (24, 40)
    big = {"n_embd": 64} if name == "gpt2" else {"hidden_size": 64, "head_dim": 16}
    model = folder(tmp_path / "compressed", name, units, groups, initializer_range=0.2, **big)
    out = export(tmp_path / "compressed", "gguf", tmp_path / "out", outtype="f32")
    ids = list(range(10, 20))
    job = {"model": str(out / "model.gguf"), "prompt": ids, "new_tokens": 16, "windows": [list(range(5, 45))]}
    done = subprocess.run(
        ["node", root / "research" / "benchmarks" / "llama_cpp.mjs", packages],
        input=json.dumps(job), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    mine = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    window = torch.tensor(job["windows"])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(window).logits[0, :-1], window[0, 1:])
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=0.01)
    assert found["tokens"][:4] == mine[0, 10:14].tolist()
