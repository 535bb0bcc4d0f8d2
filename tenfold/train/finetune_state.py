"""What calls of fine-tuning have left: which seeds are finished, and the checkpoints of one that is not."""

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

REPORT = "finetune.json"
SAME = ("model", "weights", "task", "data", "examples", "dtype")
NOTED_LATER = {"weights"}  # what folders of before don't have
FREE = {"compile"}  # what may be another when a call is repeated


def finished(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What a fine-tuning of the same settings has finished in ``folder``.

    Raises:
        ValueError: the settings are others.
        FileExistsError: something else is there.
    """
    file = folder / REPORT
    if not file.is_file():
        inside = folder.glob("*") if folder.is_dir() else [folder]
        if not all(path.match("log-*.jsonl") or path.match("seed-*.partial") for path in inside):
            check_output(folder, False)
        return {}
    _same(folder, report)
    before = read_json(file)
    return {key: before[key] for key in ("runs", "parameters", "score", "best_seed")}


def partial(folder: Path, seed: int) -> Path:
    """Where the checkpoints of a seed are until it is finished."""
    return folder / f"seed-{seed}.partial"


def begin(place: Path, report: dict[str, Any], overwrite: bool) -> None:
    """Clear ``place``, unless there is a checkpoint to go on from.

    Raises:
        ValueError: it is one of other settings.
    """
    if not overwrite and last_checkpoint(place):
        _same(place, report)
    elif is_main_process():
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def kept(place: Path, report: dict[str, Any]) -> Iterator[str | None]:
    """The checkpoint in ``place`` to go on from. The settings of the new ones are noted there, and go where none was written."""
    if is_main_process():
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / REPORT, report)
    last = last_checkpoint(place)
    try:
        yield last and str(last)
    except BaseException:
        if is_main_process() and last_checkpoint(place) is None:
            shutil.rmtree(place, ignore_errors=True)
        raise


def finish(place: Path, folder: Path) -> None:
    """Of a finished seed only the curves stay, where TensorBoard wrote some."""
    for run in place.glob("runs/*"):
        (folder / "runs").mkdir(exist_ok=True)
        run.replace(folder / "runs" / f"{place.stem}-{run.name}")
    shutil.rmtree(place, ignore_errors=True)


def _same(folder: Path, report: dict[str, Any]) -> None:
    before = read_json(folder / REPORT)
    now, then = ({key: one.get(key) for key in SAME} | one.get("settings", {}) for one in (report, before))
    new = FREE | (NOTED_LATER - before.keys())
    if other := sorted(key for key in now.keys() - new if then.get(key) != now[key]):
        raise ValueError(
            f"{folder} holds a fine-tuning with other settings ({', '.join(other)}); repeat that one, give another folder, or "
            "add --overwrite"
        )
