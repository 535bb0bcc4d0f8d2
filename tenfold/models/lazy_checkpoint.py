"""Checkpoints whose blocks stay on disk until they are needed."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers import GenerationConfig, PreTrainedModel

from tenfold.models.architectures import ARCHITECTURES
from tenfold.models.atomic_io import open_safetensors
from tenfold.models.auto import build_model, read_config
from tenfold.models.checkpoint_format import read_plan
from tenfold.models.experts import unpack
from tenfold.models.loading import weight_files
from tenfold.models.quantization_config import get_tenfold_config
from tenfold.models.surgery import install_empty


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
    config = read_config(name)
    files = weight_files(name)
    if not files:
        return None
    with init_empty_weights(include_buffers=False):
        model = build_model(config)
    unpack(model)
    stored = get_tenfold_config(config)
    if stored is not None:
        install_empty(model, read_plan(model, stored))
    if model.can_generate():
        with suppress(OSError):  # none there
            model.generation_config = GenerationConfig.from_pretrained(name)
    places = _match_tensors(model, files)
    if places is None:
        return None
    kind = dtype or config.dtype or torch.float32
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    return LazyCheckpoint(model.eval(), places, kind, torch.device(device))


def _match_tensors(model: PreTrainedModel, files: list[Path]) -> dict[str, tuple[Path, str]] | None:
    """Return file and stored name of every tensor of ``model``; a name may have or lack the prefix of the base model."""
    stored: dict[str, Path] = {}
    for file in files:
        with open_safetensors(file) as inside:
            stored |= dict.fromkeys(inside.keys(), file)
    found, prefix = {}, f"{model.base_model_prefix}."
    table = ARCHITECTURES.get(model.config.model_type)
    for name in model.state_dict():
        names = [name]
        for pattern, other in table.stored if table else ():
            names += [re.sub(pattern, other, n) for n in names]
        names += [n.removeprefix(prefix) for n in names] + [prefix + n for n in names]
        there = next((n for n in names if n in stored), None)
        if there is not None:
            found[name] = (stored[there], there)
        elif name not in model.all_tied_weights_keys:
            return None
    return found
