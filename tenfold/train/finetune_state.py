"""State of a fine-tuning between calls: which seeds are finished, and the checkpoints of an unfinished one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold.models.atomic_io import read_json, write_json
from tenfold.models.distributed import is_main_process
from tenfold.models.loading import check_output
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.run_manifest import check_same

REPORT = "finetune.json"
SAME = ("model", "weights", "task", "data", "examples", "dtype")  # and the settings, of which compile may differ


def load_finished(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return the finished runs in ``folder`` and their summary.

    Raises:
        ValueError: they have other settings.
        FileExistsError: something else is there.
    """
    if not (folder / REPORT).is_file():
        inside = folder.glob("*") if folder.is_dir() else [folder]
        if not all(path.match("log-*.jsonl") or path.match("seed-*.partial") for path in inside):
            check_output(folder, False)
        return {}
    before = _check_same(folder, report)
    return {key: before[key] for key in ("runs", "parameters", "score", "best_seed")}


def seed_folder(folder: Path, seed: int) -> Path:
    """Return the folder of a seed's checkpoints until it is finished."""
    return folder / f"seed-{seed}.partial"


def prepare_seed(place: Path, report: dict[str, Any], overwrite: bool) -> None:
    """Empty the folder of a seed, unless it has a checkpoint to resume from.

    Raises:
        ValueError: the checkpoint was written with other settings.
    """
    if not overwrite and last_checkpoint(place):
        _check_same(place, report)
    elif is_main_process():
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def resume_seed(place: Path, report: dict[str, Any]) -> Iterator[Path | None]:
    """Write the settings of a seed and yield its last checkpoint; delete the folder again if it ends without one."""
    if is_main_process():
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / REPORT, report)
    try:
        yield last_checkpoint(place)
    except BaseException:
        if is_main_process() and last_checkpoint(place) is None:
            shutil.rmtree(place, ignore_errors=True)
        raise


def finish_seed(place: Path, folder: Path) -> None:
    """Delete the checkpoints of a finished seed, and keep the curves of TensorBoard."""
    for run in place.glob("runs/*"):
        (folder / "runs").mkdir(exist_ok=True)
        run.replace(folder / "runs" / f"{place.stem}-{run.name}")
    shutil.rmtree(place, ignore_errors=True)


def _check_same(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    before = read_json(folder / REPORT)
    then, now = ({key: one[key] for key in SAME} | one["settings"] | {"compile": None} for one in (before, report))
    problem = f"{folder} holds a fine-tuning with other settings"
    check_same(then, now, problem, "repeat that one, give another folder, or add --overwrite")
    return before
