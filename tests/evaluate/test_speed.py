"""The bench measures the model and its dense twin, and leaves the model as it was."""

import copy

import small
import torch

from tenfold.api import bench, compress


def test_bench_tells_both_and_changes_nothing():
    model, _ = compress(small.model(), {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]})
    before = copy.deepcopy(model.state_dict())
    result = bench(model, new_tokens=2, repeats=2)
    assert result["rows"] == {"prefill": 30, "decode": 1}
    for name in ("prefill", "decode"):
        assert min(result[name].values()) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
