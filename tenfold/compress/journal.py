"""What a run has reached: choices, sensitivities and finished blocks; in a folder, so that the run can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.compress.shelf import Shelf
from tenfold.models.hook import FoldedConfig
from tenfold.models.replace import install_empty
from tenfold.models.stored import describe, stored_plan
from tenfold.structure import Structure


class Journal:
    """Of one run in one folder, or in memory where nothing outlives the run.

    Args:
        folder: its files are ``choices.json``, ``matters/`` and, per finished block, ``block-N.json`` and
            ``block-N.safetensors``.
    """

    def __init__(self, folder: Path | None = None):
        self.folder, self.chosen, self.choices = folder, None, []
        self.shelf = Shelf(None if folder is None else folder / "matters")
        self.weighed: dict[int, list[str]] = {}
        if folder is not None and (folder / "choices.json").is_file():
            found = json.loads((folder / "choices.json").read_text())
            self.chosen = {name: _option(value) for name, value in found["chosen"].items()}
            self.choices = found["choices"]
            self.weighed = {int(number): paths for number, paths in found["weighed"].items()}

    def states(self) -> Path | None:
        """Where hidden states may lie."""
        return None if self.folder is None else self.folder / "states"

    def weigh(self, number: int, matters: dict[str, Tensor]) -> None:
        """Keep ``{site: G}`` of block ``number``."""
        self.weighed[number] = list(matters)
        for k, value in enumerate(matters.values()):
            self.shelf.put(f"{number}-{k}", value)

    def matters(self, number: int) -> dict[str, Tensor]:
        """What :meth:`weigh` was given."""
        return {path: self.shelf.get(f"{number}-{k}").double() for k, path in enumerate(self.weighed.get(number, ()))}

    def choose(self, chosen: dict[str, Any], choices: list[dict[str, Any]]) -> None:
        """Keep what was chosen for every item."""
        self.chosen, self.choices = chosen, choices
        if self.folder is not None:
            plain = {name: v.to_json() if isinstance(v, Structure) else v for name, v in chosen.items()}
            write_json(self.folder / "choices.json", {"chosen": plain, "choices": choices, "weighed": self.weighed})

    def keep(self, model: PreTrainedModel, number: int, path: str, dtype: torch.dtype) -> None:
        """Write the finished block ``number`` with its floating point tensors in ``dtype``."""
        if self.folder is None:
            return
        sites = {p: s for p, s in describe(model).sites.items() if p.startswith(f"{path}.")}
        tensors = {
            f"{path}.{name}": (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous().clone()
            for name, value in model.get_submodule(path).state_dict().items()
        }
        file = self.block(number)
        save_file(tensors, f"{file}.new", metadata={"format": "pt"})
        Path(f"{file}.new").replace(file)
        write_json(file.with_suffix(".json"), sites)  # last: with it the block counts as finished

    def block(self, number: int) -> Path:
        """The file of block ``number``."""
        assert self.folder is not None
        return self.folder / f"block-{number:05}.safetensors"

    def finished(self, number: int) -> bool:
        """Whether block ``number`` is finished."""
        return self.folder is not None and self.block(number).with_suffix(".json").is_file()

    def restore(self, model: PreTrainedModel, number: int, dtype: torch.dtype = torch.float32) -> None:
        """Put the finished block ``number`` into ``model``."""
        sites = json.loads(self.block(number).with_suffix(".json").read_text())
        install_empty(model, stored_plan(model, FoldedConfig(sites)))
        put_tensors(model, load_file(self.block(number)), dtype)


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


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value))
    new.replace(path)


def _option(value: Any) -> Any:
    return Structure.from_json(value) if isinstance(value, dict) else value
