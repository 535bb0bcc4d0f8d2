"""Read text: plain files, JSON lines with a ``text`` or a ``messages`` field, compressed or not, and data sets of a hub.

Files may be damaged, or made to hurt, and larger than the memory: they are read piece by piece, as far as is asked for.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from tenfold.evaluation.chat_template import write_conversation

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
HUB = "hf://datasets/"
PIECE = 2**18  # characters, far more than a window needs; a tokenizer takes hundreds of bytes for each
CUTS = [
    re.compile(words) for words in (r"\n(?= ?\S)", r"\S(?= \S)")
]  # where tokenizers don't join what is on both sides
LINE = 2**26  # characters of a line, or of a file that is one JSON value
EXPANSION, SMALL = 200, 2**26  # a compressed file may expand by that, and to so many bytes in any case


class Row(BaseModel):
    """A row of a data set: a document, or a conversation."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None


class Continued(str):
    """A piece of a document that goes on in the next one."""


def check_tokenizer(tokenizer) -> None:
    """Raise ValueError if a model has no tokenizer to read text with."""
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; copy tokenizer.json and tokenizer_config.json there")


def list_files(files: str | Path | Iterable[str | Path]) -> list[str | Path]:
    """Return ``files`` as a list; one path is a list of one."""
    return [files] if isinstance(files, str | Path) else list(files)


def documents(files: str | Path | Iterable[str | Path], tokenizer=None) -> Iterator[str]:
    """Yield the documents of ``files`` in order, without empty ones; a long one comes in pieces, all but the last ``Continued``.

    ``.jsonl``, ``.ndjson`` and ``.json`` hold a document in every row, any other file is one document.

    Args:
        files: paths, or data sets of a hub, ``hf://datasets/OWNER/NAME[/CONFIGURATION]``, whose split ``train`` is read.
        tokenizer: its chat template turns ``{"messages": [{"role": .., "content": ..}, ..]}`` into text.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row has no text, or a file is not UTF-8, damaged, or expands as no text does.
        ImportError: a data set of a hub is named and the library ``datasets`` is not installed.
    """
    for file in list_files(files):
        if str(file).startswith(HUB):
            for number, row in enumerate(_stream_rows(str(file)), 1):
                yield from _split(io.StringIO(_extract_text(row, f"{file}, row {number},", tokenizer)))
        else:
            yield from _read_file(Path(file), tokenizer)


def _read_file(file: Path, tokenizer) -> Iterator[str]:
    *_, kind, packed = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    if packed not in OPENERS:
        kind, packed = packed, ""
    read = {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json}.get(kind)
    try:
        with OPENERS.get(packed, open)(file, "rt", encoding="utf-8-sig", errors="surrogateescape") as stream:
            checked = _Checked(stream, file, bool(packed))
            if read is None:
                yield from _split(checked)
                return
            for row, where in read(checked):
                yield from _split(io.StringIO(_extract_text(row, f"{file}, {where},", tokenizer)))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {file}; check the path (now in {Path.cwd()})") from None
    except IsADirectoryError:
        raise ValueError(
            f"{file} is a folder and no text; give files of text, for tokens those that they were made of"
        ) from None
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as reason:
        raise ValueError(f"{file} is cut off, or not what {file.suffix} says ({reason}); copy it again") from None


class _Checked:
    """Stream of a file of text that raises ValueError at what is not UTF-8, and at a bomb."""

    def __init__(self, stream, file: Path, packed: bool):
        self.stream, self.file, self.line = stream, file, 1
        self.most = max(SMALL, EXPANSION * file.stat().st_size) if packed else None

    def read(self, size: int) -> str:
        return self._check(self.stream.read(size))

    def readline(self) -> str:
        line = self._check(self.stream.readline(LINE))
        if len(line) == LINE:
            raise ValueError(f"{self.file}, line {self.line}, has {LINE:,} characters and more; cut it into several")
        return line

    def _check(self, text: str) -> str:
        if self.most is not None and self.stream.buffer.tell() > self.most:
            raise ValueError(
                f"{self.file} expands to more than {EXPANSION} times its size, as no text does; give it unpacked if it is one"
            )
        try:
            text.encode()
        except UnicodeEncodeError as reason:  # what could not be decoded
            line = self.line + text.count("\n", 0, reason.start)
            raise ValueError(
                f"{self.file}, line {line}, is not UTF-8 text; convert it, for instance with iconv"
            ) from None
        self.line += text.count("\n")
        return text


def _read_lines(stream: _Checked) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(iter(stream.readline, ""), 1):
        if line := line.strip("\ufeff \t\r\n"):
            yield line, f"line {number}"


def _read_json(stream: _Checked) -> Iterator[tuple[Any, str]]:
    """Yield the rows of a list, or JSON lines, which go under the same name."""
    text = stream.read(LINE)
    if len(text) == LINE:
        raise ValueError(f"{stream.file} is JSON of {LINE:,} characters and more; write it as JSON lines (.jsonl)")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if value is None:
        yield from ((line, f"line {number}") for number, line in enumerate(io.StringIO(text), 1) if line.strip())
    else:
        yield from ((row, f"row {k}") for k, row in enumerate(value if isinstance(value, list) else [value], 1))


def _extract_text(row: Any, where: str, tokenizer) -> str:
    try:
        found = Row.model_validate_json(row) if isinstance(row, str) else Row.model_validate(row)
    except ValidationError as reason:
        error = reason.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, error["loc"]))
        raise ValueError(
            f'{where} is not a JSON object with a "text" or a "messages" field ({place and place + ": "}{error["msg"]})'
        ) from None
    if found.text is None and found.messages is None:
        raise ValueError(f'{where} is not a JSON object with a "text" or a "messages" field')
    text = write_conversation(found.messages or [], tokenizer, where) if found.text is None else found.text
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a character (a lone surrogate); leave it out") from None
    return text


def _split(stream) -> Iterator[str]:
    """Yield a document in pieces, none where it is empty."""
    held, begun = stream.read(2 * PIECE), False
    while len(held) == 2 * PIECE:
        found = next((found for cut in CUTS if (found := cut.search(held, PIECE))), None)
        end = found.end() if found else 2 * PIECE
        if begun := begun or not held[:end].isspace():
            yield Continued(held[:end])
        held = held[end:] + stream.read(end)
    if begun or held.strip():
        yield held


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


def token_parts(texts: Iterable[str], tokenizer) -> Iterator[np.ndarray]:
    """Yield the tokens of one document, or piece of one, after another, each document followed by the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for group in _group(texts):
        rows = tokenizer(list(map(str, group)), add_special_tokens=False, verbose=False)["input_ids"]
        for text, ids in zip(group, rows, strict=True):
            yield np.asarray(ids if isinstance(text, Continued) else ids + end, dtype=np.int32)


def _group(texts: Iterable[str], most: int = 256) -> Iterator[list[str]]:
    """Yield lists of texts that are read and tokenised at once: many short ones, or a long one."""
    group, size = [], 0
    for text in texts:
        group, size = [*group, text], size + len(text)
        if len(group) == most or size >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group
