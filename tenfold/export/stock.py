"""Export to a plain checkpoint that is smaller: one width everywhere, narrower blocks padded with zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tenfold.export.card import Format
from tenfold.export.dense import LOAD
from tenfold.export.trim import Part, find_parts, trim
from tenfold.export.weights import Weights, open_checkpoint, plain_weights
from tenfold.models.model_card import save_config
from tenfold.models.quantization_config import get_tenfold_config
from tenfold.models.stock import stock_config, stock_head_counts

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
    """Return ``weights`` with the widths of the widest block, as far as a configuration can say them, and a model to match."""
    model, sizes = weights.model, dict[str, int]()
    mlps, attentions = ([part for part in parts if part.family == family] for family in ("mlp", "attn"))
    if len({part.units for part in mlps}) == 1:
        width = max(len(part.used) for part in mlps)
        sizes["mlp"] = min(-(-width // ALIGNMENT) * ALIGNMENT, mlps[0].units)
    config = stock_config(model, sizes)
    groups = max((len(part.used) for part in attentions), default=0)
    if groups in stock_head_counts(model)[:-1]:
        sizes["heads"] = groups
        config = stock_config(model, sizes)
    elif config.model_type == "llama" and 0 < groups < config.num_key_value_heads:
        sizes["heads"] = groups
        config = _as_mistral(stock_config(model, sizes))
    of_part = {"mlp": sizes.get("mlp"), "attn": sizes.get("heads")}
    tensors, read = trim(
        weights, [part for part in parts if of_part[part.family]], lambda part: of_part[part.family] or 0
    )
    with torch.device("meta"):
        narrow: Any = getattr(transformers, (config.architectures or [""])[0])(config)
    wanted = {name: value.shape for name, value in narrow.state_dict().items() if name in tensors}
    if any(tensors[name].shape != shape for name, shape in wanted.items()):  # its configuration has no such key
        return weights
    if narrow.can_generate():
        narrow.generation_config = model.generation_config
    return Weights(narrow, tensors, read)


def _as_mistral(config: Any) -> Any:
    """Return the configuration of a Llama as that of a Mistral without a window, which is the same function.

    LlamaConfig wants a width that is a multiple of the number of heads.
    """
    if config.attention_bias or config.mlp_bias:
        raise ValueError(
            f"{config.num_attention_heads} heads don't divide the width {config.hidden_size}, which LlamaConfig wants, and "
            "Mistral, which takes them, has no biases; export to dense"
        )
    settings = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    settings["architectures"] = [one.replace("Llama", "Mistral") for one in config.architectures]
    return transformers.AutoConfig.for_model("mistral", **settings | {"sliding_window": None})


FORMAT = Format(
    write,
    "A plain checkpoint with the width of the widest block: narrower ones are padded with zeros, which is exact.",
    LOAD,
)
