"""Seconds and peak memory of calibrated compression from disk to disk, each run in a process of its own.

    python research/benchmarks/calibrated.py gpt2
    python research/benchmarks/calibrated.py llama

``gpt2``: a randomly initialised GPT-2 small, float32, 128 windows of 1,024 tokens, the recommended recipe; also the statistics
of one stream alone. ``llama``: a randomly initialised model of 1.6 billion parameters in the shape of Llama, bfloat16 on disk,
8 windows of 256 tokens. Random weights and the text of the demo: the figures are times and bytes, not quality.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[2] / "tenfold" / "demo"
SHAPES = {
    "gpt2": {"model_type": "gpt2", "dtype": "float32"},
    "llama": {
        "model_type": "llama", "dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 5504,
        "num_hidden_layers": 30, "num_attention_heads": 16, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
}  # fmt: skip
RUNS = {
    "gpt2": {
        "statistics": {
            "samples": 128,
            "calibrate": {"output_metric": "none", "refit": False, "fisher_tokens": 131072},
            "only": "survey",
        },
        "compress": {"samples": 128, "calibrate": {}},
    },
    "llama": {"compress": {"samples": 8, "calibrate": {"window": 256}}},
}
RUN = """
import json, sys, time
import tenfold, torch
from tenfold.checkpoint_jobs import compress_checkpoint
from tenfold.models.recipe import load_recipe
from tenfold.models.config import Calibrate
from tenfold.compression import blockwise
source, target, files, samples, calibrate, only = json.loads(sys.argv[1])
def peak_kb():  # of this process alone: ru_maxrss begins with that of the process it was forked from
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak_kb()
recipe = load_recipe("recommended")
recipe.calibrate = Calibrate(**calibrate)
if only:  # the statistics, whatever comes behind them
    collect = blockwise.BlockwiseCompression.collect
    def alone(*rest):
        begun = time.perf_counter()
        collect(*rest)
        print(json.dumps({"seconds": time.perf_counter() - begun}))
        raise SystemExit
    blockwise.BlockwiseCompression.collect = alone
report = compress_checkpoint(source, target, recipe, files, samples)
peak = peak_kb()
print(json.dumps({"before": before / 1024, "peak": peak / 1024, "phases": report["phases"], "seconds": report["seconds"],
                  "parameters": report["parameters"], "dense": report["parameters_dense"]}))
"""


def make(name: str, folder: Path, layers: int | None = None) -> None:
    """A checkpoint of random weights, written shard by shard."""
    shape = dict(SHAPES[name])
    if layers:
        shape["num_hidden_layers" if name == "llama" else "n_layer"] = layers
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    config.dtype = getattr(torch, shape["dtype"])
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    torch.manual_seed(0)
    groups: dict[str, list[str]] = {}
    for key in model.state_dict():
        if key not in model.all_tied_weights_keys:
            groups.setdefault(
                ".".join(part for part in key.split(".")[:3]) if any(c.isdigit() for c in key) else "", []
            ).append(key)
    where, shapes = {}, {key: value.shape for key, value in model.state_dict().items()}
    for number, keys in enumerate(groups.values()):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for key in keys:
            norm = len(shapes[key]) == 1
            value = torch.zeros(shapes[key]) if norm and key.endswith("bias") else torch.randn(shapes[key]) * 0.02
            tensors[key] = (torch.ones(shapes[key]) if norm and key.endswith("weight") else value).to(config.dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def measured(source: Path, target: Path, samples: int, calibrate: dict, only: str | None = None) -> dict:
    files = [str(DEMO / f"{part}.jsonl") for part in ("calibration", "healing", "heldout")]
    given = json.dumps([str(source), str(target), files, samples, calibrate, only])
    begun = time.perf_counter()
    environment = os.environ | {"MKL_DISABLE_FAST_MM": "1"}  # as the command sets it
    done = subprocess.run(
        [sys.executable, "-c", RUN, given], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"wall_seconds": round(time.perf_counter() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--runs", nargs="+", help="all of the shape's unless given; others stay in the result file")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--output", type=Path, help="research/results/calibrated-SHAPE.json unless given")
    given = parser.parse_args()
    target = given.output or Path(f"research/results/calibrated-{given.shape}.json")
    result = json.loads(target.read_text()) if target.exists() else {}
    about = {"python": platform.python_version(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    about |= {package: version(package) for package in ("torch", "transformers", "tenfold")}
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "dense"
        source.mkdir()
        make(given.shape, source, given.layers)
        result["checkpoint_mb"] = round(sum(f.stat().st_size for f in source.glob("*.safetensors")) / 2**20)
        for run in given.runs or RUNS[given.shape]:
            result[run] = measured(source, Path(place) / run, **RUNS[given.shape][run]) | {"machine": about}
            print(run, result[run], file=sys.stderr)
            shutil.rmtree(Path(place) / run, ignore_errors=True)
            target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
