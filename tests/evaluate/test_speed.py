"""The bench measures the model and its dense twin, and leaves the model as it was."""

import copy

import pytest
import small
import torch
from transformers import GPT2LMHeadModel

from tenfold.api import bench, compress
from tenfold.evaluate import speed
from tenfold.evaluate.machine import peak
from tenfold.models.sites import find_sites


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
    result = bench(model, batch=2, length=16, new_tokens=2, repeats=1, training=True)
    parameters = sum(p.nbytes for p in model.parameters())
    assert result["rows"]["training"] == 32
    assert result["training"]["bytes"] > 2 * parameters, "the gradients are held beside the parameters"
    assert result["training"]["most_tokens_per_second"] < result["prefill"]["most_tokens_per_second"]
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


def test_another_model_may_be_the_rival():
    model, other = small.model(), small.model()
    found = bench(model, new_tokens=2, repeats=1, against=other)
    assert found["prefill"]["bytes"] == found["prefill"]["dense_bytes"]


def test_the_peak_is_what_is_held_at_once():
    x = torch.randn(500, 500)

    def run():
        one = x @ x
        other = one + 1
        del one
        return (other * 2).sum()

    assert 2 * x.nbytes <= peak(run, x.device) < 2.1 * x.nbytes


def test_the_floor_of_a_dense_model_is_its_matrices(monkeypatch):
    model = small.model()
    blocks = sum(site.shape[0] * site.shape[1] for site in find_sites(model) if site.role not in ("embed", "head"))
    head = model.get_output_embeddings().weight.numel()
    monkeypatch.setattr(speed, "flops_per_second", lambda device, dtype: 1e6)
    monkeypatch.setattr(speed, "bytes_per_second", lambda device: 1e30)
    assert speed.floor(model, 3) == pytest.approx(2 * 3 * (blocks + head) / 1e6)
    monkeypatch.setattr(speed, "flops_per_second", lambda device, dtype: 1e30)
    monkeypatch.setattr(speed, "bytes_per_second", lambda device: 1e6)
    biases = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".h." in name and name.endswith("bias") and "ln" not in name
    )
    assert speed.floor(model, 3) == pytest.approx(4 * (blocks + head + biases) / 1e6)
