"""Tensors that wait for their turn: in memory while they are few, in files of a folder otherwise."""

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
        folder: where the tensors lie, one ``.npy`` file each; None: in memory.
    """

    def __init__(self, folder: Path | None = None):
        self.folder, self.held = folder, {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, value: Tensor) -> None:
        value = value.detach().float().cpu()
        if self.folder is None:
            self.held[name] = value
        else:
            file = self.folder / f"{name}.npy"
            try:
                np.save(file, value.numpy())
            except OSError as reason:
                file.unlink(missing_ok=True)
                raise OSError(
                    f"{file} can't be written ({reason}); make room for the hidden states, and the same command goes on"
                ) from None
            hand_back()

    def get(self, name: str) -> Tensor:
        return self.held[name] if self.folder is None else torch.from_numpy(np.load(self.folder / f"{name}.npy"))

    def drop(self, name: str) -> None:
        if self.folder is None:
            self.held.pop(name, None)
        else:
            (self.folder / f"{name}.npy").unlink(missing_ok=True)


def hand_back() -> None:
    """Memory that was freed goes back to the system: glibc keeps what batch after batch leaves in pieces."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
