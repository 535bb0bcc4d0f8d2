"""Read text: plain files, JSON lines with a ``text`` or a ``messages`` field, compressed or not, and data sets of a hub."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
from jinja2 import TemplateError

OPENERS = {".xz": lzma.open, ".gz": gzip.open}
HUB = "hf://datasets/"


def check_tokenizer(tokenizer) -> None:
    """Raise ValueError if a model has no tokenizer to read text with."""
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; copy tokenizer.json and tokenizer_config.json there")


def documents(files: Iterable[str | Path], tokenizer=None) -> Iterator[str]:
    """Yield the documents of ``files`` in order: one per line for ``.jsonl``, one per file otherwise.

    Args:
        files: paths, or data sets of a hub, ``hf://datasets/OWNER/NAME[/CONFIGURATION]``, whose split ``train`` is read.
        tokenizer: its chat template turns ``{"messages": [{"role": .., "content": ..}, ..]}`` into text.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a JSON line has no text, or a file is not UTF-8.
        ImportError: a data set of a hub is named and the library ``datasets`` is not installed.
    """
    for file in files:
        if str(file).startswith(HUB):
            yield from (
                _extract_text(row, f"{file}, row {number}", tokenizer)
                for number, row in enumerate(_stream_rows(str(file)), 1)
            )
        else:
            yield from _read_file(Path(file), tokenizer)


def _read_file(file: Path, tokenizer) -> Iterator[str]:
    opener = OPENERS.get(file.suffix, open)
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            if ".jsonl" not in file.suffixes:
                if (text := stream.read()).strip():
                    yield text
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _extract_text(line, f"{file}, line {number},", tokenizer)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {file}; check the path (now in {Path.cwd()})") from None
    except IsADirectoryError:
        raise ValueError(
            f"{file} is a folder and no text; give files of text, for tokens those that they were made of"
        ) from None
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as reason:
        raise ValueError(f"{file} is cut off, or not what {file.suffix} says ({reason}); copy it again") from None
    except UnicodeDecodeError as reason:
        raise ValueError(f"{file} is not UTF-8 text ({reason}); convert it, for instance with iconv") from None


def _extract_text(row, where: str, tokenizer) -> str:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError:
            row = None
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError(f'{where} is not a JSON object with a "text" or a "messages" field')
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} holds messages, but there is no tokenizer with a chat template to write them out; give text"
        )
    try:
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    except (TemplateError, TypeError, KeyError, AttributeError) as reason:
        raise ValueError(f"{where} holds messages that the chat template refuses ({reason})") from None


def _stream_rows(name: str) -> Iterable[dict]:
    """Stream the rows of a data set of a hub."""
    parts = name.removeprefix(HUB).strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{name} names no data set; write {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIGURATION")
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError:
        raise ImportError(f"reading {name} needs the library datasets: pip install 'tenfold[hub]'") from None
    return load_dataset("/".join(parts[:2]), *parts[2:], split="train", streaming=True)


def token_stream(texts: Iterable[str], tokenizer, limit: int | None = None) -> np.ndarray:
    """Return the tokens of ``texts`` as one sequence of at most ``limit``, each document followed by the end-of-text token."""
    parts, total = [], 0
    for part in token_parts(texts, tokenizer):
        parts.append(part)
        total += len(part)
        if limit is not None and total >= limit:
            break
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return stream if limit is None else stream[:limit]


def token_parts(texts: Iterable[str], tokenizer, batch: int = 256) -> Iterator[np.ndarray]:
    """Yield the tokens of one document after another, each followed by the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = iter(texts)
    while group := list(islice(texts, batch)):
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            yield np.asarray(ids + end, dtype=np.int32)
