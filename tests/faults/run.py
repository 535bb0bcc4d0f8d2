"""Count the faults that tenfold survives: ``make faults`` runs all and writes research/results/faults.json.

python tests/faults/run.py [--every 10] [--jobs heal,pretrain] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
ROOT, MEMORY = Path(__file__).parents[2], "/dev/shm"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import torch  # noqa: E402

torch.set_num_threads(1)

import places  # noqa: E402
from trials import JOBS, Bench  # noqa: E402

FAULTS = ("kill", "full", "SIGTERM", "SIGINT")


def told(found: list[str | None]) -> list[str]:
    """Return what was found, and print it."""
    findings = [one for one in found if one]
    print("\n".join(findings), end="\n" if findings else "", flush=True)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--every", type=int, default=1, help="of the kill points; other faults are tried at every fifth of them"
    )
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--output", type=Path, default=ROOT / "research" / "results" / "faults.json")
    given = parser.parse_args()
    counts, findings, total, begun = {}, [], 0, time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as base:
        bench = Bench(Path(base))
        for name in given.jobs.split(","):
            counts[name] = {}
            for fault in FAULTS:
                points = bench.points(name, given.every * (1 if fault == "kill" else 5), 8 if fault == "kill" else 1)
                counts[name][fault] = len(points)
                findings += told([bench.trial(name, fault, at) for at in points])
            for place, check in places.CHECKS.items():
                counts[name][place] = 1
                findings += told([check(bench, name)])
            print(f"{name}: {counts[name]}, {len(findings)} findings so far", flush=True)
            total = sum(sum(kinds.values()) for kinds in counts.values())
            report = {
                "command": "make faults" if given.every == 1 else f"python tests/faults/run.py --every {given.every}",
                "trials": total,
                "counts": counts,
                "seconds": round(time.perf_counter() - begun),
                "findings": findings,
            }
            given.output.write_text(json.dumps(report, indent=1) + "\n")  # what is done is noted
    print(f"{total} faults, {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
