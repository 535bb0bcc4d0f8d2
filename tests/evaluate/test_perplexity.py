"""Perplexity against a loop that scores one token at a time."""

import math

import pytest
import small
import torch

from tenfold.evaluation.perplexity import EvalProtocol, comparable, perplexity


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = small.folder(tmp_path_factory.mktemp("model"))
    return GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), folder / "text.txt"


@torch.no_grad()
def slow_nats(model, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Score every token but the first with the context of its window, in one forward pass each."""
    nats, count = 0.0, 0
    for target in range(1, len(ids)):
        begins = [b for b in range(0, len(ids), stride) if b < target < b + window]
        if stride == window and target % stride == 0:
            continue  # the first token of a window that does not overlap is context only
        begin = begins[0] if begins else None
        if begin is None:
            continue
        logits = model(input_ids=torch.tensor([ids[begin:target]])).logits[0, -1]
        nats -= float(torch.log_softmax(logits.double(), -1)[ids[target]])
        count += 1
    return nats, count


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (32, 31), (7, 7)])
def test_nats_are_those_of_a_loop(setting, window, stride):
    model, tokenizer, file = setting
    result = perplexity(model, tokenizer, [file], window, stride, limit=90)
    ids = tokenizer(file.read_text())["input_ids"][:90]
    nats, count = slow_nats(model, ids, window, stride)
    assert result["tokens"] == count
    assert result["nats"] == pytest.approx(nats, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_bits_per_byte_counts_utf8_bytes(setting, tmp_path):
    model, tokenizer, _ = setting
    file = tmp_path / "accents.txt"
    file.write_text("éàü " * 60, encoding="utf-8")
    result = perplexity(model, tokenizer, [file])
    tokens = len(tokenizer("éàü " * 60)["input_ids"]) + 1
    size = len(("éàü " * 60).encode()) * result["tokens"] / tokens
    assert result["bits_per_byte"] == pytest.approx(result["nats"] / math.log(2) / size, rel=1e-6)


def test_words_as_normaliser(setting):
    model, tokenizer, file = setting
    result = perplexity(model, tokenizer, [file], normaliser="words", limit=200)
    assert math.log(result["perplexity"]) == pytest.approx(
        result["nats"] / result["words"], rel=0.02
    )  # words are rounded


def test_figures_of_different_protocols_are_refused(setting):
    model, tokenizer, file = setting
    one, other = (perplexity(model, tokenizer, [file], 16, stride, limit=64) for stride in (16, 8))
    comparable([one, one])
    with pytest.raises(ValueError, match="can't be compared: protocol"):
        comparable([one, other])


def test_text_shorter_than_a_window(setting, tmp_path):
    model, tokenizer, _ = setting
    (tmp_path / "short.txt").write_text("the old house")
    with pytest.raises(ValueError, match="fewer than one window of 32"):
        perplexity(model, tokenizer, [tmp_path / "short.txt"])


def test_tokenizer_of_another_model(setting):
    _, tokenizer, file = setting
    with pytest.raises(ValueError, match="the model knows 40; use the tokenizer"):
        perplexity(small.model(40), tokenizer, [file])


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"stride": 40}, {"text": "plain"}, {"normaliser": "bytes"}])
def test_protocols_that_make_no_sense(wrong):
    with pytest.raises(ValueError):
        EvalProtocol(**{"window": 32, "stride": 32} | wrong)


def test_window_beyond_the_context(setting):
    model, tokenizer, file = setting
    with pytest.raises(ValueError, match="window 64 is more than the model's context of 32"):
        perplexity(model, tokenizer, [file], window=64)
