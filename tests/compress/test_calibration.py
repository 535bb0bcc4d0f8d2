"""Calibration text: windows of one stream for a causal model, one document per sample for any other."""

import copy
import json
import math
import warnings
from itertools import pairwise

import plain
import pytest
import small
import torch
from models import toys
from transformers import BertConfig, BertForMaskedLM

from tenfold.compression.calibration import Calibration, load_calibration
from tenfold.compression.compress import compress
from tenfold.train.tokenizer import train_tokenizer

LINES = [small.text(words, seed=words).strip() for words in (3, 40, 1, 12, 7, 25, 2, 5, 60)]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([small.text()], 300, 32)
    made.pad_token = made.eos_token
    return made


@pytest.fixture(scope="module")
def causal(tokenizer):
    return small.model(len(tokenizer))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=20, **sizes))


@pytest.fixture
def files(tmp_path):
    """Return a plain text file and a file of JSON lines."""
    (tmp_path / "a.txt").write_text("\n".join(LINES[:5]) + "\n\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES[5:]))
    return [tmp_path / "a.txt", tmp_path / "b.jsonl"]


def rows(batches) -> list[list[int]]:
    """Return every sample without padding."""
    pairs = ((ids, mask) for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True))
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("window", [5, 8, 32])
@pytest.mark.parametrize("samples", [1, 2, 3, 1000])
def test_windows_are_cut_from_one_stream_and_spread_over_it(causal, tokenizer, files, window, samples):
    texts = ["\n".join(LINES[:5]) + "\n\n", *LINES[5:]]
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    windows = [stream[k : k + window] for k in range(0, len(stream) - window + 1, window)]
    found = load_calibration(causal, tokenizer, files, samples, window, batch_size=3)
    read = rows(found.batches)
    assert all(len(batch["input_ids"]) <= 3 for batch in found.batches)
    assert found.tokens == sum(map(len, read)) == window * min(samples, len(windows))
    at = [windows.index(row) for row in read]
    steps = [after - before for before, after in pairwise(at)]
    assert at[0] == 0 and max(steps, default=0) - min(steps, default=0) <= 1
    if samples > 1:
        assert at[-1] == len(windows) - 1 and min(steps) > 0


def test_a_window_is_no_longer_than_the_context(causal, encoder, tokenizer, files):
    for given in (None, 1000):
        assert {len(row) for row in rows(load_calibration(causal, tokenizer, files, 2, given).batches)} == {32}
        assert max(map(len, rows(load_calibration(encoder, tokenizer, files, 99, given).batches))) == 20


@pytest.mark.parametrize("samples", [1, 4, 9, 1000])
def test_an_encoder_reads_a_document_a_sample(encoder, tokenizer, files, samples):
    found = load_calibration(encoder, tokenizer, files, samples, window=16, batch_size=2)
    whole = [tokenizer(line)["input_ids"][:16] for line in LINES]
    read = rows(found.batches)
    assert len(read) == min(samples, len(LINES)) and found.tokens == sum(map(len, read))
    assert all(whole.count(row) >= read.count(row) > 0 for row in read)
    if samples >= len(LINES):
        assert sorted(read) == sorted(whole)
    elif samples > 1:
        assert whole[0] in read and whole[-1] in read  # spread over the text
    for batch in found.batches:
        assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_the_source_names_files_only(causal, tokenizer, files):
    source = load_calibration(causal, tokenizer, files, 2, 8).source
    assert source == {
        "files": ["a.txt", "b.jsonl"],
        "samples": 2,
        "window": 8,
        "bytes_per_token": source["bytes_per_token"],
    }


@pytest.mark.parametrize(
    "text, says", [("", "fewer than one window of 32"), ("the old house", "fewer than one window")]
)
def test_too_little_text_for_one_window(causal, tokenizer, tmp_path, text, says):
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(ValueError, match=says):
        load_calibration(causal, tokenizer, [tmp_path / "short.txt"])


