"""Factors that torchao holds in fewer bits: layers multiply by what these stand for, with few rows and with many."""

import pytest
import torch

pytest.importorskip("torchao")
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from tenfold.evaluation.timing import stored_bytes
from tenfold.models.model_card import save_compressed
from tenfold.nn import FactorizedEmbedding, FactorizedLinear
from tenfold.nn import layers as nn_layers
from tenfold.nn.dense_cache import dense_cache
from tenfold.nn.quantized import is_quantized
from tenfold.structure import CP, Dense, LowRank

NAMES = FqnToConfig({r"re:.*\.(left|right|matrix|out_.|in_.)": Int8WeightOnlyConfig(version=2)})
STRUCTURES = {
    "low rank": LowRank(out_features=96, in_features=160, rank=64),
    "dense": Dense(out_features=96, in_features=160),
    "cp": CP(outs=(12, 8), ins=(16, 10), rank=32),
}


def made(structure, kind=FactorizedLinear) -> torch.nn.Sequential:
    layer = kind(structure)
    layer.set_factors(structure.init(0.5))
    if kind is FactorizedLinear:
        torch.nn.init.normal_(layer.bias)
    return torch.nn.Sequential(layer).eval()


def numbers_of(layer) -> dict[str, torch.Tensor]:
    """What the factors stand for, by torchao."""
    return {name: p.dequantize() for name, p in layer.named_parameters() if name != "bias"}


@pytest.mark.parametrize("limit", [0, 2**40])
@pytest.mark.parametrize("rows", [1, 5, 40, 700])
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_a_layer_multiplies_by_what_its_factors_stand_for(structure, rows, limit):
    model = made(structure)
    before = {name: p.detach().clone() for name, p in model[0].named_parameters() if name != "bias"}
    quantize_(model, NAMES, filter_fn=None)
    assert all(is_quantized(p) for name, p in model[0].named_parameters() if name != "bias")
    held = numbers_of(model[0])
    assert any((held[name] != value).any() for name, value in before.items())  # they are others than before
    x = torch.randn(rows, 160)
    with torch.no_grad(), dense_cache(model, limit):
        expected = x @ structure.dense(held).T + model[0].bias
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", [STRUCTURES["low rank"], STRUCTURES["dense"]], ids=["low rank", "dense"])
def test_matrices_are_multiplied_as_they_are_held(structure, monkeypatch):
    model = made(structure)
    quantize_(model, NAMES, filter_fn=None)
    monkeypatch.setattr(nn_layers, "dequantize", lambda value: pytest.fail("they need not be written out"))
    with torch.no_grad():
        model(torch.randn(700, 160))


def test_groups_in_four_bits():
    model = made(STRUCTURES["low rank"])
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, FqnToConfig({r"re:.*\.(left|right)": config}), filter_fn=None)
    x = torch.randn(300, 160)
    with torch.no_grad():
        expected = x @ model[0].structure.dense(numbers_of(model[0])).T + model[0].bias
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3)


def test_an_embedding_and_its_head():
    model, ids = made(STRUCTURES["low rank"], FactorizedEmbedding), torch.tensor([[0, 95, 7]])
    quantize_(model, NAMES, filter_fn=None)
    w, states = model[0].structure.dense(numbers_of(model[0])), torch.randn(3, 160)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), w[ids], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model[0](states, as_head=True), states @ w.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model[0].dense(), w)


@torch.no_grad()
def test_an_embedding_and_its_head_write_out_no_table(monkeypatch):
    """A look-up makes numbers of ``right`` only, which is small; the head of neither factor."""
    model, ids, plain, seen = (
        made(STRUCTURES["low rank"], FactorizedEmbedding),
        torch.tensor([5]),
        nn_layers.dequantize,
        [],
    )
    quantize_(model, NAMES, filter_fn=None)
    monkeypatch.setattr(nn_layers, "dequantize", lambda value: seen.append(tuple(value.shape)) or plain(value))
    model(ids)
    assert seen == [(64, 160)]
    model[0](torch.randn(3, 160), as_head=True)
    assert len(seen) == 1


def test_its_bytes_are_those_it_takes():
    model = made(STRUCTURES["low rank"])
    quantize_(model, NAMES, filter_fn=None)
    for factor in (model[0].left, model[0].right):  # a byte a number, and a scale a row
        assert factor.numel() + 4 * len(factor) <= stored_bytes(factor) <= factor.numel() + 8 * len(factor)
    assert stored_bytes(model[0].bias) == 4 * 96


def test_a_quantised_model_is_not_saved(tmp_path):
    model = made(STRUCTURES["low rank"])
    quantize_(model, NAMES, filter_fn=None)
    with pytest.raises(ValueError, match=r"0\.left is quantised by torchao, .* save the model before quantize_"):
        save_compressed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_tensors_are_left_as_they_are():
    value = torch.nn.Parameter(torch.randn(3, 4))
    assert nn_layers.dequantize(value) is value and not is_quantized(value)
