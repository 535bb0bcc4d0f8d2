"""The bench measures the model and its dense twin, and leaves the model as it was."""

import copy

import pytest
import small
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tenfold.api import bench, compress
from tenfold.evaluation import bench_model
from tenfold.evaluation.timing import peak_memory
from tenfold.nn import dense_cache
from tenfold.structure.matmul import bucket

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(kind=BertForMaskedLM, **more):
    torch.manual_seed(0)
    return kind(BertConfig(max_position_embeddings=20, **SIZES, **more)).eval()


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))


def test_bench_tells_both_and_changes_nothing():
    model, _ = compress(small.model(), {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]})
    before = copy.deepcopy(model.state_dict())
    result = bench(model, new_tokens=2, repeats=2)
    assert result["rows"] == {"prefill": 30, "decode": 1}
    for name in ("prefill", "decode"):
        assert min(result[name].values()) > 0 and result[name]["bytes"] < result[name]["dense_bytes"]
    assert "training" not in result
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_of_training_is_measured_on_copies():
    model, _ = compress(small.model(), {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]})
    before = copy.deepcopy(model.state_dict())
    result = bench(model, batch_size=2, length=16, new_tokens=2, repeats=1, training=True)
    parameters = sum(p.nbytes for p in model.parameters())
    assert result["rows"]["training"] == 32
    assert result["training"]["bytes"] > 2 * parameters, "the gradients are held beside the parameters"
    assert not model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.traced
def test_both_may_be_compiled(monkeypatch):
    calls, compile, generate = [], torch.compile, GPT2LMHeadModel.generate

    def counted(forward):
        traced = compile(forward, backend="eager")
        return lambda *args, **kwargs: calls.append(forward.__self__) or traced(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", counted)
    caches = []
    monkeypatch.setattr(
        GPT2LMHeadModel,
        "generate",
        lambda *args, **how: caches.append(how.get("cache_implementation")) or generate(*args, **how),
    )
    model, other = small.model(), small.model()
    found = bench(model, new_tokens=2, repeats=1, against=other, training=True, compiled=True)
    assert found["compiled"] and {id(one) for one in calls} > {id(model), id(other)} and set(caches) == {"static"}
    assert not any("forward" in one.__dict__ for one in (model, other))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (BertForMaskedLM, {}),
        (BertForSequenceClassification, {"num_labels": 3}),
        (BertForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}),
        (BertModel, {}),
    ],
)
def test_what_writes_no_text_has_prompts_and_training(kind, more):
    """Measure against the dense twin and against a decoder; the training loss reaches all parameters."""
    structure = {"kind": "low_rank", "rank": 4}
    model, _ = compress(bert(kind, **more), {"replace": [{"role": "mlp.in", "structure": structure}]})
    for other in (None, small.model()):
        found = bench(model, batch_size=2, repeats=1, against=other, training=True)
        assert found["rows"] == {"prefill": 40, "training": 40} and "decode" not in found
        assert min(min(found[name].values()) for name in ("prefill", "training")) > 0
    assert "decode" not in bench(small.model(), repeats=1, against=model)
    bench_model._loss(model, torch.arange(6).view(2, 3)).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "encoder.layer" in name)


def test_of_other_models_nothing_is_measured():
    with pytest.raises(ValueError, match="a T5ForConditionalGeneration reads one text and writes another"):
        bench(t5())
    with pytest.raises(ValueError, match="a T5ForConditionalGeneration reads"):
        bench(small.model(), against=t5())
    for model, other in ((bert(), None), (small.model(), bert())):
        with pytest.raises(ValueError, match="a BertForMaskedLM writes no text; leave the 4 new tokens out"):
            bench(model, against=other, new_tokens=4)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"batch_size": 0}, "batch_size 0 leaves nothing to measure"),
        ({"batch_size": -2}, "batch_size -2 leaves"),
        ({"length": 0}, "length 0 leaves"),
        ({"new_tokens": 0}, "new_tokens 0 leaves"),
        ({"repeats": 0}, "repeats 0 leaves"),
        ({"length": 21, "against": bert()}, "and the model has 20"),
    ],
)
def test_what_can_not_be_measured_is_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench(small.model(), **given)


@pytest.mark.parametrize(
    ("given", "more"),
    [({"length": 32}, "length"), ({"new_tokens": 31}, "new_tokens"), ({"length": 20, "new_tokens": 24}, "new_tokens")],
)
def test_all_positions_may_be_used_and_no_more(given, more):
    assert bench(small.model(), repeats=1, **given)["decode"]["ratio"] > 0
    with pytest.raises(ValueError, match="need 33 positions, and the model has 32"):
        bench(small.model(), repeats=1, **given | {more: given[more] + 1})


def test_layers_on_a_cached_matrix_are_counted(monkeypatch):
    rule = {"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}
    model, _ = compress(small.model(), {"replace": [rule]})
    monkeypatch.setattr(dense_cache, "estimate_gain", lambda layer: (1.0, frozenset({bucket(1), bucket(30)})))
    assert bench(model, new_tokens=2, repeats=1)["cached"] == 1, "a second one is over the limit"
    assert bench(model, repeats=1, against=bert(), cache=False)["cached"] == 0
    assert not any(module.cached_rows for module in model.modules() if hasattr(module, "cached_rows"))


def test_the_peak_is_what_is_held_at_once():
    x = torch.randn(500, 500)

    def run():
        one = x @ x
        other = one + 1
        del one
        return (other * 2).sum()

    assert 2 * x.nbytes <= peak_memory(run, x.device) < 2.1 * x.nbytes
