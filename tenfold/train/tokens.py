"""A tokenized corpus: a memory-mapped file of tokens in a folder, with the tokenizer that produced them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from tenfold.evaluation.text_files import documents, token_parts
from tenfold.models.atomic_io import disk_full_errors, write_json
from tenfold.models.auto import load_tokenizer
from tenfold.train.run_manifest import check_same

FILE, MANIFEST = "tokens.bin", "tokens.json"
REMEDY = "or delete the folder and give the text"
TOKENIZATION = ("normalizer", "pre_tokenizer", "model")  # parts of tokenizer.json that decide the tokens


class Manifest(BaseModel):
    """What ``tokens.json`` says: what was tokenized, and how it is stored."""

    tokenizer: str
    data: list[tuple[str, int | None]]
    limit: int | None
    tokens: Annotated[int, Field(ge=1, lt=2**48)]
    dtype: Literal["uint16", "int32"]
    digest: str


class Tokens:
    """The first ``limit`` tokens in a folder that ``write_tokens`` made, as the array ``ids``."""

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder = folder
        try:
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except ValidationError as reason:
            error = reason.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, error["loc"]))
            raise ValueError(
                f"{folder / MANIFEST} is damaged ({place} {error['msg']}); copy it again, {REMEDY}"
            ) from None
        self.manifest: dict[str, Any] = manifest.model_dump(mode="json")
        try:
            ids = np.memmap(folder / FILE, manifest.dtype, "r", shape=(manifest.tokens,))
        except (OSError, ValueError) as reason:
            raise ValueError(f"{folder / FILE} is missing or cut off ({reason}); copy it again, {REMEDY}") from None
        self.ids: np.ndarray = ids[:limit]

    def tokenizer(self):
        """Load the tokenizer that produced the tokens."""
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
        largest = int(self.ids.view(f"u{self.ids.itemsize}").max())  # negative ones become large
        if largest >= size:
            raise ValueError(
                f"{self.folder / FILE} holds token {largest:,} of a vocabulary of {size:,}; copy it again, {REMEDY}"
            )


def is_tokens(path: str | Path) -> bool:
    """Return whether ``path`` is a folder that ``write_tokens`` finished."""
    return (Path(path) / MANIFEST).is_file()


def write_tokens(folder: Path, data: Sequence[str | Path], tokenizer, limit: int | None = None) -> Tokens:
    """Write the first ``limit`` tokens of ``data``, each document followed by the end-of-text token, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [[path.name, path.stat().st_size] if path.is_file() else [str(path), None] for path in map(Path, data)]
    now = {"tokenizer": tokenizer_fingerprint(tokenizer), "data": sizes, "limit": limit}
    if is_tokens(folder):
        tokens = Tokens(folder)
        before = {key: tokens.manifest[key] for key in now}
        check_same(before, now, f"{folder} holds the tokens of another run", "give another folder, or delete this one")
        return tokens
    dtype, total, digest = "uint16" if len(tokenizer) <= 2**16 else "int32", 0, hashlib.sha256()
    with disk_full_errors(folder), (folder / FILE).open("wb") as file:
        for part in token_parts(documents(data, tokenizer), tokenizer):
            part = part[: None if limit is None else limit - total].astype(dtype)
            file.write(part.data)
            digest.update(part.data)
            total += len(part)
            if total == limit:
                break
        if not total:
            raise ValueError(f"there are no documents in {', '.join(map(str, data))}; give text")
        tokenizer.save_pretrained(folder)
    write_json(folder / MANIFEST, now | {"tokens": total, "dtype": dtype, "digest": digest.hexdigest()})
    return Tokens(folder)


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a digest of what decides the tokens of a text, whichever of them are special."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = {} if backend is None else json.loads(backend.to_str())
    parts = [sorted(tokenizer.get_vocab().items()), [settings.get(key) for key in TOKENIZATION]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
