"""Export to GGUF for llama.cpp: one width as the model's own architecture, widths that differ per block as ``deci``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tenfold.export.card import Format, require
from tenfold.export.gguf_tokenizer import add_tokenizer
from tenfold.export.stock import to_one_width
from tenfold.export.trim import Part, find_parts, trim
from tenfold.export.weights import Weights, open_checkpoint, plain_weights
from tenfold.models.auto import load_tokenizer

OUTTYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
Q8_BLOCK = 32  # elements of a row that Q8_0 scales together
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class Arch:
    """An architecture of llama.cpp.

    Args:
        name: in GGUF.
        activations: of its MLP.
        pairs: whether rotary positions turn neighbouring dimensions, so that the rows of query and key are permuted.
        free: whether widths and heads may differ per block, as ``deci``, which has such pairs.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    pairs: bool = False
    free: bool = False


# model_type -> the architecture
ARCHS = {
    "llama": Arch("llama", pairs=True, free=True),
    "mistral": Arch("llama", pairs=True, free=True),
    "qwen2": Arch("qwen2", free=True),
    "qwen3": Arch("qwen3"),
    "gpt2": Arch("gpt2", ("gelu_new", "gelu_pytorch_tanh")),
}
DECI = Arch("deci", pairs=True)


def write(name: str | Path, folder: Path, outtype: str = "f16") -> None:
    """Write the checkpoint ``name`` as one GGUF file, one tensor in memory.

    Args:
        outtype: of matrices: ``f32``, ``f16`` or ``q8_0``; vectors stay in float32.

    Raises:
        ImportError: the package gguf is missing.
        ValueError: llama.cpp has no such architecture, or the tokenizer is of another kind; the nearest format is named.
    """
    require("gguf", extra="gguf")
    if outtype not in OUTTYPES:
        raise ValueError(f"outtype is {outtype!r}; it must be one of {', '.join(OUTTYPES)}")
    with open_checkpoint(name) as checkpoint:
        check_architecture(checkpoint.model.config)
        weights = plain_weights(checkpoint)
        arch, weights, parts = _choose(weights, find_parts(weights), Q8_BLOCK if outtype == "q8_0" else 1)
        _write_file(folder / GGUF_FILE, arch, weights, _settings(weights, arch, parts), load_tokenizer(name), outtype)


def check_architecture(config: Any) -> None:
    """Raise ValueError for a model that no architecture of llama.cpp computes."""
    arch = ARCHS.get(config.model_type)
    if arch is None:
        raise ValueError(
            f"gguf holds models of type {', '.join(ARCHS)}, and this is a {config.model_type}; export to onnx"
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if activation not in arch.activations:
        raise ValueError(
            f"llama.cpp computes {' or '.join(arch.activations)} in a {arch.name}, not {activation}; export to onnx"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "llama3"):
        raise ValueError(f"gguf holds rotary positions of type default and llama3, not {rope}; export to onnx")


def _choose(weights: Weights, parts: list[Part], block: int) -> tuple[Arch, Weights, list[tuple[str, int]]]:
    """Return the architecture, the weights in its shapes, and ``(family, units)`` of every part."""
    arch = ARCHS[weights.model.config.model_type]
    biased = any(key.endswith("q_proj.bias") for key in weights.tensors)  # deci wants biases of the full width

    def size(part: Part) -> int:
        if part.family == "attn":
            return part.units if biased else len(part.used)
        return min(-(-len(part.used) // block) * block, part.units)

    sizes = [(part.family, size(part)) for part in parts]
    if arch.free and len(set(sizes)) > 2:
        tensors, read = trim(weights, parts, size)
        return DECI, Weights(weights.model, tensors, read), sizes
    narrow = to_one_width(weights, parts)
    shape = {"attn": getattr(narrow.model.config, "num_key_value_heads", None), "mlp": _mlp_width(narrow.model.config)}
    return arch, narrow, [(part.family, shape[part.family]) for part in parts]


def _mlp_width(config: Any) -> int:
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.n_embd
    return config.intermediate_size


def _settings(weights: Weights, arch: Arch, parts: list[tuple[str, int]]) -> dict[str, Any]:
    """Return ``{method of GGUFWriter without add_: value}``."""
    config = weights.model.config
    widths, groups = ([units for family, units in parts if family == wanted] for wanted in ("mlp", "attn"))
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "feed_forward_length": widths if arch is DECI else _mlp_width(config),
    }
    if arch.name == "gpt2":
        return settings | {"head_count": config.n_head, "layer_norm_eps": config.layer_norm_epsilon}
    each = config.num_attention_heads // config.num_key_value_heads
    size = head_size(config)
    heads = {"head_count": [each * n for n in groups], "head_count_kv": groups}
    if arch is not DECI:
        heads = {"head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads}
    return settings | heads | {
        "key_length": size,
        "value_length": size,
        "rope_dimension_count": size,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
    }  # fmt: skip


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_file(path: Path, arch: Arch, weights: Weights, settings: dict[str, Any], tokenizer, outtype: str) -> None:
    import gguf

    kinds, config = gguf.GGMLQuantizationType, weights.model.config
    writer = gguf.GGUFWriter(path, arch.name)
    for key, value in settings.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[outtype])
    add_tokenizer(writer, tokenizer, config.vocab_size)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    extra = _rope_factors(config)
    plan: list[tuple[str, Any]] = []
    for key, tensor in weights.tensors.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{arch.name} in GGUF has no place for {key}; export to remote-code")
        shape = tuple(tensor.shape[::-1] if weights.is_transposed(key) else tensor.shape)
        kind = kinds[OUTTYPES[outtype]] if len(shape) == 2 and not name.startswith("position_embd") else kinds.F32
        kind = kinds.F16 if kind == kinds.Q8_0 and shape[-1] % Q8_BLOCK else kind
        _add_info(writer, name, shape, kind)
        plan.append((key, kind))
    if extra is not None:
        _add_info(writer, "rope_freqs.weight", extra.shape, kinds.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, kind in plan:
        value = weights.read(key)
        value = _pair_rows(value, key, config) if arch.pairs else value.T if weights.is_transposed(key) else value
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(value.float().numpy()), kind))
    if extra is not None:
        writer.write_tensor_data(extra.numpy())
    writer.close()


def _add_info(writer, name: str, shape: tuple[int, ...], kind) -> None:
    from gguf import quant_shape_to_byte_shape

    itemsize = {"F32": 4, "F16": 2}.get(kind.name)
    stored = shape if itemsize else quant_shape_to_byte_shape(shape, kind)
    dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
    writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, kind)


def _pair_rows(value: Tensor, key: str, config: Any) -> Tensor:
    """Return a query or key matrix whose heads hold dimension ``i`` and ``i + size / 2`` next to each other."""
    if not key.rpartition(".")[0].endswith((".q_proj", ".k_proj")):
        return value
    rest = value.shape[1:]
    return value.reshape(-1, 2, head_size(config) // 2, *rest).transpose(1, 2).reshape(-1, *rest)


def _rope_factors(config: Any) -> Tensor | None:
    """Return what llama.cpp divides the plain frequencies by, None where they are plain."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        return None
    size = head_size(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    return plain / ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))[0]


FORMAT = Format(
    write,
    "One file for llama.cpp and what is built on it.",
    f"llama-cli -m {{title}}/{GGUF_FILE}",
    library="gguf",
    language="sh",
    options=("outtype",),
)
