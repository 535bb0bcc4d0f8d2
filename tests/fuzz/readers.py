"""Every file that tenfold reads: a good one, how it is damaged, and who reads it."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import small
import torch
import yaml
from mutations import damage_bytes, damage_json, damage_safetensors, damage_value

import tenfold
from tenfold.compression.resume_state import ResumeState
from tenfold.evaluation.text_files import documents
from tenfold.models.auto import load_tokenizer, meta_model
from tenfold.models.checkpoint_format import read_structures
from tenfold.models.quantization_config import TenfoldConfig
from tenfold.models.recipe import load_recipe, parse_recipe
from tenfold.models.weight_files import check_folder, weight_files
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.run_manifest import check_recipe
from tenfold.train.tokenizer import train_tokenizer
from tenfold.train.tokens import Tokens, write_tokens

GOLDEN = sorted(path.parent for path in (Path(__file__).parents[1] / "golden").glob("version-*/*/config.json"))
IDS = torch.arange(14).reshape(2, 7) + 1
ROWS = [
    {"text": "the old house stood at the end"},
    {"text": ""},
    {"messages": [{"role": "user", "content": "who lived there?"}, {"role": "assistant", "content": "nobody"}]},
]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
RECIPE = {
    "name": "toy",
    "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 16},
    "tokenizer": {"vocab_size": 300},
    "train": {"tokens": 384, "batch_size": 4},
}


@dataclass(frozen=True)
class Reader:
    """A reader of one kind of file.

    Args:
        write: puts a damaged input into an empty folder, and returns what is read (a path, or a value).
        read: returns anything, or raises an error.
        inputs: in the long form.
        named: the error says which file, or folder, is damaged.
        right: whether what ``read`` returned may be used; any value may, unless given.
    """

    write: Callable[[Path, Random], Any]
    read: Callable[[Any], Any]
    inputs: int
    named: bool = True
    right: Callable[[Any, Any], bool] = lambda given, found: True


def in_file(name: str, raw: bytes | list[bytes], damage: Callable[[bytes, Random], bytes]):
    """Return a writer of one damaged file."""

    def write(folder: Path, draw: Random) -> Path:
        good = draw.choice(raw) if isinstance(raw, list) else raw
        (folder / name).write_bytes(damage(good, draw))
        return folder / name

    return write


def in_copy(original: Path | list[Path], damaged: dict[str, Callable[[bytes, Random], bytes]], copied: str = "thing"):
    """Return a writer of a copy of a folder in which one file, of those in ``damaged``, is damaged."""

    def write(folder: Path, draw: Random) -> Path:
        source, place = draw.choice(original) if isinstance(original, list) else original, folder / copied
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        name = draw.choice([name for name in damaged if (place / name).exists()])
        (place / name).write_bytes(damaged[name]((place / name).read_bytes(), draw))
        return place

    return write


def damage_structures(raw: bytes, draw: Random) -> bytes:
    """Change a ``config.json`` where it speaks of tenfold, or in its architectures."""
    config = json.loads(raw)
    key = draw.choice(("quantization_config",) * 4 + ("architectures",))
    config[key] = damage_value(config[key], draw)
    return json.dumps(config).encode()


@torch.no_grad()
def load_logits(folder: Path) -> torch.Tensor:
    model, _ = tenfold.load(folder, "cpu", "float32")
    return model(input_ids=IDS).logits


def as_before(folder: Path, found: torch.Tensor) -> bool:
    expected = torch.tensor(json.loads((folder / "logits.json").read_text())).reshape(*IDS.shape, -1)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def list_documents(path: Path, tokenizer=None) -> int:
    return sum(len(text.encode()) for text in documents([path], tokenizer))  # text must be writable, too


def read_state(folder: Path):
    state = ResumeState(folder, 2)
    return [state.is_finished(0), state.chosen and sorted(state.chosen), [one["item"] for one in state.choices]]


def read_run(folder: Path):
    return check_recipe(folder, parse_recipe(RECIPE, "toy"), ["text.txt"])


def readers(base: Path) -> dict[str, Reader]:
    """Return all readers, after their good files are written below ``base``."""
    recipes = [
        path.read_bytes() for path in (resources.files("tenfold") / "recipes").iterdir() if path.name.endswith("yaml")
    ]
    mappings = [yaml.safe_load(raw) for raw in recipes]
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in GOLDEN]
    tokenizer = train_tokenizer([small.text(200)], 300, 32)
    tokenizer.chat_template = TEMPLATE
    (base / "text.txt").write_text(small.text(300))
    tokens = write_tokens(base / "tokens", [base / "text.txt"], tokenizer).folder
    tokenizer.save_pretrained(base / "tokenizer")
    check_recipe(base / "run", parse_recipe(RECIPE, "toy"), ["text.txt"])
    (base / "state" / "unfinished").mkdir(parents=True)
    structure = next(iter(read_structures(TenfoldConfig(**configs[5])).values()))
    choice = {"item": "a", "chosen": 3, "parameters": 3, "of": 4, "loss": 0.5, "unit": "nats a token"}
    ResumeState(base / "state", 2).save_choices({"a": 3, "b": structure}, [choice])
    (base / "check" / "checkpoint-3").mkdir(parents=True)
    (base / "check" / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "log_history": []}')
    shards = base / "shards"
    shutil.copytree(GOLDEN[0], shards)
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))

    def damage_lines(raw: bytes, draw: Random) -> bytes:
        good = raw.splitlines(keepends=True)
        number = draw.randrange(len(good))
        good[number] = damage_json(good[number], draw).replace(b"\n", b" ") + b"\n"
        return b"".join(good)

    return {
        "recipe values": Reader(
            lambda folder, draw: damage_value(draw.choice(mappings), draw),
            lambda value: parse_recipe(value, "recipe-7") if isinstance(value, dict) else None,
            400_000,
            named=False,
        ),
        "recipe files": Reader(in_file("recipe-7.yaml", recipes, damage_bytes), load_recipe, 50_000),
        "structures": Reader(
            lambda folder, draw: damage_value(draw.choice(configs), draw),
            lambda value: read_structures(TenfoldConfig(**value)) if isinstance(value, dict) else None,
            400_000,
            named=False,
        ),
        "json lines": Reader(
            in_file("rows-7.jsonl", lines, damage_lines), lambda path: list_documents(path, tokenizer), 200_000
        ),
        "plain text": Reader(in_file("text-7.txt", small.text(40).encode(), damage_bytes), list_documents, 50_000),
        "xz": Reader(in_file("text-7.txt.xz", lzma.compress(lines), damage_bytes), list_documents, 20_000),
        "gz": Reader(in_file("text-7.jsonl.gz", gzip.compress(lines), damage_bytes), list_documents, 20_000),
        "tokenizer": Reader(
            in_copy(base / "tokenizer", {"tokenizer.json": damage_json, "tokenizer_config.json": damage_json}),
            lambda folder: load_tokenizer(folder) and load_tokenizer(folder)("the old house")["input_ids"][:4],
            3_000,
        ),
        "tokens": Reader(
            in_copy(tokens, {"tokens.json": damage_json, "tokens.bin": damage_bytes}),
            lambda folder: Tokens(folder).check(300),
            20_000,
        ),
        "run note": Reader(in_copy(base / "run", {"run.json": damage_json}), read_run, 5_000),
        "resume state": Reader(in_copy(base / "state", {"unfinished/choices.json": damage_json}), read_state, 20_000),
        "trainer state": Reader(
            in_copy(base / "check", {"checkpoint-3/trainer_state.json": damage_json}), last_checkpoint, 20_000
        ),
        "index": Reader(
            in_copy(shards, {"model.safetensors.index.json": damage_json}),
            lambda folder: [
                check_folder(folder),
                [path.resolve().relative_to(folder.resolve()) for path in weight_files(folder)],
            ],
            20_000,
        ),
        "config": Reader(in_copy(GOLDEN, {"config.json": damage_json}), lambda folder: meta_model(str(folder)), 3_000),
        "model": Reader(
            in_copy(GOLDEN, {"config.json": damage_structures, "model.safetensors": damage_safetensors}),
            load_logits,
            4_000,
            right=as_before,
        ),
    }
