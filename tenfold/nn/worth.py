"""What was measured on this machine, in the user's cache folder: see :mod:`tenfold.structure.worth`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from tenfold.structure.pair import KERNELS
from tenfold.structure.products import ROWS
from tenfold.structure.worth import MEASURED, SHIPPED, Worth


def folder() -> Path:
    """Where it is stored."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenfold"


@cache
def read_measured() -> None:
    """Let plans follow what was measured with so many threads; once a process."""
    for file in folder().glob("worth-*.json"):
        kind = file.stem.removeprefix("worth-")
        try:
            found = json.loads(file.read_text())
            if not _of_here(kind, found):
                continue
            shipped = {"narrow": SHIPPED[kind].narrow} if kind in SHIPPED else {}  # not in files of earlier versions
            _use(kind, Worth(**shipped | found["worth"]), found)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # of another version
            continue


def keep_measured(kind: str, worth: Worth, about: dict) -> Path:
    """Store what was measured on a kind of device (``cpu``, ``cuda``, ...); it counts from now on."""
    file = folder() / f"worth-{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(json.dumps({"worth": asdict(worth)} | about, indent=1) + "\n")
    new.replace(file)
    _use(kind, worth, about)
    return file


def _of_here(kind: str, found: dict) -> bool:
    """Whether it was measured with as many threads as there are now, on this kind of GPU; a home may be that of two machines."""
    if kind == "cpu":
        return found.get("threads") in (None, torch.get_num_threads())
    here = torch.cuda.get_device_name() if kind == "cuda" and torch.cuda.is_available() else None
    return here is None or found.get("device") in (None, here)


def _use(kind: str, worth: Worth, about: dict) -> None:
    MEASURED[kind], kernels = worth, about.get("kernels")
    if isinstance(about.get("rows"), int):
        ROWS[kind] = about["rows"]
    faster = kernels and kernels > 1.0 and find_spec("triton")
    (KERNELS.add if faster else KERNELS.discard)(kind)
