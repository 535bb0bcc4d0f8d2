"""What the permutation search gains on trained weights: against the identity and the best of 100 random orders.

    python research/benchmarks/permutations.py [research/results/permutations.json]

Relative error of Kronecker structures at equal rank on matrices of the demo model, both methods of search.
"""

import json
import sys
import time
from pathlib import Path

import torch

import tenfold
from tenfold.models.sites import weight_of
from tenfold.structure import Kronecker, Scattered
from tenfold.structure.permutation_search import search

target = Path(sys.argv[1] if len(sys.argv) > 1 else "research/results/permutations.json")
SITES = {
    "transformer.h.1.mlp.c_fc": Kronecker(outs=(256, 4), ins=(128, 2), terms=4),
    "transformer.h.1.mlp.c_proj": Kronecker(outs=(128, 2), ins=(256, 4), terms=4),
    "transformer.h.3.attn.c_proj": Kronecker(outs=(64, 4), ins=(64, 4), terms=6),
    "transformer.wte": Kronecker(outs=(4096, 1), ins=(128, 2), terms=1),
}
model, _ = tenfold.load(Path(tenfold.__file__).parent / "demo")


def error(structure, factors, weight) -> float:
    return float((structure.dense(factors) - weight).norm() / weight.norm())


def drawn(placed, weight) -> float:
    """The error with one random order of rows and columns."""
    return error(placed, placed.fit_at(weight, *(torch.randperm(n) for n in weight.shape)), weight)


rows = []
for path, base in SITES.items():
    torch.manual_seed(0)
    weight = weight_of(model.get_submodule(path)).detach().double()
    placed = Scattered(base=base, out_features=base.shape[0], in_features=base.shape[1])
    row = {"site": path, "structure": repr(base), "identity": error(base, base.closed_form(weight), weight)}
    row["best_of_100_random"] = min(drawn(placed, weight) for _ in range(100))
    begun = time.perf_counter()
    row["alternate"] = error(placed, search(placed, weight), weight)
    row["alternate_seconds"] = time.perf_counter() - begun
    rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    print(rows[-1], file=sys.stderr)
target.write_text(json.dumps(rows, indent=1) + "\n")
print(f"written to {target}")
