"""Faults before the N-th file-system change of a process, which Python's audit events announce.

Native writers (safetensors, torch.save, tokenizers) raise no events; they are wrapped, and a kill leaves half of their file.
Only changes below the working folder count.
"""

from __future__ import annotations

import os
import signal
import sys
from errno import ENOSPC
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
NEED_ROOM = {"open", "os.mkdir", "native"}
FULL = {
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    "tokenizers": Exception("No space left on device (os error 28)"),
}


class Faults:
    """Count the changes below the working folder and raise ``fault`` before the ``at``-th; install once, in a forked process.

    Args:
        fault: ``kill`` (in the middle of a write, else before the change), ``full`` (from then on nothing that needs room
            works), or the name of a signal, sent once.
        at: the number of the change; 0 only counts.
        report: where the number of changes is written when the process ends by itself.
    """

    def __init__(self, fault: str = "kill", at: int = 0):
        self.fault, self.at, self.seen, self.here = fault, at, 0, os.fspath(Path.cwd()) + os.sep

    def install(self) -> None:
        sys.addaudithook(self._on_event)
        self._wrap(safetensors.torch, "serialize_file", "safetensors")
        self._wrap(torch, "save", "torch")
        self._wrap(PreTrainedTokenizerFast, "_save_pretrained", "tokenizers")

    def _on_event(self, event: str, arguments: tuple) -> None:
        if event in CHANGES and self._is_here(arguments[0]) and (event != "open" or _writes(*arguments[1:3])):
            self._count(
                event,
                lambda: event == "open" and _begin(*arguments),
                OSError(ENOSPC, "No space left on device", arguments[0]),
            )

    def _wrap(self, owner, name: str, library: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*arguments, **keywords):
            def half():
                self.at = 0  # the changes of this very write are not counted again
                plain(*arguments, **keywords)
                os.truncate(path, path.stat().st_size // 2)

            place = next((one for one in (*arguments, *keywords.values()) if isinstance(one, str | Path)), None)
            if place is not None and self._is_here(place):
                path = Path(place) / "tokenizer.json" if library == "tokenizers" else Path(place)
                self._count("native", half, FULL[library])
            return plain(*arguments, **keywords)

        setattr(owner, name, wrapped)

    def _is_here(self, path) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        path = os.fsdecode(path)
        return not path.startswith(os.sep) or path.startswith(self.here)

    def _count(self, event: str, begin, full: Exception) -> None:
        self.seen += 1
        if self.fault == "full":
            if self.at and self.seen >= self.at and event in NEED_ROOM:
                raise full
        elif self.seen == self.at:
            if self.fault == "kill":
                begin()
            os.kill(os.getpid(), signal.Signals["SIGKILL" if self.fault == "kill" else self.fault])


def _writes(mode: str | None, flags: int | None) -> bool:
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(c in (mode or "") for c in "wax+")


def _begin(path, mode: str | None, flags: int | None) -> None:
    """Leave what opening a file leaves before anything is written."""
    if (flags or 0) & os.O_TRUNC or "w" in (mode or ""):
        with Path(os.fsdecode(path)).open("w"):
            pass
