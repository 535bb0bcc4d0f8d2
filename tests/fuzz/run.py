"""Read more than a million damaged inputs: ``make fuzz`` writes research/results/fuzz.json.

python tests/fuzz/run.py [--scale 0.01] [--readers tokenizer,model] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error"
)
ROOT, MEMORY = Path(__file__).parents[2], "/dev/shm"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]

import torch  # noqa: E402

torch.set_num_threads(1)

from campaign import campaign  # noqa: E402
from readers import readers  # noqa: E402

SEED = 20261130


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of inputs")
    parser.add_argument("--readers", default="")
    parser.add_argument("--output", type=Path, default=ROOT / "research" / "results" / "fuzz.json")
    given = parser.parse_args()
    counts, findings, begun = {}, [], time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as base:
        for name, reader in readers(Path(base)).items():
            if given.readers and name not in given.readers.split(","):
                continue
            count = max(1, round(given.scale * reader.inputs))
            found = campaign(reader, Path(base) / "try", SEED, count)
            counts[name] = count
            findings += [
                {"reader": name, "kind": kind, "seed": seed, "words": words} for kind, (seed, words) in found.items()
            ]
            print(f"{name}: {count:,} inputs, {len(found)} findings, {time.perf_counter() - begun:.0f} s", flush=True)
            for kind, (seed, words) in found.items():
                print(f"  seed {seed}: {kind}: {words!r:.200}", flush=True)
    total = sum(counts.values())
    report = {
        "command": "make fuzz",
        "inputs": total,
        "counts": counts,
        "first_seed": SEED,
        "seconds": round(time.perf_counter() - begun),
        "findings": findings,
    }
    given.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{total:,} inputs, {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
