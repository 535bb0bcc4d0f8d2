"""Layers in the default mode, ``auto``: blocks of GPT-2 small against dense ones, kept matrices within the dense layers' bytes.

    python benchmarks/auto.py [--names ttm-64 ...]

A layer of its own can keep nothing in ``auto``: factors and ``W`` take more than the dense matrix. Of several layers some can. So
what a recipe, or a family at half the parameters, puts into BLOCKS blocks is called layer by layer, forward at 1, 512 and 4,096
rows, forward and backward at the last two; float32, medians of turns in one run. Layers on a kept matrix are counted: they are
dense ones. Results go to results/bench/DEVICE/auto.json, set by set; ``speed.py --table`` shows them. Let nothing else run.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from speed import ROWS, sets
from study import device_folder
from torch import nn

from tenfold.evaluate.layers import WARM, one_pass
from tenfold.evaluate.machine import turns
from tenfold.nn import FactorizedLinear
from tenfold.nn.kept import keep_matrices
from tenfold.structure import Structure
from tenfold.structure.contract import bucket

BLOCKS = 4
REPEATS = {1: 25, 512: 9, 4096: 3}


def layer_of(structure: Structure) -> FactorizedLinear:
    layer = FactorizedLinear(structure)
    layer.set_factors(structure.init(0.02))
    nn.init.zeros_(layer.bias)
    return layer


def cells_of(structures: list[Structure]) -> list[dict]:
    layers = nn.ModuleList([layer_of(structure) for structure in structures * BLOCKS])
    dense = nn.ModuleList([nn.Linear(*reversed(layer.structure.shape)) for layer in layers])
    kept, found = keep_matrices(layers, "auto"), []
    for rows in ROWS:
        for backward in (False, True):
            if backward and rows == 1:
                continue
            runs = [every(some, rows, backward) for some in (layers, dense)]
            pairs = turns(*runs, torch.device("cpu"), REPEATS[rows])
            found.append(
                {
                    "rows": rows,
                    "pass": "forward + backward" if backward else "forward",
                    "seconds": statistics.median(ours for ours, _ in pairs),
                    "dense_seconds": statistics.median(other for _, other in pairs),
                    "ratio": statistics.median(other / ours for ours, other in pairs),
                    "layers": len(layers),
                    "kept": sum(bucket(rows) in layer.keeps for layer in layers),
                }
            )
    return [cell | {"bytes": kept["bytes"], "limit": kept["limit"]} for cell in found]


def every(layers: nn.ModuleList, rows: int, backward: bool):
    """All layers one after the other; those of one shape have one input."""
    layers.train(backward)
    inputs, passes = {}, []
    for layer in layers:
        out, inner = layer.out_features, layer.in_features
        x, upstream = inputs.setdefault(
            (out, inner), (torch.randn(rows, inner, requires_grad=backward), torch.randn(rows, out))
        )
        passes.append(one_pass(layer, x, upstream, backward))

    def run() -> None:
        for one in passes:
            one()

    for _ in range(WARM if rows == 1 else 1):
        run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    given = parser.parse_args()
    file = device_folder(given.output) / "auto.json"
    result = json.loads(file.read_text()) if file.exists() else {"blocks": BLOCKS, "sets": []}
    done = {(one["group"], one["name"]) for one in result["sets"]}
    for (group, name), structures in sets().items():
        if group not in ("recipes", "families") or (group, name) in done or (given.names and name not in given.names):
            continue
        torch.manual_seed(0)
        cells = cells_of(structures)
        result["sets"].append({"group": group, "name": name, "cells": cells})
        file.write_text(json.dumps(result, indent=1) + "\n")
        shown = (f"{cell['pass']} {cell['rows']:,} {cell['ratio']:.2f} ({cell['kept']} kept)" for cell in cells)
        print(f"{group}, {name}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
