"""Manifest of a run: what it was started with, written first and compared when the run resumes."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tenfold.models.atomic_io import WEIGHTS, read_json, write_json
from tenfold.models.recipe import Recipe
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.teacher import weights_digest

FILE = "run.json"
OUTPUTS = (*WEIGHTS, "log.jsonl", "training.json", FILE)  # the manifest goes last
OUTPUT_FOLDERS = ("checkpoints", "dense", "tokens")
TOKENIZATION = (
    "tokenizer",
    "model",
    "train.tokens",
    "train.objective",
    "train.sequence_length",
)  # keys that decide the tokens
LIBRARIES = ("tenfold", "torch", "transformers", "accelerate")


class _Manifest(BaseModel, extra="allow"):
    recipe: dict[str, Any]
    tokens: dict[str, Any] = {}


def differences(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Return ``{dotted key: (before, now)}`` of all entries in which two nested dictionaries differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {key: (before, now)}
    found = {}
    for name in [*now, *(name for name in before if name not in now)]:
        found |= differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    return found


def check_same(before: dict[str, Any], now: dict[str, Any], problem: str, way_out: str) -> None:
    """Raise ValueError, ``problem`` (what differs); ``way_out``, unless two manifests are equal."""
    if found := differences(before, now):
        told = "; ".join(
            f"{key} is {str(old)[:60]} there and {str(new)[:60]} here" for key, (old, new) in found.items()
        )
        raise ValueError(f"{problem} ({told}); {way_out}")


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Return the versions of Python and of the installed ones among ``libraries``."""
    found = {"python": platform.python_version()}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_inputs_outside(folder: Path, recipe: Recipe) -> None:
    """Raise ValueError if the model that ``recipe`` starts from, or its teacher, is in the output ``folder``."""
    for name in filter(None, (recipe.origin, recipe.training.teacher)):
        if Path(name).exists() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{name} is in {folder}, where the run would write over it; give another folder")


def check_recipe(folder: Path, recipe: Recipe, data: Sequence[str | Path]) -> None:
    """Write the manifest of a run, or compare with it; a run without a checkpoint may be replaced by another one."""
    file = folder / FILE
    now = {"recipe": recipe.model_dump(mode="json"), "data": [str(path) for path in data], "versions": versions()}
    if file.is_file():
        before = read_json(file, _Manifest).recipe
        other = differences(before, now["recipe"])
        if not other:
            return
        if _has_trained(folder):
            check_same(
                before, now["recipe"], f"{folder} is a run of another recipe", "repeat that one, or give another folder"
            )
        if any(key.startswith(TOKENIZATION) for key in other):
            delete_run(folder, data)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, now)


def check_sources(folder: Path, tokens: dict[str, Any], models: dict[str, str | None]) -> None:
    """Add the tokens and models of a run to its manifest, or compare with it, wherever they are stored now.

    Args:
        tokens: the manifest of the tokens.
        models: ``{role: folder or name}`` of the models that the run starts from or learns from.
    """
    manifest = read_json(folder / FILE, dict[str, Any])
    now = {key: value for key, value in tokens.items() if key != "shards"}
    now |= {role: weights_digest(name) for role, name in models.items() if name is not None}
    if not (before := _Manifest(**manifest).tokens) or not _has_trained(folder):
        write_json(folder / FILE, manifest | {"tokens": now})
    else:
        problem = f"{folder} is a run on other data, or with another model"
        check_same(before, now, problem, "repeat it with that, or give another folder")


def _has_trained(folder: Path) -> bool:
    checkpoints = (last_checkpoint(folder / name) for name in ("checkpoints", "dense"))
    return (folder / "training.json").is_file() or any(checkpoints)


def delete_run(folder: Path, data: Sequence[str | Path]) -> None:
    """Delete what a run wrote to ``folder``, and nothing else."""
    if not (folder / FILE).is_file():
        return
    for path in data:
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is in {folder}, which is to be overwritten; move it, or give another folder")
    for name in OUTPUT_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for file in (file for pattern in OUTPUTS for file in folder.glob(pattern)):
        file.unlink()
