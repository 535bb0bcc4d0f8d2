"""Checkpoints of a run: which one is the last, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import is_zipfile

STATE = "trainer_state.json"  # what Trainer writes last
FOLDED = "fold.json"  # what a checkpoint of a model that was just folded has, and no other one
NEEDED = ("optimizer.pt", "scheduler.pt")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``."""
    return next(iter(whole_checkpoints(folder)), None)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those in ``folder`` that are whole, the newest first."""
    return [path for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True) if _is_whole(path)]


def step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return False
    return True


def is_folded(checkpoint: str | Path) -> bool:
    """Whether it is that of a model that was just folded: the weights are there, but no optimizer knows them."""
    return (Path(checkpoint) / FOLDED).is_file()


def check_checkpoint(checkpoint: Path, sharded: bool) -> None:
    """Whether a run can go on from ``checkpoint``.

    Args:
        sharded: the parameters, and so the optimizer's state, are to lie in parts on several processes.

    Raises:
        ValueError: they were not when it was written, or the reverse; or a file is missing or cut off.
    """
    parts = any(checkpoint.glob("optimizer_*")) or (checkpoint / "optimizer.bin").is_file()  # FULL_STATE_DICT's
    if parts and not sharded:
        raise ValueError(
            f"{checkpoint} is of a run whose parameters lie in parts on several processes; go on with accelerate launch "
            "--use_fsdp --fsdp_version 2, with any number of them"
        )
    if (checkpoint / NEEDED[0]).is_file() and sharded:
        raise ValueError(
            f"{checkpoint} is of a run whose parameters were whole in every process; go on without --use_fsdp"
        )
    files = {checkpoint / name for name in NEEDED[parts:] if not is_folded(checkpoint)}
    for file in sorted(files | set(checkpoint.glob("*.pt")) | set(checkpoint.glob("*.pth"))):
        if not is_zipfile(file):  # torch.save's
            raise ValueError(
                f"{file} is missing or cut off; delete {checkpoint}, and the same command goes on from the one before"
            )
