"""A corpus as numbers: memory-mapped shards of tokens in a folder, with the tokenizer that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tenfold.evaluate.text_files import documents, token_parts
from tenfold.models.atomic_io import disk_full_errors, read_json, write_json
from tenfold.models.auto import load_tokenizer

SHARD = 2**26  # tokens in one file
ANEW = "or delete the folder and give the text"  # a way out of whatever is wrong with one


class Tokens:
    """The tokens of a folder that :func:`write_tokens` made, one after another; a slice reads only what it needs."""

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder, self.about = folder, _about(folder)
        self.shards = [_opened(folder / name) for name in self.about["shards"]]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.length = min(int(self.ends[-1]), limit or int(self.ends[-1]))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, end, _ = where.indices(self.length)
        parts, first = [], 0
        for shard, last in zip(self.shards, self.ends, strict=True):
            if first < end and last > begin:
                parts.append(shard[max(begin - first, 0) : end - first])
            first = int(last)
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def tokenizer(self):
        """The tokenizer that made them.

        Raises:
            ValueError: it is not there, or another one is.
        """
        found = load_tokenizer(self.folder)
        if found is None:
            raise ValueError(
                f"{self.folder} has no tokenizer beside its tokens; copy tokenizer.json and tokenizer_config.json there, {ANEW}"
            )
        if fingerprint(found) != self.about["tokenizer"]:
            raise ValueError(
                f"{self.folder} has another tokenizer than the one that made its tokens; restore tokenizer.json, {ANEW}"
            )
        return found

    def check(self, size: int) -> None:
        """Raise ValueError for a token beyond a vocabulary of ``size``: all of them are looked at."""
        for name, shard in zip(self.about["shards"], self.shards, strict=True):
            largest = int(shard.view(f"u{shard.itemsize}").max(initial=0))  # negative ones are large, too
            if largest >= size:
                raise ValueError(
                    f"{self.folder / name} holds token {largest:,} of a vocabulary of {size:,}; copy it again, {ANEW}"
                )


def _opened(shard: Path) -> np.ndarray:
    try:
        return np.load(shard, mmap_mode="r")
    except (OSError, ValueError, EOFError) as reason:
        raise ValueError(f"{shard} is missing or cut off ({reason}); copy it again, {ANEW}") from None


def is_tokens(path: str | Path) -> bool:
    """Whether ``path`` is a folder that :func:`write_tokens` finished."""
    return (Path(path) / "tokens.json").is_file()


def write_tokens(folder: Path, data: Sequence[str | Path], tokenizer, limit: int | None = None) -> Tokens:
    """The first ``limit`` tokens of ``data``, every document followed by the end-of-text token; kept if they are there.

    Raises:
        ValueError: the text has no tokens, or the folder holds those of other text or of another tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"tokenizer": fingerprint(tokenizer), "data": [_named(file) for file in data], "limit": limit}
    if is_tokens(folder):
        about = _about(folder)
        if other := [key for key, value in wanted.items() if about[key] != value]:
            raise ValueError(
                f"{folder} holds the tokens of another run: other {', '.join(other)}; give another folder, or delete this one"
            )
        return Tokens(folder)
    names, total, digest = [], 0, hashlib.sha256()
    with disk_full_errors(folder):
        for shard in _shards(token_parts(documents(data, tokenizer), tokenizer), limit):
            names.append(f"tokens-{len(names):05d}.npy")
            shard = shard.astype(np.uint16 if len(tokenizer) <= 2**16 else np.int32)
            np.save(folder / names[-1], shard)
            total += len(shard)
            digest.update(shard)
        if not total:
            raise ValueError(f"there are no documents in {', '.join(map(str, data))}; give text")
        tokenizer.save_pretrained(folder)
    write_json(folder / "tokens.json", wanted | {"tokens": total, "digest": digest.hexdigest(), "shards": names})
    return Tokens(folder)


def _shards(parts: Iterable[np.ndarray], limit: int | None) -> Iterable[np.ndarray]:
    pending, size, left = [], 0, limit
    for part in parts:
        part = part if left is None else part[:left]
        left = None if left is None else left - len(part)
        pending.append(part)
        size += len(part)
        if size >= SHARD:
            yield np.concatenate(pending)
            pending, size = [], 0
        if left == 0:
            break
    if size:
        yield np.concatenate(pending)


def fingerprint(tokenizer) -> str:
    """Of the vocabulary, the merges and how text is cut, not of the settings beside them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        stated = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        stated = json.dumps({key: value for key, value in json.loads(backend.to_str()).items() if key in _CUTS})
    return hashlib.sha256(stated.encode()).hexdigest()


def alike(one, other) -> bool:
    """Whether two tokenizers give every text the same numbers, whichever of their tokens are special."""
    if one.get_vocab() != other.get_vocab():
        return False
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other)]
    if None in backends:
        return backends == [None, None]
    read = [json.loads(backend.to_str()) for backend in backends]
    return all(read[0].get(key) == read[1].get(key) for key in _CUTS if key != "added_tokens")


_CUTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


def _named(file: str | Path) -> list:
    path = Path(file)
    return [path.name, path.stat().st_size] if path.is_file() else [str(file), None]


def _about(folder: Path) -> dict:
    return read_json(folder / "tokens.json")
