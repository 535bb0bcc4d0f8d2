"""What a teacher predicts on a text, computed once: the likeliest tokens of every position, in half precision.

A store is a folder with ``ids.npy (windows, window, k)``, ``log_probabilities.npy (windows, window, k + 1)``, whose last class is
all other tokens together, and ``store.json``, which says what they were made from. It takes ``2 (k + 1) + 4 k`` bytes a token,
``2 (k + 1) + 2 k`` where the vocabulary has at most 65,536 entries. While it is written it lies in ``FOLDER.partial``.
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
from tenfold.train.tokens import fingerprint

STORE, PROGRESS = "store.json", "progress.json"
ARRAYS = ("ids", "log_probabilities")
AWAY = "give another folder, or delete it"
LOWEST = -60000.0  # nearly the least number of half precision


def origin(
    teacher: str, tokenizer, tokens: np.ndarray, window: int, temperature: float, k: int, vocabulary: int
) -> dict[str, Any]:
    """What a store is made from; ``teacher`` is the fingerprint of its weights.

    Raises:
        ValueError: there are not ``k`` tokens.
    """
    if not 1 <= k <= vocabulary:
        raise ValueError(f"the {k} likeliest tokens can't be stored: take from 1 to the vocabulary's {vocabulary:,}")
    return {
        "teacher": teacher,
        "tokenizer": fingerprint(tokenizer)[:16],
        "text": hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int32)).hexdigest()[:16],
        "window": window,
        "temperature": temperature,
        "top_k": k,
        "vocabulary": vocabulary,
    }


def is_finished(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether ``folder`` holds this very store; False where there is none.

    Raises:
        ValueError: it holds another one.
        FileExistsError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / STORE).is_file():
        raise FileExistsError(f"{folder} is there and is no store of a teacher's answers; give another folder")
    there = read_json(folder / STORE)
    if there != made_from:
        raise ValueError(f"the store {folder} was made from something else: {told(there, made_from)}; {AWAY}")
    return True


def told(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs."""
    keys = [*here, *(key for key in there if key not in here)]
    apart = [key for key in keys if there.get(key) != here.get(key)]
    return "; ".join(f"{key} is {there.get(key)} there and {here.get(key)} here" for key in apart)


class TeacherCache:
    """A finished store, read from disk as it is asked for."""

    def __init__(self, folder: Path):
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        kinds = {"ids": np.int64, "log_probabilities": np.float32}
        return {name: torch.from_numpy(array[index].astype(kinds[name])) for name, array in self.arrays.items()}


class DatasetWithTeacher(torch.utils.data.Dataset):
    """Windows of text, each with what the teacher predicts on it."""

    def __init__(self, windows: torch.utils.data.Dataset, store: TeacherCache):
        self.windows, self.store = windows, store

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.windows[index] | self.store[index]


@torch.no_grad()
def write_store(
    folder: Path,
    made_from: dict[str, Any],
    teacher: ChunkedHead,
    windows: torch.utils.data.Dataset,
    batch: int,
    chunk: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Answer all ``windows``; what an interrupted call has written is kept, and the same call goes on behind it.

    Raises:
        OSError: there is no room on the disk.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    arrays, done = _open(partial, made_from, len(windows))
    device, k = next(teacher.model.parameters()).device, made_from["top_k"]
    for begin in progress(range(done, len(windows), batch)):
        end = min(begin + batch, len(windows))
        ids = torch.stack([windows[index]["input_ids"] for index in range(begin, end)]).to(device)
        if begin == done:
            teacher.check(ids, chunk)
        states = teacher.run(input_ids=ids)[0].flatten(0, 1)
        parts = [answers(teacher.logits(part), made_from["temperature"], k) for part in states.split(chunk)]
        for array, values in zip(arrays, zip(*parts, strict=True), strict=True):
            array[begin:end] = torch.cat(values).unflatten(0, ids.shape).cpu().numpy()
            array.flush()
        write_json(partial / PROGRESS, made_from | {"windows": end})
    del arrays
    (partial / PROGRESS).unlink()
    write_json(partial / STORE, made_from)
    if folder.exists():
        folder.rmdir()  # is_finished has seen that it is empty
    partial.rename(folder)


def answers(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` likeliest tokens ``(n, k)``, and the log-probabilities ``(n, k + 1)`` of these and of all others together."""
    ids = logits.topk(k, -1).indices
    return ids, log_probabilities(logits, temperature, ids).clamp(min=LOWEST)


def _open(partial: Path, made_from: dict[str, Any], windows: int) -> tuple[list[np.memmap], int]:
    """The arrays to write into, and how many windows are there: 0, unless they are of the same origin."""
    state = partial / PROGRESS
    if state.is_file():
        there = read_json(state)
        done = there.pop("windows")
        if there == made_from and done:
            return [open_memmap(partial / f"{name}.npy", mode="r+") for name in ARRAYS], done
        if there != made_from:
            raise FileExistsError(
                f"{partial} is an unfinished store of something else ({told(there, made_from)}); {AWAY}"
            )
    elif partial.exists() and any(partial.iterdir()):
        raise FileExistsError(f"{partial} is there and is no unfinished store; {AWAY}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(state, made_from | {"windows": 0})
    k, vocabulary = made_from["top_k"], made_from["vocabulary"]
    kinds = {"ids": np.uint16 if vocabulary <= 2**16 else np.int32, "log_probabilities": np.float16}
    shape = {"ids": k, "log_probabilities": k + (k < vocabulary)}
    needed = sum(windows * made_from["window"] * shape[name] * np.dtype(kinds[name]).itemsize for name in ARRAYS)
    free = shutil.disk_usage(partial).free
    if needed > free:
        shutil.rmtree(partial)
        raise OSError(
            f"the store needs {needed / 1e9:.1f} GB and {partial.parent} has {free / 1e9:.1f} GB left: lower top_k from {k}, "
            "take less text, or another disk"
        )
    return [
        open_memmap(
            partial / f"{name}.npy", mode="w+", dtype=kinds[name], shape=(windows, made_from["window"], shape[name])
        )
        for name in ARRAYS
    ], 0
