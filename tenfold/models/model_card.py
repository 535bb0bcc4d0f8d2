"""Writing a compressed model: its weights, its tokenizer and a model card with command, results and protocol."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, save_torch_state_dict, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tenfold.models.atomic_io import atomic_directory
from tenfold.models.loading import silent
from tenfold.models.stock import find_stock_form
from tenfold.models.yaml_files import parse_yaml
from tenfold.nn.quantized import is_quantized

CARD = """---
{header}
---

# {title}

{what}

```python
{load}
```

Made by:

{command}

## Figures

| | this model | dense |
|---|---|---|
{rows}

{protocol}
"""
PLAIN = (
    "This model is an ordinary one of smaller matrices: transformers, and every other program that runs the original, loads it "
    "as it is."
)
STRUCTURED = (
    "The weight matrices of this model are compressed. It loads with transformers once tenfold is imported; `tenfold export` "
    "writes it in formats that need no tenfold."
)
IMPORT = "import tenfold  # needed: without this line the compressed layers would be loaded with random weights\n"
LICENCE = ("license", "license_name", "license_link")


def save_compressed(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer=None,
    report: dict[str, Any] | None = None,
    command: str = "",
    max_shard_size: str | int = "5GB",
    tensors: dict[str, Tensor] | None = None,
    run: str = "",
) -> None:
    """Write ``model`` to ``folder`` as an ordinary Hugging Face checkpoint, with a model card and ``tenfold.json``.

    Args:
        report: of ``tenfold.compress``; complete in ``tenfold.json``, in short on the card.
        command: the exact command that made the model.
        tensors: those to write, if ``model`` does not hold them.
        run: digest of the run that made the model.

    Raises:
        OSError: there is no room; ``folder`` is as it was.
        ValueError: torchao has quantised a parameter.
    """
    if quantised := next((name for name, value in model.named_parameters() if is_quantized(value)), None):
        raise ValueError(f"{quantised} is quantised by torchao, and can't be saved; save the model before quantize_")
    with silent(), atomic_directory(folder, run) as new:
        form = find_stock_form(model)
        if form is None:
            model.save_pretrained(new, max_shard_size=max_shard_size, state_dict=tensors)
        else:
            tensors = model.state_dict() if tensors is None else tensors
            plain = form.published({name: x for name, x in tensors.items() if name not in model.all_tied_weights_keys})
            save_torch_state_dict(plain, new, max_shard_size=max_shard_size)
            form.config.dtype = next(x.dtype for x in plain.values() if x.is_floating_point())
            save_config(model, new, form.config)
        save_card(new, tokenizer, report, command, Path(folder).absolute().name, model.name_or_path or "")


def save_config(model: PreTrainedModel, folder: Path, config: PretrainedConfig | None = None) -> None:
    """Write what ``save_pretrained`` writes beside the weights; ``config`` instead of the model's own if given."""
    config = config or model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def save_card(
    path: Path, tokenizer, report: dict[str, Any] | None, command: str, title: str = "", base: str | Path = ""
) -> None:
    """Write the tokenizer, ``tenfold.json`` and the model card.

    Args:
        base: the folder or the name of the model that was compressed; the card in ``path`` tells it unless given.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    report = (report or {}) | {"command": command}
    (path / "tenfold.json").write_text(json.dumps(report, indent=1))
    config, title = json.loads((path / "config.json").read_text()), title or path.name
    sites = config.get("quantization_config", {}).get("sites", {})
    factorized = any(site["structure"]["kind"] != "dense" for site in sites.values())
    header = ModelCardData(
        library_name="tenfold" if sites else "transformers",
        tags=["tenfold", "factorized" if factorized else "pruned"],
        eval_results=_results(report) or None,
        model_name=title,
        ignore_metadata_errors=True,
        **_base_header(base or path),
    )
    kind = config["architectures"][0]
    text = CARD.format(
        header=header.to_yaml(), title=escape_markdown(title), what=STRUCTURED if sites else PLAIN,
        load=f"{IMPORT if sites else ''}from transformers import {kind}\n\nmodel = {kind}.from_pretrained({quote(title)})",
        command=_fence(command or "(from Python)"), rows="\n".join(_rows(report)), protocol=_protocol(report),
    )  # fmt: skip
    (path / "README.md").write_text(text, encoding="utf-8")


def read_card(file: Path) -> tuple[dict[str, Any], str]:
    """Return the header and the body of a model card, none where there is none, or none that can be read."""
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(2**20)
        found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        header = parse_yaml(found[1], file) if found else {}
    except (OSError, ValueError):
        return {}, ""
    return header if isinstance(header, dict) else {}, text[found.end() :] if found else text


def escape_markdown(text: str) -> str:
    """Return ``text``, which may come from a file, as one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|~&#!$])", r"\\\1", " ".join(_printable(text).split()))


