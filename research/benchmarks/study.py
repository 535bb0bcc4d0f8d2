"""What studies have in common: arguments of those of one model, result files that grow run by run, measured processes."""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch


def arguments(about: str, keep: list[float]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="of the result file; the model's unless given")
    parser.add_argument("--keep", type=float, nargs="+", default=keep)
    return parser


def results(folder: str, given: argparse.Namespace) -> tuple[Path, dict]:
    """The file and what is in it already; its versions are those of now."""
    file = Path(__file__).parents[1] / "results" / folder / f"{given.name or Path(given.model).name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(file.read_text()) if file.exists() else {"runs": []}
    result["versions"] = {name: version(name) for name in ("tenfold", "torch", "transformers")}
    return file, result


def device_folder(output: Path) -> Path:
    """Where results of this processor go: one with other instructions has figures of its own."""
    folder = output / f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}-{torch.get_num_threads()}-threads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measured(*command: str) -> dict:
    """Wall seconds, peak memory in MB and the output of one process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return {"seconds": time.perf_counter() - begun, "mb": usage.ru_maxrss / 1024, "output": output}
