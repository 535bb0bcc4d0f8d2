"""Cached matrices: the same outputs, without gradients and inside the block only, within their limit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tenfold.nn import FactorizedLinear
from tenfold.nn.dense_cache import dense_cache, estimate_gain
from tenfold.structure import Dense, Kronecker, LowRank, TensorTrain
from tenfold.structure.matmul import BUCKETS

DEAR = TensorTrain(outs=(8, 8, 8), ins=(8, 8, 8), ranks=(48, 48))  # dearer than W at any number of rows
CHEAP = LowRank(out_features=512, in_features=512, rank=4)
SIZE = 4 * 512 * 512


def layer(structure) -> FactorizedLinear:
    made = FactorizedLinear(structure)
    made.set_factors(structure.init(0.1))
    nn.init.normal_(made.bias)
    return made.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"dear": layer(DEAR), "twin": layer(DEAR), "cheap": layer(CHEAP)}).eval()


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_outputs_are_those_of_the_factors_and_the_matrix_is_made_once(model, rows, monkeypatch):
    x, made, dense = torch.randn(rows, 512), [], TensorTrain.dense
    monkeypatch.setattr(TensorTrain, "dense", lambda self, factors: made.append(self) or dense(self, factors))
    with torch.no_grad():
        expected = model["dear"](x)
        assert not made
        with dense_cache(model, 2**40):
            for _ in range(2):
                torch.testing.assert_close(model["dear"](x), expected, rtol=1e-4, atol=1e-4)
        assert len(made) == 1 and model["dear"].cached is None
        model["dear"](x)
        assert len(made) == 1


def test_a_matrix_that_is_cached_serves_few_rows_unless_they_are_much_cheaper_without():
    near = TensorTrain(outs=(8, 8, 12, 1), ins=(8, 8, 8, 6), ranks=(64, 64, 64))
    far = Kronecker(outs=(192, 4), ins=(192, 4), terms=7)
    for structure, expected in ((near, True), (far, False)):
        rows = estimate_gain(FactorizedLinear(structure))[1]
        assert rows and (min(BUCKETS) in rows) is expected


def test_what_gains_nothing_is_not_cached(model):
    others = [
        Dense(out_features=512, in_features=384),  # it is a matrix: making it would copy it
        Kronecker(outs=(512, 2), ins=(512, 2), terms=1),
    ]
    both = nn.ModuleList([model["cheap"], *map(layer, others)])
    with dense_cache(both, 2**40) as told:
        assert told == {"layers": 0, "bytes": 0, "limit": 2**40}


def test_it_stays_within_its_limit(model):
    factors = sum(p.numel() * 4 for m in model.values() for name, p in m.named_parameters() if name != "bias")
    for limit, layers in ((factors + 2 * SIZE, 2), (factors + 2 * SIZE - 1, 1), (None, 1), (0, 0)):
        with dense_cache(model, limit) as told:
            assert told == {"layers": layers, "bytes": layers * SIZE, "limit": 3 * SIZE if limit is None else limit}
            assert sum(bool(one.cached_rows) for one in model.values()) == layers
    with pytest.raises(ValueError, match="a limit of -5 bytes is less than nothing"), dense_cache(model, -5):
        pass


def test_what_gains_most_for_its_bytes_comes_first():
    less = TensorTrain(outs=(8, 8, 8), ins=(8, 8, 8), ranks=(30, 30))
    for names in (("dear", "less"), ("less", "dear")):
        both = nn.ModuleDict({name: layer(DEAR if name == "dear" else less) for name in names})
        with dense_cache(both, sum(one.structure.numel * 4 for one in both.values()) + SIZE) as told:
            assert told["layers"] == 1 and both["dear"].cached_rows


def fused_step(one):
    """Writes behind torch's back: no version of a tensor changes."""
    with torch.enable_grad():
        one.structure.apply(one.factors(), torch.ones(2, 512)).sum().backward()
    torch.optim.AdamW(one.parameters(), 0.1, fused=True).step()


@pytest.mark.parametrize("change", [fused_step, lambda one: one.core_0.data.mul_(2)])
def test_what_changes_between_two_blocks_is_noticed(model, change):
    one, x = model["dear"], torch.randn(40, 512)
    for _ in range(2):
        with torch.no_grad(), dense_cache(model, 2**40):
            torch.testing.assert_close(one(x), x @ one.dense().T + one.bias, rtol=1e-4, atol=1e-4)
        change(one)


def test_gradients_training_and_autocast_go_through_the_factors(model):
    one, x = model["dear"], torch.randn(40, 512)
    with dense_cache(model, 2**40):
        one(x).sum().backward()
        assert all(p.grad is not None for p in one.parameters())
        with torch.no_grad():
            one.train()(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert one.eval()(x).dtype == torch.bfloat16
        assert one.cached is None


def test_another_type_is_made_of_the_factors_aestimate_gain(model):
    one, x = model["dear"], torch.randn(40, 512)
    with torch.no_grad(), dense_cache(model, 2**40):
        one(x)
        assert one.double()(x.double()).dtype == torch.float64


def test_copies_and_checkpoints_leave_it_behind(model):
    one, x = model["dear"], torch.randn(40, 512)
    with torch.no_grad(), dense_cache(model, 2**40):
        expected = one(x)
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert other.cached is None and not other.cached_rows
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
    assert set(one.state_dict()) == {"core_0", "core_1", "core_2", "bias"}
