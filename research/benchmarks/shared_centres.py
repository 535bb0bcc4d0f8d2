"""Central cores that all layers share: what is lost by where they come from, and by what the outer cores are.

    python research/benchmarks/shared_centres.py --model tenfold/demo --roles attn.out mlp.out

Five cores a matrix with full bonds, as the recipe deepen. Stated is sum ||W - What||^2 / sum ||W||^2 over the layers: outer cores
copied from each layer's own tensor train, or refitted beside the given centre (alternating least squares, 20 rounds), or
everything fitted together. Writes research/results/shared_centres.json.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch

from tenfold import api
from tenfold.models.sites import find_sites, weight_of
from tenfold.structure import Structure
from tenfold.structure.als import LARGEST_SYSTEM, Problem

SPEC = {"kind": "tensor_train", "parts": 5, "mirror": True, "rank": "full"}
CENTRE = "core_2"


def lost(structure, weights, sets) -> float:
    rest = sum(float((structure.dense(f) - w).square().sum()) for f, w in zip(sets, weights, strict=True))
    return round(rest / sum(float(w.square().sum()) for w in weights), 4)


def refitted(structure, weight, start, rounds=20):
    """The outer cores nearest to ``weight`` beside the centre of ``start``."""
    problem = Problem(structure, [weight], [None], [None], ())
    state = problem.initial_state(start)
    outer = [(einsum, name) for einsum in problem.einsums for name in einsum.spec.names if name != CENTRE]
    for _ in range(rounds):
        for einsum, name in outer:
            if problem.system_size(einsum, name) <= LARGEST_SYSTEM:
                tried = state | {name: problem.solve_factor(state, einsum, name)}
                state = min(state, tried, key=problem.objective)
    return problem.factors_of(state, 0)


def measure(weights) -> dict:
    structure = Structure.for_shape(*weights[0].shape, SPEC)
    own, found = [structure.closed_form(weight) for weight in weights], {}
    given = {"first layer": weights[0], "middle layer": weights[len(weights) // 2], "mean": sum(weights) / len(weights)}
    for name, matrix in given.items():
        centre = structure.closed_form(matrix)
        copied = [factors | {CENTRE: centre[CENTRE]} for factors in own]
        near = [refitted(structure, weight, centre) for weight in weights]
        found[name] = {"copied": lost(structure, weights, copied), "refitted": lost(structure, weights, near)}
    joint = structure.fit(weights, shared=(CENTRE,), sweeps=20, tolerance=1e-4)
    sets = [{n: v if n == CENTRE else v[k] for n, v in joint.items()} for k in range(len(weights))]
    return {"structure": structure.to_json(), "centre of": found, "together": lost(structure, weights, sets)}


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tenfold/demo")
parser.add_argument("--roles", nargs="+", default=["attn.out", "mlp.out"])
given = parser.parse_args()
model, _ = api.load(given.model, "cpu", "float32")
begun, result = time.perf_counter(), {}
for role in given.roles:
    sites = [site.path for site in find_sites(model) if site.role == role]
    result[role] = measure([weight_of(model.get_submodule(path)).detach().double() for path in sites])
    print(role, json.dumps(result[role]), flush=True)
path = Path(__file__).parents[1] / "results" / "shared_centres.json"
about = {"model": given.model, "torch": torch.__version__, "tenfold": version("tenfold")}
path.write_text(json.dumps(about | {"roles": result, "seconds": round(time.perf_counter() - begun, 1)}, indent=1))
