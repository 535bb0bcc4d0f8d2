"""What one structured layer keeps for its backward pass and how long a step takes, against plain autograd and nn.Linear.

    python benchmarks/layer.py [results/layer.json]

The shapes of the TTM paper's tables (arXiv 2306.02697, the authors' code): a memory test with cores (8,8)(8,8)(12,12)(3,1) of
rank 16 on 16 x 1,024 tokens, and the layers of ``ttm-16`` to ``ttm-80`` on 4,096 tokens. Plain autograd runs the same
contraction through torch.einsum. Megabytes are those of the tensors that autograd keeps between forward and backward, the
layer's parameters left out; seconds are medians of pairs in one run.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from tenfold.nn import FactorizedLinear
from tenfold.structure import TensorTrain, contract
from tenfold.structure.tensor_train import left_clipped

PAPER = {
    "ttm-16": ((4, 4, 4, 4, 12), (4, 4, 4, 4, 3), 16),
    "ttm-32": ((8, 8, 8, 6), (8, 8, 12, 1), 32),
    "ttm-64": ((8, 8, 8, 6), (8, 8, 12, 1), 64),
    "ttm-72": ((16, 16, 12), (16, 16, 3), 72),
    "ttm-80": ((16, 16, 12), (16, 16, 3), 80),
}
MEMORY = ((8, 8, 12, 3), (8, 8, 12, 1), 16)


class Plain(nn.Module):
    """The same plan, through autograd."""

    def __init__(self, layer: FactorizedLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        factors, (place,) = self.layer.factors(), self.layer.structure.normal_form()
        flat = x.reshape(-1, x.shape[-1])
        return contract.forward(place.diagram, place.tensors(factors), flat).reshape(*x.shape[:-1], -1)


def kept(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps behind the forward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(size for size, _ in found.values())


def seconds(module: nn.Module, x: torch.Tensor, backward: bool) -> float:
    begun = time.perf_counter()
    y = module(x)
    if backward:
        y.sum().backward()
    return time.perf_counter() - begun


def row(outs, ins, rank: int, rows: int, repeats: int) -> dict:
    structure = TensorTrain(outs=outs, ins=ins, ranks=left_clipped(outs, ins, rank))
    layer = FactorizedLinear(structure, bias=False)
    layer.set_factors(structure.init(0.02))
    modules = {"tenfold": layer, "autograd": Plain(layer), "dense": nn.Linear(*reversed(structure.shape), bias=False)}
    x = torch.randn(rows, structure.shape[1], requires_grad=True)
    result = {"rows": rows, "input_MB": x.nbytes / 2**20, "parameters": structure.numel, "rank": rank}
    for name, module in modules.items():
        result[f"{name}_kept_MB"] = kept(module, x) / 2**20
    for backward in (False, True):
        times = {name: [] for name in modules}
        for _ in range(repeats + 1):
            for name, module in modules.items():
                times[name].append(seconds(module, x, backward))
        for name, values in times.items():
            result[f"{name}_{'step' if backward else 'forward'}_ms"] = 1e3 * statistics.median(values[1:])
    return result


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "results/layer.json")
    torch.manual_seed(0)
    rows = {"memory test": row(*MEMORY, 16 * 1024, 5)}
    rows |= {name: row(*shape, 4096, 7) for name, shape in PAPER.items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    target.write_text(
        json.dumps({"threads": torch.get_num_threads(), "versions": versions, "rows": rows}, indent=1) + "\n"
    )
    for name, found in rows.items():
        print(name, {key: round(value, 2) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
