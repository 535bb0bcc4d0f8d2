"""The folder that a run writes: tried and locked before the work, and recognised when the same run is repeated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import Any

from tenfold.models.atomic_io import OWN, RUN, disk_full_errors, near, recover, write_json
from tenfold.models.distributed import is_main_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def claim_output(folder: str | Path, alone: bool = False) -> Iterator[Path]:
    """Lock the output ``folder`` for this run, try to write there, and publish what a killed run has left complete.

    The first of several processes does it, which have to wait for it (``barrier``); with ``alone`` no other one takes part.

    Raises:
        FileExistsError: ``folder`` is a file, or another process writes it.
        OSError: nothing can be written there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and the result is a folder; choose another output")
    with ExitStack() as lock:
        if alone or is_main_process():
            with disk_full_errors(folder):
                near(folder, "lock").parent.mkdir(parents=True, exist_ok=True)
                lock.enter_context(_lock(folder))
                inside = [folder / f"{OWN}probe"] if folder.is_dir() else []
                for probe in (near(folder, "probe"), *inside):  # written, renamed and deleted
                    write_json(probe, os.getpid())
                    probe.unlink(missing_ok=True)
                recover(folder)
        try:
            yield folder
        except OSError as reason:
            if reason.errno != ENOSPC or reason.filename:
                raise
            raise OSError(f"{folder} can't be written ({reason}); make room, and repeat the command") from None


def check_output(folder: Path, overwrite: bool, run: str = "") -> bool:
    """Return whether ``folder`` is the finished result of ``run``, a digest of it; refuse anything else unless ``overwrite``.

    Raises:
        FileExistsError: there is something else.
    """
    note = folder / RUN
    finished = not overwrite and bool(run) and note.is_file() and note.read_text(errors="replace") == run
    if not overwrite and not finished and list_content(folder):
        raise FileExistsError(f"{folder} is there already and not empty; choose another folder or add --overwrite")
    return finished


def list_content(folder: Path) -> list[Path]:
    """List what is in ``folder``, but what this run or the file system has put there."""
    names = folder.iterdir() if folder.is_dir() else ()
    return [file for file in names if not file.name.startswith(OWN) and file.name != "lost+found"]


def digest(run: Any) -> str:
    """Return a digest of everything that decides the result of a run."""
    return hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which the system releases however the process ends; the file says whose it is."""
    file, locked = near(folder, "lock"), False
    opened: Any = None
    while not locked:
        opened = file.open("a+")
        try:
            if fcntl is not None:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            opened.seek(0)
            owner = opened.read().strip() or "of unknown number"
            opened.close()
            told = f"process {owner} is writing {folder}; wait until it has ended, or choose another output"
            raise FileExistsError(told) from None
        except OSError:
            pass  # a file system without locks
        with suppress(FileNotFoundError):  # the run before has deleted the file since it was opened
            locked = os.path.samestat(os.fstat(opened.fileno()), file.stat())
        if not locked:
            opened.close()
    try:
        opened.truncate(0)
        opened.write(str(os.getpid()))
        opened.flush()
        yield
    finally:
        file.unlink(missing_ok=True)
        opened.close()
