"""Memory of a training step of a layer in mode ``memory``: every family at half the parameters against nn.Linear.

    python benchmarks/peak.py [--names ...]

The most bytes of tensors that forward and backward hold at once, parameters included; shapes of GPT-2 small, 512 and 4,096 rows,
float32. It does not depend on what else the machine does. Results go to results/bench/DEVICE/peak.json, set by set.
"""

import argparse
import json
from pathlib import Path

import torch
from auto import layer_of
from speed import sets
from study import device_folder
from torch import nn

from tenfold.evaluate.layers import held
from tenfold.nn.kept import keep_matrices

ROWS = (512, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    given = parser.parse_args()
    file = device_folder(given.output) / "peak.json"
    result = json.loads(file.read_text()) if file.exists() else {"sets": []}
    done = {one["name"] for one in result["sets"]}
    for (group, name), structures in sets().items():
        if group != "families" or name in done or (given.names and name not in given.names):
            continue
        cells = []
        for structure in structures:
            layer, (out, inner) = layer_of(structure), structure.shape
            keep_matrices(layer, "memory")
            for rows in ROWS:
                given_pass = torch.randn(rows, inner, requires_grad=True), torch.randn(rows, out), True
                ours, dense = held(layer, *given_pass), held(nn.Linear(inner, out), *given_pass)
                cells.append(
                    {
                        "shape": [out, inner],
                        "rows": rows,
                        "bytes": ours,
                        "dense_bytes": dense,
                        "w_bytes": 4 * out * inner,
                    }
                )
        result["sets"].append({"name": name, "cells": cells})
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(
            name,
            *(
                f"{cell['bytes'] / 2**20:.1f} of {(cell['dense_bytes'] + cell['w_bytes']) / 2**20:.1f}"
                for cell in cells
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
