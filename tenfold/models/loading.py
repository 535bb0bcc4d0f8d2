"""Reading checkpoints: what the quantizer does (``tenfold.models.hf_quantizer``), and the stricter ``from_pretrained``.

``config.json`` keeps its ``model_type`` and says in ``quantization_config`` which sites have which structures
(``tenfold.models.checkpoint_format``). Nothing is ever unpickled.

The quantizer refuses factors that are missing or have another shape, unknown structures and newer formats. It can't see a
missing file, or missing tensors of the ordinary layers, which transformers only warns of and initialises at random:
``from_pretrained`` refuses them.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from tenfold.models.atomic_io import open_safetensors
from tenfold.models.checkpoint_format import describe, read_plan, read_structures
from tenfold.models.gguf import is_gguf, is_path, resolve_gguf
from tenfold.models.quantization_config import TenfoldConfig, get_tenfold_config
from tenfold.models.sites import FACTORIZED
from tenfold.models.surgery import CONTAINER, install_empty

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MISMATCH = "its weights and its config.json do not belong together: save it again from the model"


def install_layers(model: PreTrainedModel, config: TenfoldConfig, files: Iterable[str | Path]) -> None:
    """Put empty factorized layers into ``model``, whose weights are about to be read from ``files``.

    Raises:
        ValueError: a stored factor has another shape than its structure in ``config``.
    """
    shapes = {}
    for path in files:
        if str(path).endswith(".safetensors"):
            with open_safetensors(path) as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    for path, structure in read_structures(config).items():
        for factor, shape in {**structure.factor_shapes(), **structure.index_shapes()}.items():
            key = f"{path}.{factor}"
            if shapes.get(key, shape) != shape:
                raise ValueError(
                    f"{key} has shape {shapes[key]}, but config.json says {structure}, which needs {shape}; restore "
                    "the config.json that was saved with these weights"
                )
    install_empty(model, read_plan(model, config))


def finish_loading(model: PreTrainedModel, config: TenfoldConfig) -> None:
    """Make ``model`` an ordinary one once its weights are read, which trains, casts and saves like any other.

    Raises:
        ValueError: no file held a factor; transformers marks the tensors that it has read.
    """
    unread = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, FACTORIZED) or path.split(".")[-1] == CONTAINER
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)  # offloaded tensors are on meta
    ]
    if unread:
        raise ValueError(
            f"the checkpoint lacks {', '.join(unread[:4])} ({len(unread)} tensors of factorized layers); {MISMATCH}"
        )
    for layer in model.modules():
        if isinstance(layer, FACTORIZED):
            layer.freeze()
    model.config.quantization_config = describe(model, config.recipe)
    vars(model)["is_quantized"] = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    del model.hf_quantizer, model.quantization_method  # save_pretrained would discard a caller's state_dict


def from_pretrained(
    name: str | Path, kind: Any = AutoModelForCausalLM, whole: bool = False, **kwargs
) -> PreTrainedModel:
    """Load ``kind.from_pretrained(name)``, and refuse what the plain loader would load wrongly.

    Args:
        name: a folder, a GGUF file, or a name on a hub.
        kind: an Auto class or a model class.
        whole: also refuse a dense model that lacks tensors, and one of another class, which lacks its head.

    Raises:
        FileNotFoundError: the folder, its config.json or a shard is missing.
        ValueError: tensors are missing, a factor has another shape than its structure, or the format is not known.
    """
    place, where = resolve_gguf(name)
    if is_gguf(name):
        warnings.warn(f"{name} is dequantised: its weights are ordinary matrices from here on", stacklevel=2)
        where["quantization_config"] = GgufConfig(dequantize=True)
    elif is_path(name):
        check_folder(Path(name))
    try:
        with short_class_errors(kind):
            model, report = kind.from_pretrained(place, output_loading_info=True, **where, **kwargs)
    except SafetensorError as reason:
        raise ValueError(
            f"{name} holds a file that is no whole file of safetensors ({reason}); copy it again"
        ) from None
    missing = sorted(report["missing_keys"])
    if missing and whole:
        raise ValueError(
            f"{name} lacks {', '.join(missing[:4])} ({len(missing)} tensors) of a {type(model).__name__}, which would be random; "
            "copy its files again, or, where that is wanted, load it as such a model and save that"
        )
    same = type(model).__name__ in (model.config.architectures or ())  # another class brings a new head, rightly
    if missing and same and get_tenfold_config(model.config) is not None:
        left = sorted(report["unexpected_keys"])
        raise ValueError(
            f"{name} lacks {', '.join(missing[:4])} ({len(missing)} tensors) and has {', '.join(left[:4]) or 'none'} "
            f"left over; {MISMATCH}"
        )
    return model


@contextmanager
def short_class_errors(kind: Any):
    """Shorten the error that transformers has no such model, which lists a hundred classes for which it has one."""
    try:
        yield
    except ValueError as reason:
        found = re.match(r"Unrecognized configuration class .*?(\w+)Config\b", str(reason))
        if found is None:
            raise
        raise ValueError(
            f"transformers has no {kind.__name__} of {found[1]}; take a model that it has one of"
        ) from None


@contextmanager
def silent(reports: bool = True):
    """Hide the progress bars of transformers and, without ``reports``, all below an error."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not reports:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def check_folder(folder: Path) -> None:
    """Raise FileNotFoundError if ``folder`` lacks config.json or a file of weights that its index names."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a folder that save_pretrained wrote")
    files = weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors); copy them there too")
    if missing := next((file for file in files if not file.is_file()), None):
        raise FileNotFoundError(f"{folder} lacks the weights {missing.name}; copy that file there too")


def weight_files(name: str | Path) -> list[Path]:
    """Return the safetensors files of a folder or of a name on a hub, none where there are none."""
    if is_gguf(name):
        return []
    if Path(name).is_dir():
        index = Path(name) / INDEX
        if index.is_file():
            return [Path(name) / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        return [path for path in [Path(name) / SINGLE] if path.is_file()]
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if single := cached_file(str(name), SINGLE, **quiet):
        return [Path(single)]
    index = cached_file(str(name), INDEX, **quiet)
    return [Path(file) for file in get_checkpoint_shard_files(str(name), index)[0]] if index else []


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """Return ``folder`` if a result may be written there: new, empty, or ``overwrite``."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, and the result is a folder; choose another name")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} is there already and not empty; choose another folder or add --overwrite")
    return path
