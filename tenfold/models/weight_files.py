"""Files of weights: which ones belong to a checkpoint, and whether their tensors are those of its model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ValidationError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from tenfold.models.architectures import ARCHITECTURES
from tenfold.models.atomic_io import open_safetensors
from tenfold.models.gguf import is_gguf
from tenfold.models.sites import base_path
from tenfold.models.surgery import CONTAINER, factorized_layers

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MISMATCH = "its weights and its config.json do not belong together: save it again from the model"
Stored = dict[str, tuple[Path, tuple[int, ...], torch.dtype | None]]


def _check_name(name: str) -> str:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is no name of a safetensors file in the folder")
    return name


class WeightIndex(BaseModel):
    """``model.safetensors.index.json``: the file of every tensor."""

    weight_map: dict[str, Annotated[str, AfterValidator(_check_name)]]


def _read_index(path: Path) -> list[Path]:
    """Return the files that an index names.

    Raises:
        ValueError: it is damaged, or names a file outside of its folder.
    """
    try:
        index = WeightIndex.model_validate_json(path.read_bytes())
    except ValidationError as reason:
        words = reason.errors()[0]["msg"].removeprefix("Value error, ").rstrip(".")
        raise ValueError(f"{path} is no index of weights ({words}); copy it again") from None
    return [path.with_name(file) for file in sorted(set(index.weight_map.values()))]


def weight_files(name: str | Path) -> list[Path]:
    """Return the safetensors files of a folder or of a name on a hub, none where there are none; a single file comes first."""
    if is_gguf(name):
        return []
    if (folder := Path(name)).is_dir():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        return _read_index(folder / INDEX) if (folder / INDEX).is_file() else []
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if single := cached_file(str(name), SINGLE, **quiet):
        return [Path(single)]
    index = cached_file(str(name), INDEX, **quiet)
    return [Path(file) for file in get_checkpoint_shard_files(str(name), index)[0]] if index else []


def check_folder(folder: Path) -> None:
    """Raise FileNotFoundError if ``folder`` lacks config.json or a file of weights that its index names."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a folder that save_pretrained wrote")
    files = weight_files(folder)
    if not files and (pickled := next(folder.glob("pytorch_model*.bin"), None)):
        raise FileNotFoundError(
            f"{folder} holds its weights as {pickled.name}, which could run code; load them with transformers where you trust "
            "them, and give the folder that save_pretrained writes"
        )
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors); copy them there too")
    if missing := next((file for file in files if not file.is_file()), None):
        raise FileNotFoundError(f"{folder} lacks the weights {missing.name}; copy that file there too")


def read_headers(files: Iterable[str | Path]) -> Stored:
    """Return ``{name: (file, shape, dtype)}`` of the tensors in safetensors files, without reading them."""
    stored: Stored = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(key)
                stored[key] = (Path(path), tuple(part.get_shape()), str_to_torch_dtype.get(part.get_dtype()))
    return stored


def read_tensor(file: Path, key: str) -> Tensor:
    """Read one tensor."""
    with open_safetensors(file) as stored:
        return stored.get_tensor(key)


def match_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Return ``{name in the model: name in stored}`` of its tensors that are stored under their own names or renamed ones.

    transformers renames some, experts are named by ``ARCHITECTURES``, and any may have or lack the prefix of the base model.
    """
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    places = {rename_source_key(key, renamings, [])[0]: key for key in stored} | {key: key for key in stored}
    prefix, table = f"{model.base_model_prefix}.", ARCHITECTURES.get(model.config.model_type)
    found = {}
    for name in model.state_dict():
        names = [name]
        for pattern, other in table.stored if table else ():
            names += [re.sub(pattern, other, one) for one in names]
        names += [one.removeprefix(prefix) for one in names] + [prefix + one for one in names]
        if (there := next((one for one in names if one in places), None)) is not None:
            found[name] = places[there]
    return found


def check_factors(model: PreTrainedModel, stored: Stored) -> None:
    """Compare what the factorised layers of ``model``, which may be empty, need with the files.

    Raises:
        ValueError: a factor is missing, has another shape or is no floating-point number, or an index map is none.
    """
    missing, names = [], match_names(model, stored)
    for name, shape, limit, structure in _stored_factors(model):
        if (key := names.get(name)) is None:
            missing.append(name)
            continue
        file, found, dtype = stored[key]
        if found != shape:
            raise ValueError(
                f"{name} has shape {found}, but config.json says {structure}, which needs {shape}; restore the config.json "
                "that was saved with these weights"
            )
        if dtype not in (FLOATS if limit is None else (torch.int32,)):
            needed = "floating-point numbers" if limit is None else "int32"
            raise ValueError(f"{name} holds {dtype or 'numbers of an unknown type'}, not {needed}; copy {file} again")
        if limit is not None:
            places = read_tensor(file, key)
            if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < limit):
                raise ValueError(f"{name} has places that are not from 0 to {limit - 1}; copy {file} again")
            if len(places.unique()) < len(places):
                raise ValueError(f"{name} has the same place twice; copy {file} again")
    check_present(missing)


def check_present(missing: list[str]) -> None:
    """Raise ValueError if factors are ``missing``; a shared one may be named several times."""
    if missing := list(dict.fromkeys(missing)):
        raise ValueError(
            f"the checkpoint lacks {', '.join(missing[:4])} ({len(missing)} tensors of factorized layers); {MISMATCH}"
        )


def _stored_factors(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...], int | None, Any]]:
    """Yield name, shape, limit of an index map (None for a factor) and structure of what the layers read from files."""
    container = base_path(model) + CONTAINER
    for path, layer in factorized_layers(model):
        structure = layer.structure
        for name, shape in structure.factor_shapes().items():
            own = name not in layer.shared
            yield f"{path}.{name}" if own else f"{container}.{layer.shared[name]}", shape, None, structure
        limits = structure.index_limits()
        for name, shape in structure.index_shapes().items():
            yield f"{path}.{name}", shape, limits[name], structure