def test_empty_documents(encoder, tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="is empty"):
        load_calibration(encoder, tokenizer, [tmp_path / "empty.txt"])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_token_that_the_model_does_not_know(tokenizer, files, name):
    with pytest.raises(ValueError, match=r"has token \d+ but the model knows 97"):
        load_calibration(toys.build(name), tokenizer, files, window=8)


@pytest.mark.parametrize(("name", "most"), [("gpt2", 64), ("bert", 8)])
def test_a_long_text_is_read_as_far_as_is_needed(tokenizer, tmp_path, monkeypatch, name, most):
    """Four times the tokens, or lines, that are wanted: what is behind them may be broken."""
    model = toys.build(name)
    model.resize_token_embeddings(len(tokenizer))
    rows = [{"text": "the old house stood at the end"}] * 300
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n")
    with pytest.raises(ValueError, match="line 301"):
        load_calibration(model, tokenizer, [tmp_path / "a.jsonl"], num_samples=2, window=8)
    monkeypatch.setattr("tenfold.compression.calibration.READ_LEAST", {"tokens": most, "lines": most})
    assert load_calibration(model, tokenizer, [tmp_path / "a.jsonl"], num_samples=2, window=8).tokens == 16


@pytest.mark.parametrize("numbers", [{"num_samples": 0}, {"num_samples": -3}, {"batch_size": 0}])
def test_nothing_to_draw(causal, tokenizer, files, numbers):
    with pytest.raises(ValueError, match="one or more"):
        load_calibration(causal, tokenizer, files, **numbers)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "phi", "gemma3_text", "gemma3", "bert", "roberta"])
def test_the_longest_window_is_one_that_the_model_takes(tokenizer, tmp_path, name):
    model = toys.build(name)
    model.resize_token_embeddings(len(tokenizer))
    (tmp_path / "long.txt").write_text(small.text(400))
    batch = load_calibration(model, tokenizer, [tmp_path / "long.txt"], num_samples=1).batches[0]
    longest = 63 if name == "roberta" else 64  # whose positions start behind that of padding
    assert batch["input_ids"].shape[1] == longest and torch.isfinite(model(**batch)[0]).all()


@pytest.mark.parametrize(
    "recipe",
    [
        {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank"}}], "budget": {"keep": 0.6}},
        {"transform": "slice", "budget": {"keep": 0.8, "of": "model"}},
    ],
    ids=["blocks", "first"],
)
def test_a_text_that_the_model_does_not_know_is_warned_of(recipe):
    """The loss is that of the whole model over the first samples; 2 bits per byte and more cause a warning."""
    model, words = toys.build("llama"), plain.text(4, padded=True)
    losses = []
    with torch.no_grad():
        for batch in words.batches:
            chances = model(**batch, use_cache=False).logits.double().log_softmax(-1)
            for sample, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
                losses += [-chances[sample, k - 1, ids[k]] for k in range(1, len(ids)) if mask[k] and mask[k - 1]]
    nats = float(torch.stack(losses).mean())
    for bits, expected in (
        (1.99, []),
        (2.01, [f"perplexity on the calibration text is {math.exp(nats):,.0f}, 2.0 bits"]),
    ):
        told = Calibration(words.batches, {"bytes_per_token": nats / math.log(2) / bits})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            compress(copy.deepcopy(model), recipe, text=told)
        found = [str(one.message) for one in said if "right text" in str(one.message)]
        assert len(found) == len(expected) and all(part in one for part, one in zip(expected, found, strict=True))


def test_bytes_per_token_are_those_of_the_text(encoder, tokenizer, tmp_path):
    lines = [line for line in LINES if len(tokenizer(line)["input_ids"]) <= 20] + ["αβγ"]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    found = load_calibration(encoder, tokenizer, [tmp_path / "text.txt"], 100, batch_size=100)
    assert found.source["bytes_per_token"] == pytest.approx(
        sum(len(line.encode()) for line in lines) / found.tokens, rel=1e-4
    )
