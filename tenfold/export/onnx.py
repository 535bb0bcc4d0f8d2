"""Export to ONNX by transformers' own exporter: one graph, with dynamic batch and length, with and without a cache."""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from tenfold.export.card import Format, require
from tenfold.models.auto import load_model
from tenfold.models.model_card import save_config

ONNX_FILE = "model.onnx"
BATCH, LENGTH, PAST = 2, 3, 4  # of the traced example; every graph takes any others
LOAD = """import onnxruntime

session = onnxruntime.InferenceSession("{title}/model.onnx")
print([value.name for value in session.get_inputs()])  # a cache of length 0 stands for none"""


def write(name: str | Path, folder: Path) -> None:
    """Write the checkpoint ``name`` as ``model.onnx``, in float32, with its structures as they are.

    Inputs and outputs have the names that optimum and transformers.js use: ``input_ids``, ``attention_mask``, ``position_ids``,
    ``past_key_values.0.key``; ``logits``, ``present.0.key``.

    Raises:
        ImportError: a package is missing.
        ValueError: the model is an encoder and a decoder, or takes more than text.
    """
    require("onnx", "onnxscript", extra="onnx")
    model = load_model(name, torch.float32).eval()
    if model.config.is_encoder_decoder or model.config.get_text_config() is not model.config:
        raise ValueError(
            f"onnx holds models of one graph that read text, and this is a {type(model).__name__}; export to remote-code"
        )
    from transformers.exporters import OnnxConfig, OnnxExporter  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]

    exporter = OnnxExporter()
    with torch.no_grad(), _silent():
        program, _ = exporter.export_program(model, _example(model), OnnxConfig(dynamic=True))
    _rename(program.graph)
    exporter.save_program(program, folder / ONNX_FILE)
    model.config.__dict__.pop("quantization_config", None)
    save_config(model, folder)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Return inputs to trace ``model`` with; a decoder's continue a cache."""
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % model.config.vocab_size
    if not model.can_generate():
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    past = model(torch.ones(BATCH, PAST, dtype=torch.int64), use_cache=True).past_key_values
    if not isinstance(past, DynamicCache):
        raise ValueError(f"the cache of a {type(model).__name__} is a {type(past).__name__}; export to remote-code")
    mask, positions = torch.ones(BATCH, PAST + LENGTH, dtype=torch.int64), torch.arange(PAST, PAST + LENGTH)
    positions = positions.expand(BATCH, LENGTH).clone()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": past,
        "use_cache": True,
    }


def _rename(graph: Any) -> None:
    """Give the cache the names that optimum uses."""
    for values, prefix in ((graph.inputs, "past_key_values"), (graph.outputs, "present")):
        for value in values:
            if found := re.search(r"past_key_values\.layers\.(\d+)\.(key|value)s$", value.name):
                value.name = f"{prefix}.{found[1]}.{found[2]}"


@contextmanager
def _silent():
    """Hide what torch's exporter and its optimiser say."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


FORMAT = Format(
    write, "One ONNX graph for any batch and length, with a cache of keys and values (of length 0 at first).", LOAD
)