def quote(text: str) -> str:
    """Return ``text`` as a string in a line of code."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _fence(text: str) -> str:
    """Return ``text`` as a block of code that it can't end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}\n{_printable(text)}\n{ticks}"


def _printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def _base_header(base: str | Path) -> dict[str, Any]:
    """Return the base model and its licence, as far as its card, or the card of a compressed model in ``base``, says so."""
    folder, cached = Path(base), re.search(r"models--([^/]+)--([^/]+)/snapshots/", str(base))
    name: Any = f"{cached[1]}/{cached[2]}" if cached else str(base)
    if not folder.exists():
        try:
            file = try_to_load_from_cache(name, "README.md")
        except HFValidationError:
            return {}
        folder = Path(file).parent if isinstance(file, str) else folder
    header = read_card(folder / "README.md")[0]
    if "tenfold" in str(header.get("tags")):
        name = header.get("base_model")
    elif Path(base).exists() and not cached:
        name = None  # a path says nothing to others
    found = {key: value for key in LICENCE if isinstance(value := header.get(key), str)}
    return found | ({"base_model": name, "base_model_relation": "finetune"} if isinstance(name, str) else {})


def _results(report: dict[str, Any]) -> list[EvalResult]:
    """Return the figures of an evaluation as the hub reads them."""
    scores = report.get("evaluation")
    if not scores:
        return []
    name = ", ".join(scores["text"]["files"])
    return [
        EvalResult("text-generation", "text", name, key, scores[key], metric_name=key.replace("_", " "))
        for key in ("perplexity", "bits_per_byte")
    ]


def check_report(report: dict[str, Any], file: Path) -> None:
    """Raise ValueError unless a model card can be made of ``report``, which ``file`` has."""
    try:
        list(_rows(report)), _protocol(report), _results(report)
        if not isinstance(report.get("command") or "", str):
            raise TypeError(f"command is {report['command']!r}")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as reason:
        raise ValueError(f"{file} is damaged ({reason!r}); restore it, or delete it") from None


def _rows(report: dict[str, Any]):
    ours, dense = report.get("parameters"), report.get("parameters_dense")
    if ours and dense:
        yield f"| parameters with the head | {ours['total']:,} | {dense['total']:,} |"
        yield f"| parameters without the head | {ours['without_head']:,} | {dense['without_head']:,} |"
    for rows, flops in report.get("flops_per_token", {}).items():
        yield f"| FLOPs per token, {int(rows):,} rows a call | {flops:,} | {report['flops_per_token_dense'][rows]:,} |"
    if counted := report.get("counted"):
        note = escape_markdown(str(counted["note"]))
        yield f"| bytes of compressed matrices ({note}) | {counted['bytes']:,} | {counted['dense_bytes']:,} |"
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
    return escape_markdown(
        f"Perplexity on {', '.join(text['files'])} ({p['text']} text, digest {text['sha256']}): windows of {p['window']} "
        f"tokens, stride {p['stride']}, nats per {p['normaliser']}, {scores['tokens']:,} tokens scored."
    )
