"""A teacher's predictions on a text, computed once: the likeliest tokens of every position, in half precision.

A cache is a folder with ``ids.npy (windows, window, k)``, ``log_probabilities.npy (windows, window, k + 1)``, whose last class
is all other tokens together, and ``store.json``, its manifest. It takes ``2 (k + 1) + 4 k`` bytes a token, ``2 (k + 1) + 2 k``
if the vocabulary has at most 65,536 entries. An unfinished one is in ``FOLDER.partial``.
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

MANIFEST, PROGRESS = "store.json", "progress.json"
ARRAYS = ("ids", "log_probabilities")
WAY_OUT = "give another folder, or delete it"
LOWEST = -60000.0  # close to the lowest number of half precision


def make_manifest(
    teacher: str, tokenizer, tokens: np.ndarray, window: int, temperature: float, k: int, vocabulary: int
) -> dict[str, Any]:
    """Return what decides the contents of a cache; ``teacher`` is the fingerprint of its weights.

    Raises:
        ValueError: there are not ``k`` tokens.
    """
    if not 1 <= k <= vocabulary:
        raise ValueError(f"the {k} likeliest tokens can't be stored: take from 1 to the vocabulary's {vocabulary:,}")
    return {
        "teacher": teacher,
        "tokenizer": tokenizer_fingerprint(tokenizer)[:16],
        "text": hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int32)).hexdigest()[:16],
        "window": window,
        "temperature": temperature,
        "top_k": k,
        "vocabulary": vocabulary,
    }


def is_finished(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether ``folder`` has this very cache; False if it is empty or missing.

    Raises:
        ValueError: it has another cache.
        FileExistsError: it has something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} is there and is no store of a teacher's answers; give another folder")
    check_same(read_json(folder / MANIFEST), manifest, f"the store {folder} was made from something else", WAY_OUT)
    return True


class TeacherCache:
    """A finished cache, memory-mapped."""

    def __init__(self, folder: Path):
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        dtypes = {"ids": np.int64, "log_probabilities": np.float32}
        return {name: torch.from_numpy(array[index].astype(dtypes[name])) for name, array in self.arrays.items()}


class DatasetWithTeacher(torch.utils.data.Dataset):
    """Windows of text with the teacher's predictions on them."""

    def __init__(self, windows: torch.utils.data.Dataset, cache: TeacherCache):
        self.windows, self.cache = windows, cache

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.windows[index] | self.cache[index]


@torch.no_grad()
def write_cache(
    folder: Path,
    manifest: dict[str, Any],
    teacher: ChunkedHead,
    windows: torch.utils.data.Dataset,
    batch: int,
    chunk: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Predict all ``windows`` and write the cache, resuming after the last batch that an interrupted call wrote.

    Raises:
        ValueError: an unfinished cache of something else is there.
        FileExistsError: something else is there.
        OSError: there is no room on the disk.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    arrays, done = _open_arrays(partial, manifest, len(windows))
    device, k = next(teacher.model.parameters()).device, manifest["top_k"]
    for begin in progress(range(done, len(windows), batch)):
        end = min(begin + batch, len(windows))
        ids = torch.stack([windows[index]["input_ids"] for index in range(begin, end)]).to(device)
        if begin == done:
            teacher.verify(ids, chunk)
        states = teacher.compute_states(input_ids=ids)[0].flatten(0, 1)
        parts = [_top_k(teacher.compute_logits(part), manifest["temperature"], k) for part in states.split(chunk)]
        for array, values in zip(arrays, zip(*parts, strict=True), strict=True):
            array[begin:end] = torch.cat(values).unflatten(0, ids.shape).cpu().numpy()
            array.flush()
        write_json(partial / PROGRESS, manifest | {"windows": end})
    del arrays
    (partial / PROGRESS).unlink()
    write_json(partial / MANIFEST, manifest)
    if folder.exists():
        folder.rmdir()  # is_finished has checked that it is empty
    partial.rename(folder)


def _top_k(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` likeliest tokens ``(n, k)``, and the log-probabilities ``(n, k + 1)`` of them and of all others."""
    ids = logits.topk(k, -1).indices
    return ids, log_probabilities(logits, temperature, ids).clamp(min=LOWEST)


def _open_arrays(partial: Path, manifest: dict[str, Any], windows: int) -> tuple[list[np.memmap], int]:
    """Return the arrays to write to, and how many windows they have already."""
    state = partial / PROGRESS
    if state.is_file():
        before = read_json(state)
        done = before.pop("windows")
        check_same(before, manifest, f"{partial} is an unfinished store of something else", WAY_OUT)
        if done:
            return [open_memmap(partial / f"{name}.npy", mode="r+") for name in ARRAYS], done
    elif partial.exists() and any(partial.iterdir()):
        raise FileExistsError(f"{partial} is there and is no unfinished store; {WAY_OUT}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(state, manifest | {"windows": 0})
    k, vocabulary, window = manifest["top_k"], manifest["vocabulary"], manifest["window"]
    dtypes = {"ids": np.uint16 if vocabulary <= 2**16 else np.int32, "log_probabilities": np.float16}
    shapes = {"ids": (windows, window, k), "log_probabilities": (windows, window, k + (k < vocabulary))}
    needed = sum(np.prod(shapes[name]) * np.dtype(dtypes[name]).itemsize for name in ARRAYS)
    free = shutil.disk_usage(partial).free
    if needed > free:
        shutil.rmtree(partial)
        raise OSError(
            f"the store needs {needed / 1e9:.1f} GB and {partial.parent} has {free / 1e9:.1f} GB left: lower top_k from {k}, "
            "take less text, or another disk"
        )
    files = {name: partial / f"{name}.npy" for name in ARRAYS}
    return [open_memmap(files[name], mode="w+", dtype=dtypes[name], shape=shapes[name]) for name in ARRAYS], 0
