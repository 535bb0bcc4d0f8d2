"""Files that appear whole or not at all, and errors of full disks and damaged files in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

# the last files of a run, which mark it as finished
REPORTS = ("finetune.json", "training.json")
RUN = ".tenfold-run"  # in a result: a digest of the run that wrote it
OWN = ".tenfold."  # begins the names of what is in an output only while a run writes it
# files of a model folder beside its safetensors, one by one, since other files there belong to the user
MODEL_FILES = (
    "pytorch_model*", "training_args.bin", "adapter_model*", "adapter_config.json", "generation_config.json",
    "chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", *REPORTS, "run.json", "tenfold.json", RUN,
)  # fmt: skip
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# what torch.save, depending on the size of the file, and tokenizers say on a full disk
DISK_FULL = ("inline_container", "PytorchStreamWriter", "iostream error", "os error 28")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` whole or not at all."""
    new = path.with_name(f"{OWN}{path.name}")
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(path)


def read_json(path: Path, kind: Any = Any) -> Any:
    """Read what ``write_json`` wrote, and check that it is a ``kind``, a type that pydantic knows.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_text()))
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"{path} is damaged ({reason}); restore it, or delete what it belongs to") from None


@contextmanager
def disk_full_errors(where: str | Path) -> Iterator[None]:
    """Turn the errors that each library raises on a full disk into one OSError."""
    try:
        yield
    except Exception as reason:
        if isinstance(reason, SafetensorError) and "deserializing" in str(reason):
            raise ValueError(f"{where} has a file that is cut off ({reason}); delete what it belongs to") from None
        full = isinstance(reason, OSError) and reason.errno == ENOSPC
        if full or isinstance(reason, SafetensorError) or any(words in str(reason) for words in DISK_FULL):
            raise OSError(f"{where} can't be written ({reason}); make room, and repeat the command") from None
        raise


@contextmanager
def atomic_directory(folder: str | Path, run: str = "") -> Iterator[Path]:
    """Yield an empty folder whose contents become the model in ``folder`` once all are written; other files there stay.

    Args:
        run: digest of the run that writes it, by which the same run knows its result.

    Raises:
        OSError: there is no room, or no right to write there; ``folder`` is as it was.
    """
    recover(folder)
    begun = near(folder, "unfinished")
    shutil.rmtree(begun, ignore_errors=True)
    try:
        with disk_full_errors(folder):
            begun.mkdir(parents=True)
            yield begun
            if run:
                (begun / RUN).write_text(run)
            begun.rename(near(folder, "new"))  # complete from here on, whatever happens
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    recover(folder)


def near(folder: str | Path, what: str) -> Path:
    """Return the path of ``what`` beside the output ``folder``, or in it where that can't be renamed."""
    target = Path(folder).resolve()
    if _is_fixed(target):
        return target / f"{OWN}{what}"
    return target.with_name(f"{target.name}.{what}" if what == "partial" else f".{target.name}{OWN}{what}")


def _is_fixed(folder: Path) -> bool:
    """Tell whether ``folder`` is a mount point, holds the working folder, or is in a folder that is read-only."""
    mounts = Path("/proc/self/mountinfo")  # Path.is_mount overlooks folders mounted from the same file system
    listed = mounts.read_text().splitlines() if mounts.is_file() else []
    mounted = any(line.split()[4].replace("\\040", " ") == str(folder) for line in listed)
    inside = mounted or folder.is_mount() or Path.cwd().is_relative_to(folder)
    return inside or (folder.is_dir() and not os.access(folder.parent, os.W_OK))


def recover(folder: str | Path) -> None:
    """Publish a complete result of ``folder``, from where another process may have been killed at it.

    The old folder is renamed aside and the new one takes its place; then the user's files move there, one by one, and what is
    left of the old model is deleted. A folder that can't be renamed loses its old model and gets the new one file by file.
    """
    target = Path(folder).resolve()
    new, moving, old = (near(target, what) for what in ("new", "moving", "old"))
    if new.exists() and _is_fixed(target):
        for file in filter(_is_model_file, list(target.iterdir())):
            file.unlink()
        new.rename(moving)
    elif new.exists():
        if target.exists():
            shutil.copymode(target, new)
            target.rename(old)
        new.rename(target)
    if moving.exists():
        move_files(moving, target)
    if old.exists():
        for file in filter(_is_model_file, list(old.iterdir())):
            file.unlink()
        target.mkdir(exist_ok=True)
        move_files(old, target, replace=False)


def move_files(source: Path, target: Path, replace: bool = True) -> None:
    """Move all files of ``source`` to ``target``, weights last, and delete it; files there are replaced, or stay."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: (file.name in REPORTS, _is_weights(file))):
        there = target / file.name
        if file.is_dir() and not file.is_symlink() and there.is_dir():
            move_files(file, there, replace)
        elif replace or not os.path.lexists(there):
            file.replace(there)
        elif file.is_dir() or there.is_dir():  # the user's, where the new model has something else of this name
            file.rename(there.with_name(f"{there.name}.old"))
        else:
            file.unlink()
    source.rmdir()


@contextmanager
def open_safetensors(file: str | Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ValueError: it is cut off, or none.
    """
    try:
        with safe_open(file, "pt") as stored:
            yield stored
    except SafetensorError as reason:
        raise ValueError(f"{file} is no whole file of safetensors ({reason}); copy it again") from None


def _is_model_file(file: Path) -> bool:
    """Tell whether ``file`` belongs to a model folder, so that it must not stay beside another model."""
    return not file.is_dir() and any(file.match(pattern) for pattern in (*WEIGHTS, *MODEL_FILES))


def file_hashes(folder: Path) -> dict[str, str]:
    """Return ``{path in folder: sha256}`` of all files in ``folder``."""
    return {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def file_hash(file: Path) -> str:
    """Return the sha256 of ``file``."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Return name, bytes and modification time of every file, which differ once a file changes."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _is_weights(file: Path) -> bool:
    return any(file.match(pattern) for pattern in WEIGHTS)
