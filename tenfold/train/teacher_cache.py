"""A teacher's predictions on a text, computed once: the likeliest tokens of every position, in half precision.

A cache is a folder with ``ids.npy (windows, window, k)``, ``log_probabilities.npy (windows, window, k + 1)``, whose last class
is all other tokens together, and ``store.json``, its manifest, with the number of windows that are written. It takes
``2 (k + 1) + 4 k`` bytes a token, ``2 (k + 1) + 2 k`` if the vocabulary has at most 65,536 entries.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from tenfold.models.atomic_io import read_json, write_json
from tenfold.train.chunked_head import ChunkedHead
from tenfold.train.losses import log_probabilities
from tenfold.train.run_manifest import check_same
from tenfold.train.tokens import tokenizer_fingerprint

MANIFEST = "store.json"
LOWEST = -60000.0  # close to the lowest number of half precision


def make_manifest(
    teacher: str, tokenizer, tokens: np.ndarray, window: int, temperature: float, k: int, vocabulary: int
) -> dict[str, Any]:
    """Return what decides the contents of a cache; ``teacher`` is the fingerprint of its weights."""
    if not 1 <= k <= vocabulary:
        raise ValueError(f"the {k} likeliest tokens can't be stored: take from 1 to the vocabulary's {vocabulary:,}")
    return {
        "teacher": teacher,
        "tokenizer": tokenizer_fingerprint(tokenizer)[:16],
        "text": hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int32).data).hexdigest()[:16],
        "window": window,
        "temperature": temperature,
        "top_k": k,
        "vocabulary": vocabulary,
    }


class TeacherCache(torch.utils.data.Dataset):
    """Windows of text with the teacher's predictions on them, which are in ``folder`` once ``fill`` has ended."""

    def __init__(self, folder: Path, manifest: dict[str, Any], windows: torch.utils.data.Dataset):
        self.folder, self.manifest, self.windows, self.done = folder, manifest, windows, 0
        if (folder / MANIFEST).is_file():
            before = read_json(folder / MANIFEST)
            self.done = before.pop("windows")
            way_out = "give another folder, or delete it"
            check_same(before, manifest, f"the store {folder} was made from something else", way_out)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is there and is no store of a teacher's answers; give another folder")
        if not self.done:
            self._create()
        mode = "r" if self.finished else "r+"
        self.ids, self.log_probabilities = (
            np.load(folder / f"{name}.npy", mmap_mode=mode) for name in ("ids", "log_probabilities")
        )

    @property
    def finished(self) -> bool:
        return self.done == len(self)

    def __len__(self) -> int:
        return len(self.windows)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, values = self.ids[index].astype(np.int64), self.log_probabilities[index].astype(np.float32)
        return self.windows[index] | {"ids": torch.from_numpy(ids), "log_probabilities": torch.from_numpy(values)}

    @torch.no_grad()
    def fill(
        self, teacher: ChunkedHead, batch: int, chunk: int, progress: Callable[[Iterable], Iterable] = iter
    ) -> None:
        """Predict all windows, resuming after the last ``batch`` that an interrupted call wrote."""
        first, device, k = self.done, next(teacher.model.parameters()).device, self.manifest["top_k"]
        for begin in progress(range(first, len(self), batch)):
            rows = range(begin, min(begin + batch, len(self)))
            ids = torch.stack([self.windows[index]["input_ids"] for index in rows]).to(device)
            if begin == first:
                teacher.verify(ids, chunk)
            states = teacher.compute_states(input_ids=ids)[0].flatten(0, 1)
            parts = [
                _top_k(teacher.compute_logits(part), self.manifest["temperature"], k) for part in states.split(chunk)
            ]
            for array, values in zip((self.ids, self.log_probabilities), zip(*parts, strict=True), strict=True):
                array[begin : rows.stop] = torch.cat(values).unflatten(0, ids.shape).cpu().numpy()
                array.flush()
            self.done = rows.stop
            write_json(self.folder / MANIFEST, self.manifest | {"windows": self.done})

    def _create(self) -> None:
        k, vocabulary, shape = self.manifest["top_k"], self.manifest["vocabulary"], (len(self), self.manifest["window"])
        arrays = {
            "ids": ((*shape, k), np.dtype(np.uint16 if vocabulary <= 2**16 else np.int32)),
            "log_probabilities": ((*shape, k + (k < vocabulary)), np.dtype(np.float16)),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(np.prod(size) * dtype.itemsize for size, dtype in arrays.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"the store needs {needed / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB left: lower top_k from {k}, "
                "take less text, or another disk"
            )
        write_json(self.folder / MANIFEST, self.manifest | {"windows": 0})
        for name, (size, dtype) in arrays.items():
            open_memmap(self.folder / f"{name}.npy", mode="w+", dtype=dtype, shape=size)


def _top_k(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` likeliest tokens ``(n, k)``, and the log-probabilities ``(n, k + 1)`` of them and of all others."""
    ids = logits.topk(k, -1).indices
    return ids, log_probabilities(logits, temperature, ids).clamp(min=LOWEST)
