"""Export with a modelling file beside the weights: every structure as it is, in a process without tenfold."""

from __future__ import annotations

import json
import string
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from torch import Tensor

from tenfold.export.card import Format
from tenfold.export.weights import Weights, open_checkpoint, read_stored
from tenfold.models.lazy_checkpoint import LazyCheckpoint
from tenfold.models.sites import FACTORIZED, base_model
from tenfold.models.surgery import CONTAINER
from tenfold.nn import Experts, FactorizedEmbedding, TiedEmbedding, TiedHead
from tenfold.structure import Structure
from tenfold.structure.einsum_spec import EinsumSpec

FILE = "modeling_tenfold"
AUTO_CLASSES = {  # what loads a model -> the classes of models by their configurations
    "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForMaskedLM": transformers.MODEL_FOR_MASKED_LM_MAPPING,
    "AutoModelForSeq2SeqLM": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForSequenceClassification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
LOAD = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)"""


def write(name: str | Path, folder: Path) -> None:
    """Write the checkpoint ``name`` with its factors as they are, and ``modeling_tenfold.py``, one shard in memory.

    Raises:
        ValueError: transformers has no Auto class for the model, or it is a mixture of experts.
    """
    with open_checkpoint(name) as checkpoint:
        _write(checkpoint, folder)


def _write(checkpoint: LazyCheckpoint, folder: Path) -> None:
    model, head = checkpoint.model, type(checkpoint.model).__name__
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ValueError("remote-code holds no mixture of experts; export to dense")
    kind: Any = transformers.MODEL_MAPPING[type(model.config)]
    base = kind.__name__
    autos = [auto for auto, kinds in AUTO_CLASSES.items() if kinds.get(type(model.config), None) is type(model)]
    if not autos and head != base:
        raise ValueError(
            f"remote-code loads by {', '.join(AUTO_CLASSES)}, and a {head} by none of them; export to dense"
        )
    config = type(model.config).__name__
    names = {
        "head": head, "base": base, "config": config, "imports": sorted({head, base, config}),
        "model_type": f"tenfold_{model.config.model_type}",
    }  # fmt: skip
    template = resources.files("tenfold") / "export" / "modeling.py.jinja"
    text = jinja2.Template(template.read_text(), keep_trailing_newline=True, trim_blocks=True).render(names)
    (folder / f"{FILE}.py").write_text(text)
    weights, layers = _collect(checkpoint)
    weights.save(folder)
    auto_map = {"AutoConfig": f"Tenfold{config}", "AutoModel": f"Tenfold{base}"}
    auto_map |= dict.fromkeys(autos, f"Tenfold{head}")
    settings = model.config.to_diff_dict() | layers | {
        "model_type": names["model_type"],
        "architectures": [f"Tenfold{head}"],
        "auto_map": {auto: f"{FILE}.{kind}" for auto, kind in auto_map.items()},
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
    }  # fmt: skip
    settings.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _collect(checkpoint: LazyCheckpoint) -> tuple[Weights, dict[str, Any]]:
    """Return the tensors by their names in the modelling file, and the settings that describe its layers."""
    model, stored = checkpoint.model, {}
    layers, maps, taken = {}, {}, set()
    for path, layer in model.named_modules():
        if isinstance(layer, FACTORIZED):
            layers[path], names = _describe(checkpoint, path, layer, maps)
            stored |= names
            taken |= {f"{path}.{name}" for name in layer.state_dict()} - {f"{path}.bias"}
    stored |= {key: key for key in checkpoint.files if key not in taken}
    tied = {path: "head" if isinstance(layer, TiedHead) else "embedding"
            for path, layer in model.named_modules() if isinstance(layer, TiedHead | TiedEmbedding)}  # fmt: skip
    container = getattr(base_model(model), CONTAINER, None)
    settings = {
        "factorized_layers": layers,
        "shared_factors": {key: list(value.shape) for key, value in container.named_parameters()}
        if container
        else None,
        "tied_modules": tied,
        "tied_weights": model.all_tied_weights_keys,
    }
    state = model.state_dict()
    tensors = {
        new: torch.empty_like(
            state[old], dtype=checkpoint.dtype if state[old].is_floating_point() else None, device="meta"
        )
        for new, old in stored.items()
    }
    tensors |= {key: torch.empty_like(value, device="meta") for key, value in maps.items()}
    return Weights(
        model, tensors, lambda key: maps[key] if key in maps else read_stored(checkpoint, stored[key])
    ), settings


def _describe(checkpoint: LazyCheckpoint, path: str, layer, maps: dict[str, Tensor]) -> tuple[dict, dict[str, str]]:
    """Return the description of one layer, and ``{name in the modelling file: name in the checkpoint}``; add to ``maps``."""
    structure, bias = layer.structure, getattr(layer, "bias", None) is not None
    checkpoint.load(path)
    terms, names = [], {}
    if isinstance(structure, Structure):
        for k, einsum in enumerate(structure.normal_form()):
            term, inside = _describe_term(einsum.spec, layer.shared)
            for side in ("rows", "columns"):
                index = einsum.index(dict(layer.named_buffers()) | dict(layer.named_parameters()), side)
                if index is not None:
                    maps[f"{path}.{side}_{k}"], term[side] = index, len(index)
            terms.append(term)
            names |= {f"{path}.terms.{k}.{new}": f"{path}.{old}" for new, old in inside.items()}
    else:  # CoLA
        terms = [
            {
                "chain": [structure.in_features, structure.rank, structure.out_features],
                "activation": structure.activation,
            }
        ]
        names = {f"{path}.terms.0.0.weight": f"{path}.down", f"{path}.terms.0.1.weight": f"{path}.up"}
    checkpoint.drop(path)
    spec = {"shape": list(structure.shape), "bias": bias, "terms": terms}
    if isinstance(layer, FactorizedEmbedding):
        spec |= {"padding_idx": layer.padding_idx, "scale": layer.multiplier}
    elif len(terms) == 1 and len(terms[0].get("chain", ())) == 2 and not terms[0].keys() & {"rows", "columns"}:
        names = {f"{path}.weight": old for old in names.values()}  # a plain nn.Linear
    return spec, names


def _describe_term(spec: EinsumSpec, shared: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a chain of matrices where the einsum is one, else its equation; and the names of its factors."""
    axes = [labels for _, labels in spec.factors]
    way = [*spec.outs, *(labels[-1] for labels in axes[:-1]), *spec.ins]
    own = {name: key for name, key in shared.items() if name in spec.names}
    if axes == list(pairwise(way)) and len(set(way)) == len(way) and not own:
        sizes = [spec.size([label]) for label in reversed(way)]
        return {"chain": sizes}, {f"{k}.weight": name for k, name in enumerate(reversed(spec.names))}
    letters = dict(zip(dict(spec.sizes), string.ascii_letters, strict=False))
    words = ["".join(letters[label] for label in labels) for labels in (*axes, spec.outs + spec.ins)]
    term = {
        "equation": f"{','.join(words[:-1])}->{words[-1]}",
        "factors": [
            [name, list(shape)] for name, shape in spec.factor_shapes().items()
        ],  # in the order of the equation
        "shared": own,
        "outs": list(spec.shape_of(spec.outs)),
        "shape": list(spec.shape),
    }
    return term, {name: name for name in spec.names if name not in own}


FORMAT = Format(
    write, f"Factors as they are, and a modelling file, {FILE}.py, which needs torch and transformers alone.", LOAD
)
