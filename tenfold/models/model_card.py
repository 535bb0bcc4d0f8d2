"""Writing a compressed model: its weights, its tokenizer and a model card with command, results and protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tenfold.models.atomic_io import atomic_directory
from tenfold.models.loading import silent
from tenfold.models.stock import find_stock_form
from tenfold.nn.quantized import is_quantized

CARD = """---
library_name: tenfold
tags: [tenfold, compressed]
---

# {title}

The weight matrices of this model are compressed. It loads with transformers once tenfold is imported:

```python
import tenfold  # needed: without this line the compressed layers would be loaded with random weights
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}")
```

`tenfold export` writes it in formats that need no tenfold.

Made by:

```
{command}
```

## Figures

| | this model | dense |
|---|---|---|
{rows}

{protocol}
"""


def save_compressed(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer=None,
    report: dict[str, Any] | None = None,
    command: str = "",
    max_shard_size: str | int = "5GB",
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write ``model`` to ``folder`` as an ordinary Hugging Face checkpoint, with a model card and ``tenfold.json``.

    Args:
        report: of ``tenfold.compress``; complete in ``tenfold.json``, in short on the card.
        command: the exact command that made the model.
        tensors: those to write, if ``model`` does not hold them.

    Raises:
        OSError: there is no room; ``folder`` is as it was.
        ValueError: torchao has quantised a parameter.
    """
    if quantised := next((name for name, value in model.named_parameters() if is_quantized(value)), None):
        raise ValueError(f"{quantised} is quantised by torchao, and can't be saved; save the model before quantize_")
    with silent(), atomic_directory(folder) as new:
        form = find_stock_form(model)
        if form is None:
            model.save_pretrained(new, max_shard_size=max_shard_size, state_dict=tensors)
        else:
            tensors = model.state_dict() if tensors is None else tensors
            plain = form.published({name: x for name, x in tensors.items() if name not in model.all_tied_weights_keys})
            save_torch_state_dict(plain, new, max_shard_size=max_shard_size)
            form.config.dtype = next(x.dtype for x in plain.values() if x.is_floating_point())
            save_config(model, new, form.config)
        save_card(new, tokenizer, report, command, Path(folder).absolute().name)


def save_config(model: PreTrainedModel, folder: Path, config: PretrainedConfig | None = None) -> None:
    """Write what ``save_pretrained`` writes beside the weights; ``config`` instead of the model's own if given."""
    config = config or model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def save_card(path: Path, tokenizer, report: dict[str, Any] | None, command: str, title: str = "") -> None:
    """Write the tokenizer, ``tenfold.json`` and the model card."""
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    report = (report or {}) | {"command": command}
    (path / "tenfold.json").write_text(json.dumps(report, indent=1))
    rows, command = "\n".join(_rows(report)), command or "(from Python)"
    text = CARD.format(title=title or path.name, command=command, rows=rows, protocol=_protocol(report))
    (path / "README.md").write_text(text)


def _rows(report: dict[str, Any]):
    ours, dense = report.get("parameters"), report.get("parameters_dense")
    if ours and dense:
        yield f"| parameters with the head | {ours['total']:,} | {dense['total']:,} |"
        yield f"| parameters without the head | {ours['without_head']:,} | {dense['without_head']:,} |"
    for rows, flops in report.get("flops_per_token", {}).items():
        yield f"| FLOPs per token, {int(rows):,} rows a call | {flops:,} | {report['flops_per_token_dense'][rows]:,} |"
    if counted := report.get("counted"):
        yield f"| bytes of compressed matrices ({counted['note']}) | {counted['bytes']:,} | {counted['dense_bytes']:,} |"
    scores = report.get("evaluation")
    if scores:
        for name in ("perplexity", "bits_per_byte"):
            dense_score = report.get("evaluation_dense", {}).get(name)
            yield f"| {name.replace('_', ' ')} | {scores[name]:.4g} | {'' if dense_score is None else f'{dense_score:.4g}'} |"


def _protocol(report: dict[str, Any]) -> str:
    scores = report.get("evaluation")
    if not scores:
        return "The quality of this model has not been measured yet: run `tenfold evaluate`."
    p, text = scores["protocol"], scores["text"]
    return (
        f"Perplexity on {', '.join(text['files'])} ({p['text']} text, digest {text['sha256']}): windows of {p['window']} "
        f"tokens, stride {p['stride']}, nats per {p['normaliser']}, {scores['tokens']:,} tokens scored."
    )
