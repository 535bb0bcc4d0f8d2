"""Export to a plain checkpoint that is smaller: one width everywhere, narrower blocks padded with zeros."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers

from tenfold.export.card import Format
from tenfold.export.dense import LOAD
from tenfold.export.trim import Part, find_parts, trim
from tenfold.export.weights import Weights, open_checkpoint, plain_weights
from tenfold.models.model_card import save_config
from tenfold.models.quantization_config import get_tenfold_config

# model_type -> the setting that is the width of its MLPs
WIDTHS = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi", "gpt_neox", "bert", "roberta", "albert"),
    "intermediate_size",
) | {"gpt2": "n_inner", "opt": "ffn_dim", "t5": "d_ff"}
HEADS = ("llama", "mistral", "qwen3")  # whose size of a head does not follow from the number of heads
ALIGNMENT = 8  # of widths, which matrix products on GPUs like


def write(name: str | Path, folder: Path) -> None:
    """Write the checkpoint ``name`` as a plain one with the width of its widest block.

    Raises:
        ValueError: that is no smaller than the dense checkpoint.
    """
    with open_checkpoint(name) as checkpoint:
        weights = plain_weights(checkpoint)
        weights.model.config.dtype = checkpoint.dtype
        narrow = to_one_width(weights, find_parts(weights))
        if narrow.numel == weights.numel and get_tenfold_config(checkpoint.model.config) is not None:
            raise ValueError(
                f"{name} has no width that is smaller in every block, so that stock would be as large as dense; export to dense, "
                "or to remote-code, which stays small"
            )
        narrow.save(folder)
        save_config(narrow.model, folder)


def to_one_width(weights: Weights, parts: list[Part]) -> Weights:
    """Return ``weights`` with the widths of the widest block, and a model to match."""
    config = copy.deepcopy(weights.model.config)
    if config.model_type not in WIDTHS:
        return weights
    mlps, attentions = ([part for part in parts if part.family == family] for family in ("mlp", "attn"))
    sizes = {part.family: part.units for part in parts}
    if len({part.units for part in mlps}) == 1:
        width = max(len(part.used) for part in mlps)
        sizes["mlp"] = min(-(-width // ALIGNMENT) * ALIGNMENT, mlps[0].units)
        setattr(config, WIDTHS[config.model_type], sizes["mlp"])
    groups = max((len(part.used) for part in attentions), default=0)
    if config.model_type in HEADS and groups < config.num_key_value_heads:
        sizes["attn"] = groups
        config = _with_groups(config, groups)
    kept = [part for part in parts if part.family == "mlp" or config.model_type in HEADS]
    tensors, read = trim(weights, kept, lambda part: sizes[part.family])
    with torch.device("meta"):
        model = getattr(transformers, (config.architectures or [""])[0])(config)
    if model.can_generate():
        model.generation_config = weights.model.generation_config
    return Weights(model, tensors, read)


def _with_groups(config, groups: int):
    """Return ``config`` with ``groups`` key and value heads.

    LlamaConfig wants a width that is a multiple of the number of heads; a Mistral without a window is the same function.
    """
    each = config.num_attention_heads // config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = config.to_dict() | {
        "num_attention_heads": each * groups,
        "num_key_value_heads": groups,
        "head_dim": size,
    }
    settings.pop("model_type")
    settings["architectures"] = list(config.architectures)
    kind = config.model_type
    if kind == "llama" and config.hidden_size % (each * groups):
        if config.attention_bias or config.mlp_bias:
            raise ValueError(
                f"{each * groups} heads don't divide the width {config.hidden_size}, which LlamaConfig wants, and Mistral, which "
                "takes them, has no biases; export to dense"
            )
        kind, settings["sliding_window"] = "mistral", None
        settings["architectures"] = [one.replace("Llama", "Mistral") for one in config.architectures]
    return transformers.AutoConfig.for_model(kind, **settings)


FORMAT = Format(
    write,
    "A plain checkpoint with the width of the widest block: narrower ones are padded with zeros, which is exact.",
    LOAD,
)
