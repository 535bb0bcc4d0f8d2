"""Files that appear whole or not at all, and errors of full disks and damaged files in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# the last files of a run, which mark it as finished
REPORTS = ("finetune.json", "training.json")
# files of a model folder beside its safetensors, one by one, since other files there belong to the user
MODEL_FILES = (
    "pytorch_model*", "training_args.bin", "adapter_model*", "adapter_config.json", "generation_config.json",
    "chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", *REPORTS, "run.json", "tenfold.json",
)  # fmt: skip
# what torch.save, depending on the size of the file, and tokenizers say on a full disk
DISK_FULL = ("inline_container", "PytorchStreamWriter", "iostream error", "os error 28")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(path)


def read_json(path: Path) -> Any:
    """Read what ``write_json`` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as reason:
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
def atomic_directory(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder whose contents become the model in ``folder`` once all are written; other files there stay.

    Raises:
        OSError: there is no room, or no right to write there; ``folder`` is as it was.
    """
    target = Path(folder).absolute()
    new = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with disk_full_errors(folder):
            yield new
        if not target.exists():
            new.rename(target)
            return
        for old in filter(_is_model_file, list(target.iterdir())):
            old.unlink()
        for file in sorted(new.iterdir(), key=lambda file: (file.name in REPORTS, _is_weights(file))):
            file.replace(target / file.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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
    return _is_weights(file) or any(file.match(pattern) for pattern in MODEL_FILES)


def file_stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Return name, bytes and modification time of every file, which differ once a file changes."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _is_weights(file: Path) -> bool:
    return file.name.endswith((".safetensors", ".safetensors.index.json"))
