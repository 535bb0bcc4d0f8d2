"""Checkpoints of a run: find the newest complete one, and check that training can resume from it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from tenfold.models.atomic_io import file_hash, file_hashes, read_json, write_json

HASHES = "hashes.json"  # of all other files but the state
STATE = "trainer_state.json"  # the file that Trainer writes last
COMPRESSED = "compressed.json"  # only in the checkpoint of a model that was compressed right before it


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in ``folder``."""
    return next(iter(complete_checkpoints(folder)), None)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, newest first."""
    found = []
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        with suppress(OSError, ValueError):
            json.loads((path / STATE).read_text())
            found.append(path)
    return found


def step_of(checkpoint: str | Path) -> int:
    """Return the step of a checkpoint, the end of its name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def is_compressed_here(checkpoint: str | Path) -> bool:
    """Return whether the model was compressed at this checkpoint, which then has weights but no optimizer state."""
    return (Path(checkpoint) / COMPRESSED).is_file()


def check_checkpoint(checkpoint: Path, sharded: bool) -> None:
    """Raise ValueError if training can't resume from ``checkpoint``.

    Args:
        sharded: parameters and optimizer state are sharded over the processes (FSDP) of the resuming run.
    """
    was_sharded = any(checkpoint.glob("optimizer_*")) or (checkpoint / "optimizer.bin").is_file()  # FULL_STATE_DICT
    if was_sharded and not sharded:
        raise ValueError(
            f"{checkpoint} is of a run with sharded parameters; resume it with accelerate launch --use_fsdp "
            "--fsdp_version 2, with any number of processes"
        )
    if (checkpoint / "optimizer.pt").is_file() and sharded:
        raise ValueError(f"{checkpoint} is of a run without sharded parameters; resume it without --use_fsdp")
    check_hashes(checkpoint)


def write_hashes(checkpoint: Path) -> None:
    """Note the hashes of all files in ``checkpoint``, which is complete but for its state."""
    (checkpoint / HASHES).unlink(missing_ok=True)
    write_json(checkpoint / HASHES, file_hashes(checkpoint))


def check_hashes(checkpoint: Path) -> None:
    """Raise ValueError unless all files of ``checkpoint`` are as they were written."""
    noted = read_json(checkpoint / HASHES, dict[str, str]) if (checkpoint / HASHES).is_file() else {HASHES: ""}
    for name, hash in noted.items():
        file = checkpoint / name
        if not file.is_file() or file_hash(file) != hash:
            raise ValueError(
                f"{file} is missing, cut off or changed; delete {checkpoint} and rerun the same command to resume from the "
                "one before"
            )
