"""Files that others will read: whole, or not there at all; and those that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(path)


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as reason:
        raise ValueError(f"{path} is damaged ({reason}); restore it, or delete what it belongs to") from None


# what says that a run is finished: the last of its files
REPORTS = ("finetune.json", "training.json")
# of a model's folder, beside its weights in safetensors: named one by one, since what else is there is somebody's own
PARTS = (
    "pytorch_model*", "training_args.bin", "adapter_model*", "adapter_config.json", "generation_config.json",
    "chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", *REPORTS, "run.json", "tenfold.json",
)  # fmt: skip
# what torch.save, by the size of the file, and tokenizers say where there is no room
FULL = ("inline_container", "PytorchStreamWriter", "iostream error", "os error 28")


@contextmanager
def written(where: str | Path) -> Iterator[None]:
    """What libraries say where there is no room, each in its own way, as one OSError."""
    try:
        yield
    except Exception as reason:
        if isinstance(reason, SafetensorError) and "deserializing" in str(reason):
            raise ValueError(f"{where} has a file that is cut off ({reason}); delete what it belongs to") from None
        full = isinstance(reason, OSError) and reason.errno == ENOSPC
        if full or isinstance(reason, SafetensorError) or any(words in str(reason) for words in FULL):
            raise OSError(f"{where} can't be written ({reason}); make room, and repeat the command") from None
        raise


def is_weights(file: Path) -> bool:
    return file.name.endswith((".safetensors", ".safetensors.index.json"))


def of_model(file: Path) -> bool:
    """Whether it belongs to a model's folder, and not beside another model."""
    return is_weights(file) or any(file.match(pattern) for pattern in PARTS)


def stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Name, bytes and time of files: others have others."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder whose files go to ``folder`` once all are written; weights that were there go.

    Raises:
        OSError: there is no room, or no right to write there; ``folder`` is as it was.
    """
    target = Path(folder).absolute()
    new = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with written(folder):
            yield new
        target.mkdir(exist_ok=True)
        for old in filter(is_weights, list(target.iterdir())):
            old.unlink()
        for file in sorted(new.iterdir(), key=lambda file: (file.name in REPORTS, is_weights(file))):
            file.replace(target / file.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def opened(file: str | Path) -> Iterator[Any]:
    """A file of safetensors.

    Raises:
        ValueError: it is cut off, or none.
    """
    try:
        with safe_open(file, "pt") as stored:
            yield stored
    except SafetensorError as reason:
        raise ValueError(f"{file} is no whole file of safetensors ({reason}); copy it again") from None
