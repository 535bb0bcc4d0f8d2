"""The limits that tenfold promises, each measured in a process of its own.

    python benchmarks/limits.py [results/limits.json]

Seconds and peak memory of `tenfold --help`, of `tenfold inspect` for every recipe, of `import tenfold` on top of what
transformers' quantizer registry takes, and of folding a randomly initialised GPT-2 small without data.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

target = Path(sys.argv[1] if len(sys.argv) > 1 else "results/limits.json")
tenfold = str(Path(sys.executable).parent / "tenfold")


def measured(*command: str) -> dict:
    """Wall seconds, peak memory in MB and the output of one process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return {"seconds": time.perf_counter() - begun, "mb": usage.ru_maxrss / 1024, "output": output}


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
for recipe in json.loads(measured(tenfold, "recipes", "--json")["output"]):
    if recipe["on"]:
        run = measured(tenfold, "inspect", recipe["on"], "--recipe", recipe["name"], "--json")
        counts = json.loads(run["output"])["parameters"]
        inspected[recipe["name"]] = {
            "on": recipe["on"],
            "seconds": round(run["seconds"], 2),
            "mb": round(run["mb"]),
            **counts,
        }
        print(recipe["name"], inspected[recipe["name"]], file=sys.stderr)

fold = """
import resource, sys, time
import tenfold, torch
from transformers import GPT2Config, GPT2LMHeadModel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config())
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
begun = time.perf_counter()
_, report = tenfold.compress(model, sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.perf_counter() - begun, (peak - before) / size, report["parameters"]["total"])
"""
folded = {}
for recipe in ("krony-81m", "krony-96m", "ttm-16", "ttm-64"):
    seconds, share, total = measured(sys.executable, "-c", fold, recipe)["output"].split()
    folded[recipe] = {
        "seconds": round(float(seconds), 1),
        "peak_over_model": round(float(share), 2),
        "parameters": int(total),
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
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
        indent=1,
    )
)
print(f"written to {target}")
