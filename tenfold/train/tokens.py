"""A tokenized corpus: memory-mapped shards of tokens in a folder, with the tokenizer that produced them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tenfold.evaluation.text_files import documents, token_parts
from tenfold.models.atomic_io import disk_full_errors, read_json, write_json
from tenfold.models.auto import load_tokenizer
from tenfold.train.run_manifest import check_same

SHARD = 2**26  # tokens in one file
REMEDY = "or delete the folder and give the text"
TOKENIZATION = (
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "model",
)  # parts of tokenizer.json that decide the tokens


class Tokens:
    """The tokens in a folder that ``write_tokens`` made, as one sequence; a slice reads only what it needs."""

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder, self.manifest = folder, read_json(folder / "tokens.json")
        self.shards = [_open_shard(folder / name) for name in self.manifest["shards"]]
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
        """Load the tokenizer that produced the tokens.

        Raises:
            ValueError: it is missing, or was replaced by another one.
        """
        found = load_tokenizer(self.folder)
        if found is None:
            raise ValueError(
                f"{self.folder} has no tokenizer beside its tokens; copy tokenizer.json and tokenizer_config.json there, {REMEDY}"
            )
        if tokenizer_fingerprint(found) != self.manifest["tokenizer"]:
            raise ValueError(
                f"{self.folder} has another tokenizer than the one that produced its tokens; restore tokenizer.json, {REMEDY}"
            )
        return found

    def check(self, size: int) -> None:
        """Raise ValueError if any token is outside of a vocabulary of ``size``."""
        for name, shard in zip(self.manifest["shards"], self.shards, strict=True):
            largest = int(shard.view(f"u{shard.itemsize}").max(initial=0))  # negative ones become large
            if largest >= size:
                raise ValueError(
                    f"{self.folder / name} holds token {largest:,} of a vocabulary of {size:,}; copy it again, {REMEDY}"
                )


def _open_shard(shard: Path) -> np.ndarray:
    try:
        return np.load(shard, mmap_mode="r")
    except (OSError, ValueError, EOFError) as reason:
        raise ValueError(f"{shard} is missing or cut off ({reason}); copy it again, {REMEDY}") from None


def is_tokens(path: str | Path) -> bool:
    """Return whether ``path`` is a folder that ``write_tokens`` finished."""
    return (Path(path) / "tokens.json").is_file()


def write_tokens(folder: Path, data: Sequence[str | Path], tokenizer, limit: int | None = None) -> Tokens:
    """Write the first ``limit`` tokens of ``data``, each document followed by the end-of-text token, unless they are there.

    Raises:
        ValueError: the text has no tokens, or the folder has the tokens of other text or of another tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [[path.name, path.stat().st_size] if path.is_file() else [str(path), None] for path in map(Path, data)]
    now = {"tokenizer": tokenizer_fingerprint(tokenizer), "data": sizes, "limit": limit}
    if is_tokens(folder):
        tokens = Tokens(folder)
        before = {key: tokens.manifest[key] for key in now}
        check_same(before, now, f"{folder} holds the tokens of another run", "give another folder, or delete this one")
        return tokens
    names, total, digest = [], 0, hashlib.sha256()
    with disk_full_errors(folder):
        for shard in _split_shards(token_parts(documents(data, tokenizer), tokenizer), limit):
            names.append(f"tokens-{len(names):05d}.npy")
            shard = shard.astype(np.uint16 if len(tokenizer) <= 2**16 else np.int32)
            np.save(folder / names[-1], shard)
            total += len(shard)
            digest.update(shard)
        if not total:
            raise ValueError(f"there are no documents in {', '.join(map(str, data))}; give text")
        tokenizer.save_pretrained(folder)
    write_json(folder / "tokens.json", now | {"tokens": total, "digest": digest.hexdigest(), "shards": names})
    return Tokens(folder)


def _split_shards(parts: Iterable[np.ndarray], limit: int | None) -> Iterable[np.ndarray]:
    pending, size, left = [], 0, limit
    for part in parts:
        part = part[:left]
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


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a digest of what decides how a tokenizer splits text, without its other settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts = sorted(tokenizer.get_vocab().items())
    else:
        parts = {key: value for key, value in json.loads(backend.to_str()).items() if key in TOKENIZATION}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenize_alike(one, other) -> bool:
    """Return whether two tokenizers give every text the same tokens, whichever of them are special."""
    if one.get_vocab() != other.get_vocab():
        return False
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other)]
    if None in backends:
        return backends == [None, None]
    first, second = (json.loads(backend.to_str()) for backend in backends)
    return all(first.get(key) == second.get(key) for key in TOKENIZATION if key != "added_tokens")
