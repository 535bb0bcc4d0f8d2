"""Reading checkpoints: what the quantizer does (``tenfold.models.hf_quantizer``), and the stricter ``from_pretrained``.

``config.json`` keeps its ``model_type`` and says in ``quantization_config`` which sites have which structures
(``tenfold.models.checkpoint_format``). Nothing is ever unpickled.

The quantizer refuses factors that are missing or have another shape or type, unknown structures and newer formats. It can't
see a missing file, or ordinary tensors that are missing, left over or of another shape, which transformers only warns of:
``from_pretrained`` refuses them.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForPreTraining, GgufConfig, PreTrainedModel
from transformers.utils import logging

from tenfold.models.checkpoint_format import describe, read_plan
from tenfold.models.configuration import build_model, model_class, naming, read_config
from tenfold.models.gguf import is_gguf, is_path, resolve_gguf
from tenfold.models.quantization_config import TenfoldConfig
from tenfold.models.sites import FACTORIZED
from tenfold.models.surgery import CONTAINER, install_empty
from tenfold.models.weight_files import MISMATCH, check_factors, check_folder, check_present, read_headers

PER_BYTE = 16  # parameters; no quantisation stores as many


def install_layers(model: PreTrainedModel, config: TenfoldConfig, files: Iterable[str | Path]) -> None:
    """Put empty factorized layers into ``model``, whose weights are about to be read from ``files``.

    Raises:
        ValueError: a stored factor is missing, or is not what its structure in ``config`` needs.
    """
    install_empty(model, read_plan(model, config))
    files = list(files)
    if files and all(str(path).endswith(".safetensors") for path in files):
        check_factors(model, read_headers(files))


def finish_loading(model: PreTrainedModel, config: TenfoldConfig) -> None:
    """Make ``model`` an ordinary one once its weights are read, which trains, casts and saves like any other.

    Raises:
        ValueError: a factor was not read; transformers marks the tensors that it has read.
    """
    check_present(
        [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, FACTORIZED) or path.split(".")[-1] == CONTAINER
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)  # offloaded tensors are on meta
        ]
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
    name: str | Path, kind: Any = AutoModelForCausalLM, new_head: bool = True, **kwargs
) -> PreTrainedModel:
    """Load ``kind.from_pretrained(name)``, and refuse what the plain loader would load wrongly.

    Args:
        name: a folder, a GGUF file, or a name on a hub.
        kind: an Auto class or a model class.
        new_head: let a class that is not the checkpoint's own have a head that the checkpoint lacks, with a warning.

    Raises:
        FileNotFoundError: the folder, its config.json or a shard is missing.
        ValueError: tensors are missing, left over or of another shape or type than the configuration says.
    """
    model, new = load_with_head(name, kind, **kwargs)
    if new and not new_head:
        raise ValueError(
            f"{name} lacks {', '.join(new[:4])} ({len(new)} tensors) of a {type(model).__name__}, which would be random; "
            "copy its files again, or, where that is wanted, load it as such a model and save that"
        )
    if new:
        warnings.warn(
            f"{name} has no {', '.join(new[:4])}: this head of a {type(model).__name__} is new, so train it first",
            stacklevel=2,
        )
    return model


def load_with_head(
    name: str | Path, kind: Any, heads: tuple[str, ...] = (), **kwargs
) -> tuple[PreTrainedModel, list[str]]:
    """Load as ``from_pretrained`` does, and return also the names of the tensors of a new head, which are random.

    Args:
        heads: beginnings of the names of tensors that may have another shape in the checkpoint, and are new then.
    """
    place, where = resolve_gguf(name)
    if is_gguf(name):
        warnings.warn(f"{name} is dequantised: its weights are ordinary matrices from here on", stacklevel=3)
        where["quantization_config"] = GgufConfig(dequantize=True)
    elif is_path(name):
        check_folder(Path(name))
    given = {"trust_remote_code": False} | where | kwargs
    config = read_config(name, given["trust_remote_code"])
    if is_path(name) and not is_gguf(name):
        _check_size(Path(name), config)
    given |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with naming(name), short_class_errors(kind):
        try:
            with silent(reports=False):  # what is wrong is refused below
                model, report = kind.from_pretrained(place, **given)
        except SafetensorError as reason:
            raise ValueError(
                f"{name} holds a file that is no whole file of safetensors ({reason}); copy it again"
            ) from None
        return model, _check_report(name, model, config, report, heads)


def _check_size(folder: Path, config: Any) -> None:
    """Raise ValueError if the model of ``config`` is larger than what the folder holds, before its memory is asked for."""
    held, numel = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()), 0
    with suppress(Exception), torch.device("meta"), silent(reports=False):  # what is damaged is refused when it is read
        numel = sum(parameter.numel() for parameter in build_model(copy.deepcopy(config)).parameters())
    if numel > PER_BYTE * held:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of {numel:,} parameters, but its folder holds {held:,} bytes; "
            "copy its files again"
        )


def _check_report(
    name: str | Path, model: PreTrainedModel, config: Any, report: dict[str, Any], heads: tuple[str, ...]
) -> list[str]:
    """Return the tensors of a new head among those that transformers ``report``s, once all others are right.

    Only what the checkpoint's own class lacks is a new head, and only what another class of the architecture has may be left
    over: a head, or a pooler.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    resized = sorted(report["mismatched_keys"])
    new = [key for key, *_ in resized if key.startswith(heads)] if heads else []
    resized = [f"{key} of shape {tuple(a)} for {tuple(b)}" for key, a, b in resized if key not in new]
    is_plain = type(model).__module__.startswith("transformers.")  # no class of code that came with the model
    own = model_class(config, type(model)) if is_plain else type(model)
    if missing and own is not type(model):
        known = _names_of(config, own)
        new += [key for key in missing if _bare(model, key) not in known]
        missing = [key for key in missing if key not in new]
    if unexpected:
        known = set().union(*(_names_of(config, one) for one in (own, AutoModel, AutoModelForPreTraining)))
        unexpected = [key for key in unexpected if _bare(model, key) not in known]
    wrong = [f"lacks {', '.join(missing[:4])} ({len(missing)} tensors)"] if missing else []
    wrong += [f"has {', '.join(unexpected[:4])} ({len(unexpected)} tensors) left over"] if unexpected else []
    wrong += [f"has {', '.join(resized[:4])}"] if resized else []
    if wrong:
        raise ValueError(f"{name} {' and '.join(wrong)}; {MISMATCH}")
    return new


def _bare(model: PreTrainedModel, key: str) -> str:
    return key.removeprefix(f"{model.base_model_prefix}.")


def _names_of(config: Any, kind: Any) -> set[str]:
    """Return the names of the tensors of a class, without the prefix of the base model; none where there is no such class."""
    config = copy.deepcopy(config)
    config.architectures = None
    with suppress(ValueError), torch.device("meta"), silent(reports=False):
        model = build_model(config, kind)
        return {_bare(model, key) for key in model.state_dict()}
    return set()


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
