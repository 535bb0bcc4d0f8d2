"""Reading text: plain files, JSON lines with a ``text`` field, and either of them packed with xz or gzip."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

OPENERS = {".xz": lzma.open, ".gz": gzip.open}


def documents(files: Iterable[str | Path]) -> Iterator[str]:
    """The documents of ``files`` in order: one a line for ``.jsonl``, one a file otherwise.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a JSON line has no ``text``, or a file is not UTF-8.
    """
    for file in map(Path, files):
        suffixes = file.suffixes
        opener = OPENERS.get(file.suffix, open)
        try:
            with opener(file, "rt", encoding="utf-8") as stream:
                if ".jsonl" in suffixes:
                    yield from (_text(line, file, number) for number, line in enumerate(stream, 1) if line.strip())
                else:
                    yield stream.read()
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {file}; check the path (now in {Path.cwd()})") from None
        except UnicodeDecodeError as reason:
            raise ValueError(f"{file} is not UTF-8 text ({reason}); convert it, for instance with iconv") from None


def _text(line: str, file: Path, number: int) -> str:
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{file}, line {number}, is not a JSON object with a "text" field') from None


def token_stream(texts: Iterable[str], tokenizer, limit: int | None = None, batch: int = 256) -> np.ndarray:
    """The token numbers of ``texts``, each document followed by the end-of-text token; at most ``limit`` tokens."""
    parts, total, pending = [], 0, []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def flush() -> int:
        encoded = tokenizer(pending, add_special_tokens=False, verbose=False)["input_ids"]
        parts.extend(np.asarray(ids + end, dtype=np.int32) for ids in encoded)
        pending.clear()
        return sum(len(part) for part in parts[-len(encoded) :])

    for text in texts:
        pending.append(text)
        if len(pending) == batch:
            total += flush()
            if limit is not None and total >= limit:
                break
    if pending:
        flush()
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return stream if limit is None else stream[:limit]
