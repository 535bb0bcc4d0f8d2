"""Checkpoints whose blocks stay on disk until they are needed."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers import GenerationConfig, PreTrainedModel

from tenfold.models.atomic_io import open_safetensors
from tenfold.models.configuration import build_model, naming, read_config
from tenfold.models.experts import unpack
from tenfold.models.weight_files import (
    FLOATS,
    Stored,
    check_factors,
    check_folder,
    match_names,
    read_headers,
    read_tensor,
    weight_files,
)


class LazyCheckpoint:
    """Model on the meta device, and the files of its weights.

    Args:
        model: its parameters are on the meta device, its buffers are not.
        files: ``{name of a tensor in the model: (file, its name there)}``.
        dtype: of floating-point weights once they are read.
        device: where they are read to.
    """

    def __init__(
        self, model: PreTrainedModel, files: dict[str, tuple[Path, str]], dtype: torch.dtype, device: torch.device
    ):
        self.model, self.files, self.dtype, self.device = model, files, dtype, device

    def load(self, path: str, dtype: torch.dtype = torch.float32) -> None:
        """Read the tensors of the module ``path``."""
        self._read([name for name in self.files if name.startswith(f"{path}.")], dtype)

    def drop(self, path: str) -> None:
        """Free the tensors of the module ``path``; they can be read again."""
        for name, _ in list(self.model.get_submodule(path).named_parameters()):
            set_module_tensor_to_device(self.model, f"{path}.{name}", "meta")

    def load_outside(self, blocks: list[str]) -> None:
        """Read the tensors that are in none of the modules ``blocks``."""
        inside = tuple(f"{path}." for path in blocks)
        self._read([name for name in self.files if not name.startswith(inside)], self.dtype)
        self.model.tie_weights()

    def _read(self, names: list[str], dtype: torch.dtype) -> None:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name][0], []).append(name)
        for file, inside in by_file.items():
            with open_safetensors(file) as stored:
                for name in inside:
                    value = stored.get_tensor(self.files[name][1])
                    kind = dtype if value.is_floating_point() else value.dtype
                    set_module_tensor_to_device(self.model, name, self.device, value=value.clone(), dtype=kind)


def open_lazy(
    name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LazyCheckpoint | None:
    """Open the checkpoint ``name`` without reading a weight, None where its tensors can't be matched to the model's by name.

    Args:
        name: a folder, or a name on a hub.
        dtype: that of the checkpoint unless given.
    """
    files = weight_files(name)
    if not files or (Path(name) / "adapter_config.json").is_file():  # transformers reads an adapter, too
        return None
    if Path(name).is_dir():
        check_folder(Path(name))
    config = read_config(name)
    with naming(name):
        with init_empty_weights(include_buffers=False):
            model = build_model(config)
        unpack(model)
        stored = read_headers(files)
        check_factors(model, stored)
    if model.can_generate():
        with suppress(OSError):  # none there
            model.generation_config = GenerationConfig.from_pretrained(name)
    places = _match_tensors(model, stored)
    if places is None:
        return None
    first = (dtype for file, _, dtype in stored.values() if file == files[0] and dtype in FLOATS)
    kind = dtype or config.dtype or next(first, torch.float32)
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    return LazyCheckpoint(model.eval(), places, kind, torch.device(device))


def _match_tensors(model: PreTrainedModel, stored: Stored) -> dict[str, tuple[Path, str]] | None:
    """Return file and stored name of every tensor of ``model``, None where one is missing, left over or not as it should be."""
    found = match_names(model, stored)
    for name, tensor in model.state_dict().items():
        if name not in found and name in model.all_tied_weights_keys:
            continue
        if name not in found or stored[found[name]][1] != tuple(tensor.shape):
            return None
        if tensor.is_floating_point() and stored[found[name]][2] not in FLOATS:
            return None
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    left = stored.keys() - found.values()
    if any(not any(re.search(pattern, key) for pattern in patterns) for key in left):
        return None
    places = {name: (stored[key][0], key) for name, key in found.items()}
    for name, source in model.all_tied_weights_keys.items():  # transformers unties what has values of its own
        both = [read_tensor(*places[one]) for one in (name, source) if one in places]
        if len(both) == 2 and not torch.equal(*both):
            return None
    return places
