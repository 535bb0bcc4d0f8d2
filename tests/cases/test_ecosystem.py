"""Folded layers under the hands of other libraries: adapters, resizing, trainers that write through ``.data``, odd tokenizers."""

import copy
import json

import pytest
import small
import torch
import transformers
from transformers import AutoTokenizer

import tenfold


def llama(seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes, **special, **more)).eval()


def folded(*roles, seed=0, rank=4, **more):
    rules = [{"role": role, "structure": {"kind": "low_rank", "rank": rank}} for role in roles]
    return tenfold.compress(llama(seed, **more), {"name": "x", "replace": rules})[0].eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(24).reshape(2, 12) + 5).logits


@pytest.mark.parametrize("size", [301, 299])
def test_folded_embeddings_are_resized_or_say_why_not(size):
    model = folded("embed", tie_word_embeddings=True)
    before = logits(model)[..., :299]
    try:
        model.resize_token_embeddings(size)
    except (ValueError, NotImplementedError) as reason:
        assert "densify" in str(reason)
        return
    torch.testing.assert_close(logits(model)[..., :299], before)


def test_prompt_tuning_of_a_folded_embedding():
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = peft.get_peft_model(folded("embed", tie_word_embeddings=True), settings)
    assert logits(adapted).isfinite().all()


def test_weights_that_are_written_through_data_count_at_once():
    """Trainers synchronise a reference model so: ``target.data.mul_(1 - a).add_(source.data, alpha=a)``."""
    reference, new = (folded("attn.q", "mlp.in", "mlp.out", seed=seed, rank=28) for seed in (1, 2))
    long = torch.arange(5, 2 * 60 + 5).reshape(2, 60)
    with torch.no_grad():
        for _ in range(50):  # often enough for the matrix to be kept
            reference(input_ids=long)
        for target, source in zip(reference.parameters(), new.parameters(), strict=True):
            target.data.mul_(0.0).add_(source.data)
        torch.testing.assert_close(reference(input_ids=long).logits, new(input_ids=long).logits)


def small_bert(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=300, max_position_embeddings=64, num_labels=2, **sizes)
    return getattr(transformers, kind)(config)


KINDS = [
    "BertForTokenClassification",
    "BertForSequenceClassification",
    "BertForQuestionAnswering",
    "BertForPreTraining",
]
KINDS += [
    "BertForMultipleChoice",
    "BertModel",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaModel",
]


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_head_are_compressed(call, kept, tmp_path, kind):
    if kind.startswith("Bert"):
        model = small_bert(kind)
    else:
        config = llama().config
        config.num_labels = 2
        model = getattr(transformers, kind)(config)
    tokenizer = AutoTokenizer.from_pretrained(kept)
    tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    given = ("--keep", 0.9, "--of", "blocks", "--calibrate", kept / "text.txt", "--num-samples", 4)
    status, _, err = call("compress", tmp_path / "m", "-o", tmp_path / "out", *given)
    assert status == 0, err[-300:]
    assert type(tenfold.load(tmp_path / "out")[0]).__name__ == kind


def test_generate_passes_only_what_a_model_takes(call, llama):
    file = llama / "tokenizer_config.json"
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    status, out, err = call("generate", llama, "the old", "--max-new-tokens", 3)
    assert status == 0 and "the old" in out, err


GGUF = b"GGUF\x03\0\0\0" + bytes(16)


@pytest.mark.parametrize("name", ["m.gguf", "folder"])
def test_an_empty_gguf_is_named(call, kept, tmp_path, name):
    place = tmp_path / name
    if name == "folder":
        place.mkdir()
    (place / "m.gguf" if name == "folder" else place).write_bytes(GGUF)
    given = ("--keep", 0.9, "--calibrate", kept / "text.txt")
    status, _, err = call("compress", place, "-o", tmp_path / "out", *given)
    last = err.strip().splitlines()[-1]
    assert status == 2 and name in last and last.startswith("tenfold: ") and not list(tmp_path.glob("out*")), err


def test_a_single_file_is_no_list_of_characters(kept):
    model, tokenizer = tenfold.load(kept, "cpu")
    one = tenfold.evaluate(model, tokenizer, str(kept / "text.txt"), window=32)
    assert one["perplexity"] == tenfold.evaluate(model, tokenizer, [kept / "text.txt"], window=32)["perplexity"]


def test_an_output_that_is_a_file_is_refused_before_the_work(call, kept, tmp_path):
    (tmp_path / "out").write_text(small.text(5))
    given = ("--structure", "low_rank", "--keep", 0.8, "--overwrite")
    status, _, err = call("compress", kept, "-o", tmp_path / "out", *given)
    assert status == 2 and "is a file" in err and "fits" not in err and (tmp_path / "out").is_file(), err


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_wrapped_models_are_unwrapped(wrap):
    rules = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 2}}]}
    after = tenfold.compress(wrap(llama()), rules)[0]
    torch.testing.assert_close(logits(after), logits(tenfold.compress(llama(), rules)[0]))


def test_adapters_are_merged_first():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=r"merge_and_unload"):
            tenfold.compress(model, "low-rank")
    tenfold.compress(adapted.merge_and_unload(), "low-rank")
    with pytest.raises(ValueError, match="a Linear is no model of transformers"):
        tenfold.compress(torch.nn.Linear(2, 2), "low-rank")


@pytest.mark.parametrize("name", ["there/is/none", "./none", "out/none", "../none", "~/none"])
def test_paths_are_not_looked_up_on_a_hub(monkeypatch, tmp_path, name):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"there is no model '{name}': no such folder"):
        tenfold.load(name)
    with pytest.raises(FileNotFoundError, match=name.removeprefix("./")):
        tenfold.from_pretrained(name)


def test_dense_embeddings_are_resized_again():
    model = tenfold.densify(folded("embed", tie_word_embeddings=True))
    before = logits(model)
    model.resize_token_embeddings(310)
    torch.testing.assert_close(logits(model)[..., :300], before)
    assert not {"embeddings", "resize_token_embeddings"} & vars(model).keys()


def test_equal_size_is_no_resizing():
    model = copy.deepcopy(folded("embed"))
    assert model.resize_token_embeddings(300) is model.get_input_embeddings()
