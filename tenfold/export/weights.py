"""Weights of the plain model that a checkpoint stands for, read and written one tensor at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.atomic_io import open_safetensors
from tenfold.models.auto import load_model
from tenfold.models.densify import pad_to
from tenfold.models.lazy_checkpoint import LazyCheckpoint, open_lazy
from tenfold.models.sites import FACTORIZED, base_path
from tenfold.models.surgery import CONTAINER
from tenfold.models.weight_files import INDEX
from tenfold.nn import Experts
from tenfold.structure import Structure

MAX_SHARD_SIZE = "500MB"  # safetensors copies a shard to write it


@dataclass(frozen=True)
class Weights:
    """Tensors of a model by name.

    Args:
        model: the model on the meta device, whose configuration goes with the tensors.
        tensors: ``{name: tensor on the meta device}`` of what ``read`` can read.
        read: returns the tensor of a name.
    """

    model: PreTrainedModel
    tensors: dict[str, Tensor]
    read: Callable[[str], Tensor]

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def is_transposed(self, key: str) -> bool:
        """Return whether a tensor is a matrix that is stored ``(in, out)``."""
        path, _, leaf = key.rpartition(".")
        return leaf == "weight" and isinstance(self.model.get_submodule(path), Conv1D)

    def save(self, folder: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        """Write all tensors to ``folder`` as safetensors, with at most one shard in memory."""
        plan = split_torch_state_dict_into_shards(self.tensors, max_shard_size=max_shard_size)
        for file, names in plan.filename_to_tensors.items():
            save_file({name: self.read(name).contiguous() for name in names}, folder / file, {"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=1))


@contextmanager
def open_checkpoint(name: str | Path) -> Iterator[LazyCheckpoint]:
    """Open a checkpoint whose tensors are read one by one; one whose files name them otherwise is rewritten to be read so."""
    checkpoint = open_lazy(name)
    if checkpoint is not None:
        yield checkpoint
        return
    with TemporaryDirectory() as scratch:
        load_model(name).save_pretrained(scratch, save_original_format=False, max_shard_size=MAX_SHARD_SIZE)
        checkpoint = open_lazy(scratch)
        if checkpoint is None:
            raise ValueError(
                f"the tensors of {name} don't have the names of its model; save it again with save_pretrained"
            )
        yield checkpoint


def plain_weights(checkpoint: LazyCheckpoint) -> Weights:
    """Return the weights of the plain model of full size.

    Raises:
        ValueError: a layer has no matrix, or is more than the plain model can hold; the nearest format is named.
    """
    model = checkpoint.model
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, FACTORIZED)}
    for path, layer in layers.items():
        if not isinstance(layer.structure, Structure):
            raise ValueError(
                f"{path} has no matrix: {layer.structure.kind} has a non-linearity between its factors; export to remote-code"
            )
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ValueError("a mixture of experts is not read tensor by tensor; export to dense")
    twin = _meta_twin(model)
    checkpoint.load(base_path(model) + CONTAINER)
    tensors = {}
    for key, tensor in twin.state_dict().items():
        path = key.rpartition(".")[0]
        if key in checkpoint.files or path in layers:
            dtype = checkpoint.dtype if tensor.is_floating_point() else tensor.dtype
            tensors[key] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    for path, layer in layers.items():
        if getattr(layer, "bias", None) is not None and f"{path}.bias" not in tensors:
            raise ValueError(f"{path} has a bias where {type(model).__name__} has none; export to remote-code")

    @torch.no_grad()
    def read(key: str) -> Tensor:
        (path, _, leaf), like = key.rpartition("."), tensors[key]
        if leaf == "weight" and path in layers:
            checkpoint.load(path)
            value = layers[path].dense()
            value = (value.T if isinstance(twin.get_submodule(path), Conv1D) else value).to(like.dtype)
            checkpoint.drop(path)
        elif key in checkpoint.files:
            value = read_stored(checkpoint, key)
        else:
            value = torch.zeros(like.shape, dtype=like.dtype)  # of a bias that the recipe dropped
        return pad_to(value, like.shape)

    return Weights(twin, tensors, read)


def read_stored(checkpoint: LazyCheckpoint, key: str) -> Tensor:
    """Return a tensor as the file has it, in the dtype of the checkpoint."""
    file, stored_key = checkpoint.files[key]
    with open_safetensors(file) as stored:
        value = stored.get_tensor(stored_key)
    return value.to(checkpoint.dtype) if value.is_floating_point() else value


def _meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return the plain model on the meta device, with the generation settings of ``model``."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        twin = type(model)(config)
    if model.can_generate():
        twin.generation_config = model.generation_config
    return twin
