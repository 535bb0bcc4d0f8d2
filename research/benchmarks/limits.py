"""The limits that tenfold promises, each measured in a process of its own.

    python research/benchmarks/limits.py [research/results/limits.json]

Seconds and peak memory of `tenfold --help`, of `tenfold inspect` for every recipe, of `import tenfold` on top of what
transformers' quantizer registry takes, and of folding a randomly initialised GPT-2 small without data.
"""

import json
import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from study import measured

from tenfold.models.recipe import load_recipe, recipe_names

target = Path(sys.argv[1] if len(sys.argv) > 1 else "research/results/limits.json")
tenfold = str(Path(sys.executable).parent / "tenfold")


def median(runs: list[dict], key: str) -> float:
    return round(statistics.median(run[key] for run in runs), 3)


help_runs = [measured(tenfold, "--help") for _ in range(5)]
light = measured(sys.executable, "-c", "import tenfold_cli, sys; print('torch' in sys.modules)")["output"].strip()

imports = """
import time, transformers.quantizers
begun = time.perf_counter()
import tenfold
print(time.perf_counter() - begun)
"""
import_seconds = [float(measured(sys.executable, "-c", imports)["output"]) for _ in range(5)]

inspected = {}
for recipe in map(load_recipe, recipe_names()):
    if recipe.base_model:
        run = measured(tenfold, "inspect", recipe.base_model, "--recipe", recipe.name, "--json")
        counts = json.loads(run["output"])["parameters"]
        inspected[recipe.name] = {
            "on": recipe.base_model,
            "seconds": round(run["seconds"], 2),
            "mb": round(run["mb"]),
            **counts,
        }
        print(recipe.name, inspected[recipe.name], file=sys.stderr)

fold = """
import resource, sys, time
import torch
from tenfold import compress
from tenfold.models.recipe import Start, load_recipe
from transformers import GPT2Config, GPT2LMHeadModel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config())
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
begun = time.perf_counter()
recipe = load_recipe(sys.argv[1])
for rule in recipe.replace:
    rule.start = Start(fit=sys.argv[2])
_, report = compress(model, recipe)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.perf_counter() - begun, (peak - before) / size, report["parameters"]["total"])
print(sum(site["error"] for site in report["sites"]) / len(report["sites"]))
"""
FITS = {
    "krony-81m": "van-loan",
    "krony-96m": "van-loan",
    "ttm-16": "tt-svd",
    "ttm-64": "tt-svd",
    "monarch": "block-svd",
}
folded = {}
for recipe, fit in FITS.items():
    seconds, share, total, error = measured(sys.executable, "-c", fold, recipe, fit)["output"].split()
    folded[recipe] = {
        "fit": fit,
        "seconds": round(float(seconds), 1),
        "peak_over_model": round(float(share), 2),
        "parameters": int(total),
        "mean_relative_error": round(float(error), 4),
    }
    print(recipe, folded[recipe], file=sys.stderr)

target.parent.mkdir(exist_ok=True)
target.write_text(
    json.dumps(
        {
            "help": {
                "seconds": median(help_runs, "seconds"),
                "mb": median(help_runs, "mb"),
                "imports_torch": light == "True",
            },
            "import_tenfold_after_quantizers": {"seconds": round(statistics.median(import_seconds), 3)},
            "inspect": inspected,
            "fold_gpt2_small": folded,
            "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("torch", "transformers")},
        },
        indent=1,
    )
)
print(f"written to {target}")
