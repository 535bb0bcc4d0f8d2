"""Store of tensors that are needed later: in memory while they are small, else in files of a folder."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class TensorStore:
    """``{name: tensor}`` on the CPU, in float32.

    Args:
        folder: of the ``.npy`` files, one per tensor; None: in memory.
    """

    def __init__(self, folder: Path | None = None):
        self.folder, self.tensors = folder, {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, value: Tensor) -> None:
        value = value.detach().float().cpu()
        if self.folder is None:
            self.tensors[name] = value
            return
        file = self.folder / f"{name}.npy"
        try:
            np.save(file, value.numpy())
        except OSError as reason:
            file.unlink(missing_ok=True)
            raise OSError(
                f"{file} can't be written ({reason}); make room for the hidden states and rerun the command to resume it"
            ) from None
        release_memory()

    def get(self, name: str) -> Tensor:
        return self.tensors[name] if self.folder is None else torch.from_numpy(np.load(self.folder / f"{name}.npy"))

    def drop(self, name: str) -> None:
        if self.folder is None:
            self.tensors.pop(name, None)
        else:
            (self.folder / f"{name}.npy").unlink(missing_ok=True)


def release_memory() -> None:
    """Return freed memory to the system; glibc keeps the fragments that every batch leaves."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
