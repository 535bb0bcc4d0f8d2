"""GGUF files as models: the same function as the matrices that were quantised, and sentences where they can't be read."""

import json
import shutil

import pytest
import small
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold import api
from tenfold.checkpoint_jobs import compress_checkpoint
from tenfold.models.cost import inspect
from tenfold.models.gguf import is_gguf
from tenfold.train.tokenizer import train_tokenizer

HEADS, WIDTH = 2, 64
SHAPE = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def stored_name(name: str) -> str:
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        return "token_embd.weight" if "embed" in name else "output_norm.weight"
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write(gguf, file, model, tokenizer):
    """Write ``model`` as llama.cpp does, matrices in Q8_0, and round its own matrices alike."""
    writer, config = gguf.GGUFWriter(file, "llama"), model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types([gguf.TokenType.CONTROL if t in tokenizer.all_special_tokens else 1 for t in tokens])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        data = value.numpy()
        if data.ndim == 1:
            writer.add_tensor(stored_name(name), data)
            continue
        rounded = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
        value.copy_(torch.from_numpy(gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0)))
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates pairs that lie side by side
            data = data.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(stored_name(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    gguf = pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer([small.text()], 300, 32)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).eval()
    write(gguf, folder / "tiny.gguf", model, tokenizer)
    (folder / "text.txt").write_text(small.text(1500, seed=1))
    return folder / "tiny.gguf", model, tokenizer


@torch.no_grad()
def test_a_gguf_file_is_the_model_whose_matrices_were_rounded(tiny):
    file, model, tokenizer = tiny
    with pytest.warns(UserWarning, match=r"tiny\.gguf is dequantised"):
        loaded, read = api.load(file, "cpu")
    ids = torch.arange(40)[None] % model.config.vocab_size
    assert type(loaded) is LlamaForCausalLM
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert read(small.text(50))["input_ids"] == tokenizer(small.text(50))["input_ids"]
    assert inspect(str(file))["parameters"]["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*is dequantised")
def test_a_gguf_file_is_compressed_into_an_ordinary_folder(tiny, tmp_path):
    file, model, _ = tiny
    text = file.with_name("text.txt")
    report = compress_checkpoint(file, tmp_path / "out", api.with_keep("recommended", 0.8), [text], 8, device="cpu")
    assert report["parameters"]["total"] < 0.81 * sum(p.numel() for p in model.parameters())
    loaded, tokenizer = api.load(tmp_path / "out", "cpu")
    assert api.evaluate(loaded, tokenizer, [text], limit=200)["tokens"] > 100
    assert api.price(loaded)["parameters"]["total"] == report["parameters"]["total"]


def test_what_is_no_gguf_is_one_sentence(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.gguf; check the path"):
        api.load(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no blocks at all " * 10)
    with pytest.raises(ValueError, match=r"^transformers can't read .*text\.gguf \(.*\); copy the file again"):
        api.load(tmp_path / "text.gguf")
    cut = tmp_path / "cut.gguf"
    shutil.copy(tiny[0], cut)
    with cut.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ValueError, match=r"^transformers can't read .*cut\.gguf"):
        api.load(cut)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("tenfold.models.gguf.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"some\.gguf needs the package gguf: pip install gguf$"):
        api.load(tmp_path / "some.gguf")


def test_other_names_are_no_gguf_files():
    assert is_gguf("a/b.GGUF")
    assert not is_gguf("gguf")
