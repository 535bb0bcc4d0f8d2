"""The table of layers: every structure once, at every number of rows, against a dense layer."""

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
        assert cell["layers"] == 2 and min(cell[name] for name in ("seconds", "dense_seconds", "ratio")) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_memory_of_a_pass_is_counted():
    """nn.Linear's is computed by hand; a structured layer allocates no dense matrix."""
    folded = FactorizedLinear(LowRank(out_features=96, in_features=64, rank=4)).eval()
    folded.set_factors(folded.structure.init(0.1))
    matrix, output = 4 * 64 * 96, 4 * 32 * 96
    own, factors = matrix + 4 * 96, 4 * (4 * (96 + 64) + 96)
    forward, backward = measured(torch.nn.ModuleDict({"a": folded}), rows=(32,), repeats=1)
    assert forward["dense_bytes"] == own + output and factors + output < forward["bytes"] < matrix + output
    assert backward["dense_bytes"] == own + output + own + 4 * 32 * 64, "gradients of all that has one"


def test_nothing_that_was_measured_is_held():
    value = torch.zeros(3)
    gone = weakref.ref(value)
    assert timing.stored_bytes(value) == 12
    del value
    assert gone() is None


@pytest.mark.parametrize(("rows", "calls"), [(bench_layers.FEW_ROWS - 1, 2), (bench_layers.FEW_ROWS, 1)])
def test_few_rows_are_timed_over_all_layers_of_a_structure(monkeypatch, rows, calls):
    """Seconds are those of one layer."""
    model, _ = compress(small.model(), {"replace": RULES[:1]})
    called = set()
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):
            layer.register_forward_hook(lambda layer, *given: called.add(layer))
    told = dict.fromkeys(("seconds", "dense_seconds", "ratio", "bytes", "dense_bytes"), 6.0)
    monkeypatch.setattr(bench_layers, "compare", lambda ours, other, *rest: ours() or other() or told)
    found = measured(model, rows=(rows,))
    assert len(called) == calls and all(cell["seconds"] == cell["dense_seconds"] == 6.0 / calls for cell in found)


def test_nothing_is_not_measured():
    model, _ = compress(small.model(), {"replace": RULES})
    for more, sentence in (({"repeats": 0}, "repeats 0 leaves"), ({"rows": (1, 0)}, "rows 0 leaves")):
        with pytest.raises(ValueError, match=sentence):
            measured(model, **more)


def test_turns_take_turns():
    order = []
    found = timing.compare(lambda: order.append("a"), lambda: order.append("b"), torch.device("cpu"), 3)
    calls = [key for key, _ in itertools.groupby(order)]
    assert calls == ["a", "b"] * 5 and min(found[key] for key in ("seconds", "dense_seconds", "ratio")) > 0, (
        "one turn warms up, and the memory is measured last"
    )
