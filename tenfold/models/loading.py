"""Reading and writing checkpoints: what the loading hook does (:mod:`tenfold.models.hf_quantizer`), and the guard.

``config.json`` keeps its ``model_type`` and says in ``quantization_config`` which sites have which structures
(:mod:`tenfold.models.checkpoint_format`). Nothing is ever unpickled.

The hook refuses factors that are missing or have another shape, unknown structures and newer formats. What it
can't see is left to the guard :func:`from_pretrained`: a missing file, and missing tensors of the ordinary layers,
which transformers only warns of and draws at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tenfold.models.atomic_io import opened
from tenfold.models.checkpoint_format import FoldedConfig, describe, folded_config, stored_plan, structures
from tenfold.models.gguf import dequantized, is_gguf, resolve_gguf
from tenfold.models.sites import FOLDED
from tenfold.models.surgery import CONTAINER, install_empty

APART = "its weights and its config.json do not belong together: save it again from the model"


def check_stored(config: FoldedConfig) -> None:
    """Raise ValueError for a format or a structure that is not known."""
    structures(config)


def make_room(model: PreTrainedModel, config: FoldedConfig, files: Iterable[str | Path]) -> None:
    """Put empty factorized layers into ``model``, whose weights are about to be read from ``files``."""
    check_shapes(config, stored_shapes(files))
    install_empty(model, stored_plan(model, config))


def step_aside(model: PreTrainedModel, config: FoldedConfig) -> None:
    """After the weights are read: the model is an ordinary one from here on, it trains, casts and saves like any other."""
    check_read(model)
    for layer in model.modules():
        if isinstance(layer, FOLDED):
            layer.freeze()
    model.config.quantization_config = describe(model, config.recipe)
    model.is_quantized = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    del model.hf_quantizer, model.quantization_method  # save_pretrained would discard a caller's state_dict


def check_read(model: PreTrainedModel) -> None:
    """Raise ValueError for factors that no file held: transformers marks what it has read."""
    unread = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, FOLDED) or path.split(".")[-1] == CONTAINER
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)  # offloaded tensors are on meta
    ]
    if unread:
        raise ValueError(
            f"the checkpoint lacks {', '.join(unread[:4])} ({len(unread)} tensors of folded layers); {APART}"
        )


def stored_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in safetensors ``files``, from their headers alone."""
    shapes = {}
    for path in files:
        if str(path).endswith(".safetensors"):
            with opened(path) as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    return shapes


def check_shapes(config: FoldedConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a stored factor that has another shape than its structure in ``config``."""
    for path, structure in structures(config).items():
        for factor, shape in {**structure.factor_shapes(), **structure.index_shapes()}.items():
            key = f"{path}.{factor}"
            if shapes.get(key, shape) != shape:
                raise ValueError(
                    f"{key} has shape {shapes[key]}, but config.json says {structure}, which needs {shape}; restore "
                    "the config.json that was saved with these weights"
                )


def from_pretrained(
    name: str | Path, kind: Any = AutoModelForCausalLM, whole: bool = False, **kwargs
) -> PreTrainedModel:
    """``kind.from_pretrained(name)`` that refuses what the plain loader would load wrongly.

    Args:
        name: a folder, a GGUF file, or a name on a hub.
        kind: an Auto class or a model class.
        whole: a dense model that lacks tensors is refused, too, and one of another class, whose head is not there.

    Raises:
        FileNotFoundError: the folder, its config.json or a shard is missing.
        ValueError: tensors are missing, a factor has another shape than its structure, or the format is not known.
    """
    place, where = resolve_gguf(name)
    if is_gguf(name):
        where |= dequantized(name)
    elif Path(name).exists() or str(name).startswith((".", "/", "~")):
        check_folder(Path(name))
    try:
        with of_a_kind(kind):
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
    if missing and same and folded_config(model.config) is not None:
        left = sorted(report["unexpected_keys"])
        raise ValueError(
            f"{name} lacks {', '.join(missing[:4])} ({len(missing)} tensors) and has {', '.join(left[:4]) or 'none'} "
            f"left over; {APART}"
        )
    return model


@contextmanager
def of_a_kind(kind: Any):
    """That transformers has no such model, without the hundred classes for which it has one."""
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
    """No progress bar of transformers, and without ``reports`` nothing below an error: libraries are silent."""
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
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} lacks the weights {name}; copy that file there too")
    elif not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors); copy them there too")


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """``folder`` if a result may be written there: new, empty, or ``overwrite``."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
        raise FileExistsError(f"{path} is there already and not empty; choose another folder or add --overwrite")
    return path
