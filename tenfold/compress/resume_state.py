"""What a run has reached: choices, sensitivities and finished blocks; in a folder, so that the run can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.compress.tensor_store import TensorStore
from tenfold.models.atomic_io import write_json
from tenfold.models.checkpoint_format import describe, read_plan
from tenfold.models.distributed import barrier, is_main_process, num_processes
from tenfold.models.quantization_config import TenfoldConfig
from tenfold.models.surgery import install_empty
from tenfold.structure import Structure

ORDER = "order of "


class CheckpointedTasks:
    """What every step gave, so that a run that is interrupted between two of them goes on behind the last one.

    Args:
        folder: None: nothing outlives the run.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, or has given: plain data; of several processes the first one writes what all of them read."""
        if self.folder is None:
            return make()
        file = self.folder / f"{name}.json"
        done = file.is_file()
        barrier()  # until all have looked
        if done:
            return json.loads(file.read_text())
        value = make()
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, value)
        barrier()  # until it counts as done, before anyone drops what it was made of
        return value

    def forget(self) -> None:
        """All is done that was to be done in steps."""
        if self.folder is not None and is_main_process():
            shutil.rmtree(self.folder, ignore_errors=True)


class ResumeState:
    """Of one run in one folder, or in memory where nothing outlives the run; of several processes the first one writes.

    Args:
        folder: per finished block there is a shard of the checkpoint in it; ``unfinished/`` has all else.
        blocks: how many there are.
    """

    def __init__(self, folder: Path | None = None, blocks: int = 0):
        self.folder, self.blocks, self.chosen, self.choices = folder, blocks, None, []
        self.notes = None if folder is None else folder / "unfinished"
        self.shelf = TensorStore(self.notes and self.notes / "matters")
        self.weighed: dict[int, list[str]] = {}
        self.fits: dict[str, dict[str, Any]] = {}  # of this run alone
        self.survey = CheckpointedTasks(
            self.notes and self.notes / f"survey-{num_processes()}"
        )  # of so many, each with its part of the text
        if self.notes is not None and (self.notes / "choices.json").is_file():
            found = json.loads((self.notes / "choices.json").read_text())
            self.chosen = {name: _option(value) for name, value in found["chosen"].items()}
            self.choices = found["choices"]
            self.weighed = {int(number): paths for number, paths in found["weighed"].items()}

    def weigh(self, number: int, matters: dict[str, Tensor], orders: dict[str, Tensor]) -> None:
        """Keep ``{site: G}`` of block ``number``, and in which order or basis its items lose what they lose."""
        both = matters | {f"{ORDER}{name}": value for name, value in orders.items()}
        self.weighed[number] = list(both)
        if self.notes is None or is_main_process():
            for k, value in enumerate(both.values()):
                self.shelf.put(f"{number}-{k}", value)

    def matters(self, number: int) -> dict[str, Tensor]:
        """Return ``{site: G}`` of block ``number``."""
        return {path: value for path, value in self._weighed(number).items() if not path.startswith(ORDER)}

    def orders(self, number: int) -> dict[str, Tensor]:
        """Return the orders and bases of the items of block ``number``."""
        found = self._weighed(number).items()
        return {name.removeprefix(ORDER): value for name, value in found if name.startswith(ORDER)}

    def _weighed(self, number: int) -> dict[str, Tensor]:
        return {name: self.shelf.get(f"{number}-{k}").double() for k, name in enumerate(self.weighed.get(number, ()))}

    def choose(self, chosen: dict[str, Any], choices: list[dict[str, Any]]) -> None:
        """Keep what was chosen for every item."""
        self.chosen, self.choices = chosen, choices
        if self.notes is not None and is_main_process():
            plain = {name: v.to_json() if isinstance(v, Structure) else v for name, v in chosen.items()}
            write_json(self.notes / "choices.json", {"chosen": plain, "choices": choices, "weighed": self.weighed})
        barrier()  # the others read what was weighed
        self.survey.forget()

    def keep(self, model: PreTrainedModel, number: int, path: str, dtype: torch.dtype) -> None:
        """Write the finished block ``number`` with its floating point tensors in ``dtype``."""
        if self.folder is None or not is_main_process():
            return
        sites = {p: s for p, s in describe(model).sites.items() if p.startswith(f"{path}.")}
        tensors = {
            f"{path}.{name}": (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous().clone()
            for name, value in model.get_submodule(path).state_dict().items()
        }
        write_tensors(self.shard(number + 1), tensors)
        write_json(self._sites(number), sites)  # last: with it the block counts as finished

    def shard(self, number: int) -> Path:
        """A file of the checkpoint; number 0 is for what is outside of the blocks."""
        assert self.folder is not None
        return self.folder / f"model-{number + 1:05}-of-{self.blocks + 1:05}.safetensors"

    def _sites(self, number: int) -> Path:
        assert self.notes is not None
        return self.notes / f"block-{number:05}.json"

    def finished(self, number: int) -> bool:
        """Whether block ``number`` is finished."""
        return self.notes is not None and self._sites(number).is_file() and self.shard(number + 1).is_file()

    def restore(self, model: PreTrainedModel, number: int, dtype: torch.dtype = torch.float32) -> None:
        """Put the finished block ``number`` into ``model``."""
        install_empty(model, read_plan(model, TenfoldConfig(json.loads(self._sites(number).read_text()))))
        put_tensors(model, load_file(self.shard(number + 1)), dtype)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Whole or not at all.

    Raises:
        OSError: there is no room, or no right to write there.
    """
    new = path.with_suffix(".new")
    try:
        save_file(tensors, new, metadata={"format": "pt"})
    except SafetensorError as reason:
        new.unlink(missing_ok=True)
        raise OSError(
            f"{path} can't be written ({reason}); make room, and the same command goes on from there"
        ) from None
    new.replace(path)


def put_tensors(model: PreTrainedModel, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """``{name: tensor}`` into ``model``, whatever shape was there, the floating point ones in ``dtype``."""
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        value = value.to(dtype) if value.is_floating_point() else value
        if leaf in module._parameters:
            old = module._parameters[leaf]
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=old is not None and old.requires_grad)
        else:
            module._buffers[leaf] = value


def _option(value: Any) -> Any:
    return Structure.from_json(value) if isinstance(value, dict) else value
