"""The table of layers: every structure once, at every number of rows, against a dense layer, and never below the floor."""

import copy
import itertools
import weakref

import pytest
import small
import torch

from tenfold.api import compress
from tenfold.evaluation import bench_layers, timing
from tenfold.evaluation.bench_layers import bench_layers as measured
from tenfold.nn import FactorizedLinear
from tenfold.structure import LowRank

RULES = [
    {"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}},
    {"role": "mlp.out", "structure": {"kind": "kronecker", "inner": [4, 4], "terms": 2}},
]


def test_every_structure_is_in_it_once_and_the_model_stays():
    model, _ = compress(small.model(), {"replace": RULES})
    before = copy.deepcopy(model.state_dict())
    found = measured(model, rows=(1, 3), repeats=2)
    told = [(cell["structure"]["kind"], cell["rows"], cell["pass"]) for cell in found]
    kinds, passes = ("low_rank", "kronecker"), ("forward", "forward + backward")
    assert sorted(told) == sorted(itertools.product(kinds, (1, 3), passes))
    for cell in found:
        assert cell["layers"] == 2 and min(cell[name] for name in ("seconds", "dense_seconds", "ratio", "floor")) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("rate", "copies", "expected"), [(1e3, 1e30, 2 * 5 * 2 * (8 + 6) / 1e3), (1e30, 1e3, 4 * (5 * 14 + 28 + 8) / 1e3)]
)
def test_the_floor_is_flops_or_bytes(monkeypatch, rate, copies, expected):
    monkeypatch.setattr(bench_layers, "flops_per_second", lambda device, dtype: rate)
    monkeypatch.setattr(bench_layers, "bytes_per_second", lambda device: copies)
    layer = FactorizedLinear(LowRank(out_features=8, in_features=6, rank=2))
    assert bench_layers.floor(layer, 5) == pytest.approx(expected)


def test_the_memory_of_a_pass_is_counted():
    """nn.Linear's is computed by hand; a structured layer allocates no dense matrix."""
    layer, x, upstream = torch.nn.Linear(64, 96), torch.randn(32, 64, requires_grad=True), torch.randn(32, 96)
    matrix, output = 4 * 64 * 96, 4 * 32 * 96
    own = matrix + 4 * 96
    assert bench_layers.pass_memory(layer, x, upstream, False) == own + output
    assert bench_layers.pass_memory(layer, x, upstream, True) == own + output + own + 4 * 32 * 64, (
        "gradients of all that has one"
    )
    assert bench_layers.pass_memory(layer, x, upstream, True) == own + output + own + 4 * 32 * 64, (
        "whatever was there before"
    )
    folded = FactorizedLinear(LowRank(out_features=96, in_features=64, rank=4)).eval()
    folded.set_factors(folded.structure.init(0.1))
    factors = 4 * (4 * (96 + 64) + 96)
    assert factors + output < bench_layers.pass_memory(folded, x, upstream, False) < matrix + output
    cell = measured(torch.nn.ModuleDict({"a": folded}), rows=(32,), repeats=1)[0]
    assert cell["dense_bytes"] == own + output and factors + output < cell["bytes"] < matrix + output


def test_nothing_that_was_measured_is_held():
    value = torch.zeros(3)
    gone = weakref.ref(value)
    assert timing.stored_bytes(value) == 12
    del value
    assert gone() is None


def test_few_rows_are_timed_with_factors_that_come_from_memory(monkeypatch):
    monkeypatch.setattr(bench_layers, "CACHES", 1000)
    layer, x = torch.nn.Linear(5, 7), torch.randn(2, 5)
    assert bench_layers.make_copies(layer, bench_layers.FEW_ROWS) == [layer]
    some, called = bench_layers.make_copies(layer, 2), []
    assert some[0] is layer and sum(m.weight.nbytes + m.bias.nbytes for m in some) >= 1000
    assert len({m.weight.data_ptr() for m in some}) == len(some)
    for k, one in enumerate(some):
        one.register_forward_hook(lambda *given, k=k: called.append(k))
    run = bench_layers.call_in_turn(some, x, None, False)
    assert called == sorted(called) and set(called) == set(range(len(some))), "each is called before"
    called.clear()
    for _ in range(2 * len(some)):
        run()
    assert called == [*range(len(some))] * 2
    monkeypatch.setattr(bench_layers, "CACHES", 2**40)
    assert len(bench_layers.make_copies(layer, 2)) == 1 + bench_layers.MAX_COPIES


def test_nothing_is_not_measured():
    model, _ = compress(small.model(), {"replace": RULES})
    for more, sentence in (({"repeats": 0}, "repeats 0 leaves"), ({"rows": (1, 0)}, "rows 0 leaves")):
        with pytest.raises(ValueError, match=sentence):
            measured(model, **more)


def test_turns_take_turns():
    order = []
    found = timing.time_in_turns(lambda: order.append("a"), lambda: order.append("b"), torch.device("cpu"), 3)
    assert len(found) == 3 and min(min(pair) for pair in found) > 0
    calls = [key for key, _ in itertools.groupby(order)]
    assert calls == ["a", "b"] * 4  # one turn warms up


def test_the_machine_has_rates():
    assert timing.flops_per_second(torch.device("cpu"), torch.float32) > 1e9
    assert timing.bytes_per_second(torch.device("cpu")) > 1e8
