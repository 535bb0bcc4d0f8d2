"""What the run of a folder was begun with: noted first, and compared when it goes on."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tenfold.models.atomic_io import read_json, write_json
from tenfold.models.recipe import Recipe, parse_recipe
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.teacher import weights_digest
from tenfold.train.tokens import Tokens

FILE = "run.json"
FILES = ("*.safetensors", "*.safetensors.index.json", "log.jsonl", "training.json", FILE)  # the note last
OF_TOKENS = ("tokenizer", "model", "train.tokens", "train.objective", "train.window")  # other ones have other tokens
FOLDERS = ("checkpoints", "dense", "tokens")


def check_apart(folder: Path, recipe: Recipe) -> None:
    """Raise ValueError where ``folder``, which a run is written to, holds a model that it begins with or learns from."""
    for name in filter(None, (recipe.origin, recipe.train.teacher)):
        if Path(name).exists() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{name} is in {folder}, where the run would write over it; give another folder")


def same_recipe(folder: Path, recipe: Recipe, data: Sequence[str | Path]) -> None:
    """Note what is run, or see that it is what was begun; of a run without any checkpoint another can take the place.

    Raises:
        ValueError: it is not; the keys that differ are named.
    """
    file = folder / FILE
    now = {"recipe": recipe.model_dump(mode="json"), "data": [str(path) for path in data], "versions": versions()}
    if file.is_file():
        before = parse_recipe(read_json(file)["recipe"], str(file)).model_dump(mode="json")
        other = sorted(differences(before, now["recipe"]))
        if not other:
            return
        if _begun(folder):
            raise ValueError(
                f"{folder} is a run of another recipe (other {', '.join(other)}); repeat that one, or give another folder"
            )
        if any(key.startswith(OF_TOKENS) for key in other):
            forget(folder, data)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, now)


def _begun(folder: Path) -> bool:
    """Whether anything is there that was trained."""
    checkpoints = (last_checkpoint(folder / name) for name in ("checkpoints", "dense"))
    return (folder / "training.json").is_file() or any(checkpoints)


def same_sources(folder: Path, tokens: Tokens, models: dict[str, str | None]) -> None:
    """Note what the run is trained on, or see that it is what it was begun on, wherever that is now.

    Args:
        models: the folders or names of those that it begins with or learns from, by what they are to it.

    Raises:
        ValueError: it is not; what differs is named.
    """
    noted = read_json(folder / FILE)
    now = {key: value for key, value in tokens.about.items() if key != "shards"}
    for what, name in models.items():
        if name is not None and ("tokens" not in noted or what in noted["tokens"]):  # folders of before lack it
            now[what] = weights_digest(name)
    other = sorted(differences(noted.get("tokens", {}), now))
    if "tokens" not in noted or (other and not _begun(folder)):
        write_json(folder / FILE, noted | {"tokens": now})
    elif other:
        raise ValueError(
            f"{folder} is a run on other data, or with another model (other {', '.join(other)}); repeat it with that, or give "
            "another folder"
        )


def forget(folder: Path, data: Sequence[str | Path]) -> None:
    """Delete what a run has left in ``folder``, and nothing else.

    Raises:
        ValueError: some of ``data`` is in there.
    """
    if not (folder / FILE).is_file():
        return
    for path in data:
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is in {folder}, which is to be overwritten; move it, or give another folder")
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for file in (file for pattern in FILES for file in folder.glob(pattern)):
        file.unlink()


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The keys, with dots, under which two nested dictionaries have something else."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        return [
            path for key in keys for path in differences(one.get(key), other.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if one == other else [where]


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    named = {name: version(name) for name in ("tenfold", "torch", "transformers", "accelerate")}
    return named | {"python": platform.python_version()}
