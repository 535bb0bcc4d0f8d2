"""State of a run: choices, statistics and finished blocks; in a folder, so that an interrupted run can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.atomic_io import file_hash, file_hashes, read_json, write_json
from tenfold.models.checkpoint_format import describe, read_plan
from tenfold.models.distributed import barrier, is_main_process, num_processes
from tenfold.models.quantization_config import TenfoldConfig
from tenfold.models.surgery import install_empty
from tenfold.structure import Structure

ORDER = "order of "


class _Choice(BaseModel, extra="allow"):
    """What ``TradeoffCurve.describe`` returns, and what stock shapes add."""

    item: str
    chosen: Any
    parameters: int
    of: int
    loss: float | None
    unit: str


class _Choices(BaseModel):
    """What is chosen for every item, and the hashes of the statistics that this was chosen by."""

    chosen: dict[str, Any]
    choices: list[_Choice]
    statistics: dict[str, str]


class _Block(BaseModel):
    """The structures of a finished block, and the hash of its shard."""

    sites: dict[str, Any]
    fits: dict[str, dict[str, Any]]
    hash: str


class ResumeState:
    """State of one run in one folder, or in memory where nothing outlives the run; the first process writes.

    Args:
        folder: a shard of the checkpoint per finished block; ``unfinished/`` has all else.
        blocks: number of blocks.
    """

    def __init__(self, folder: Path | None = None, blocks: int = 0):
        self.folder, self.blocks = folder, blocks
        self.unfinished = None if folder is None else folder / "unfinished"
        self.chosen: dict[str, Any] = {}
        self.choices: list[dict[str, Any]] = []
        self._statistics: dict[int, dict[str, Tensor]] = {}  # where there is no folder
        self._hashes: dict[str, str] = {}  # of the statistics that an interrupted run has left
        self.fits: dict[str, dict[str, Any]] = {}  # how those of the finished blocks ended
        if self.unfinished is not None and (file := self.unfinished / "choices.json").is_file():
            found = read_json(file, _Choices)
            self.choices = [choice.model_dump() for choice in found.choices]
            self._hashes = found.statistics
            for name, value in found.chosen.items():
                try:
                    self.chosen[name] = Structure.from_json(value) if isinstance(value, dict) else value
                except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as reason:
                    told = f"{file} has no structure for {name} ({reason!r}); delete {folder} to start again"
                    raise ValueError(told) from None

    def run_or_load(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what the task ``make`` returns or has returned: plain data, by which an interrupted run does not repeat it."""
        if self.unfinished is None:
            return make()
        # by the number of processes, as each reads its part of the text
        file = self.unfinished / f"tasks-{num_processes()}" / f"{name}.json"
        done = file.is_file()
        barrier()  # until all have looked
        if done:
            return read_json(file)
        value = make()
        if is_main_process():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, value)
        barrier()  # until it counts as done, before any process drops what it was made of
        return value

    def save_statistics(self, number: int, fisher: dict[str, Tensor], orders: dict[str, Tensor]) -> None:
        """Store ``{site: G}`` of block ``number`` and the order or basis in which its items lose dimensions."""
        tensors = fisher | {f"{ORDER}{name}": value for name, value in orders.items()}
        tensors = {name: value.float().cpu().contiguous().clone() for name, value in tensors.items()}
        if self.unfinished is None:
            self._statistics[number] = tensors
        elif is_main_process():
            write_tensors(self.unfinished / "statistics" / f"{number}.safetensors", tensors)

    def statistics(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return ``{site: G}`` of block ``number``, and the orders and bases of its items."""
        if self.unfinished is None:
            found = self._statistics.get(number, {})
        else:
            file = self.unfinished / "statistics" / f"{number}.safetensors"
            if self._hashes:
                _check_hash(file, self._hashes.get(file.name))
            found = load_file(file)
        fisher = {path: value.double() for path, value in found.items() if not path.startswith(ORDER)}
        return fisher, {name.removeprefix(ORDER): value.double() for name, value in found.items() if name not in fisher}

    def save_choices(self, chosen: dict[str, Any], choices: list[dict[str, Any]]) -> None:
        """Save what was chosen for every item."""
        self.chosen, self.choices = chosen, choices
        if self.unfinished is not None and is_main_process():
            plain = {name: v.to_json() if isinstance(v, Structure) else v for name, v in chosen.items()}
            hashes = file_hashes(self.unfinished / "statistics")
            write_json(self.unfinished / "choices.json", {"chosen": plain, "choices": choices, "statistics": hashes})
        barrier()  # the others read the statistics

    def save_block(self, model: PreTrainedModel, number: int, path: str, dtype: torch.dtype) -> None:
        """Write the finished block ``number`` with its floating point tensors in ``dtype``."""
        if self.folder is None or not is_main_process():
            return
        config: Any = describe(model)
        sites = {p: s for p, s in config.sites.items() if p.startswith(f"{path}.")}
        tensors = {
            f"{path}.{name}": (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous().clone()
            for name, value in model.get_submodule(path).state_dict().items()
        }
        write_tensors(self.shard_path(number + 1), tensors)
        hash = file_hash(self.shard_path(number + 1))
        fits = {p: fit for p, fit in self.fits.items() if p.startswith(f"{path}.")}
        note = {"sites": sites, "hash": hash, "fits": fits}
        write_json(self._sites_path(number), note)  # last: now the block counts as finished

    def shard_path(self, number: int) -> Path:
        """Return the path of a shard of the checkpoint; number 0 is for what is outside of the blocks."""
        assert self.folder is not None
        return self.folder / f"model-{number + 1:05}-of-{self.blocks + 1:05}.safetensors"

    def _sites_path(self, number: int) -> Path:
        assert self.unfinished is not None
        return self.unfinished / f"block-{number:05}.json"

    def is_finished(self, number: int) -> bool:
        """Return whether block ``number`` is finished."""
        done = self.unfinished is not None and self._sites_path(number).is_file()
        return done and self.shard_path(number + 1).is_file()

    def load_block(self, model: PreTrainedModel, number: int) -> None:
        """Put the finished block ``number`` into ``model``, in float32, and raise ValueError if its shard has changed since."""
        block = read_json(self._sites_path(number), _Block)
        _check_hash(self.shard_path(number + 1), block.hash)
        self.fits |= block.fits
        install_empty(model, read_plan(model, TenfoldConfig(block.sites)))
        tensors = load_file(self.shard_path(number + 1)).items()
        tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors}
        model.load_state_dict(tensors, strict=False, assign=True)


def _check_hash(file: Path, noted: str | None) -> None:
    if not file.is_file() or file_hash(file) != noted:
        raise ValueError(f"{file} is missing, cut off or changed; delete what it belongs to, to start again")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of safetensors atomically, and its folder.

    Raises:
        OSError: the disk is full, or the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    try:
        save_file(tensors, new, metadata={"format": "pt"})
    except SafetensorError as reason:
        new.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written ({reason}); make room and rerun the command to resume it") from None
    new.replace(path)
