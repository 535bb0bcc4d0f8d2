"""Arguments and options that several commands take."""

from __future__ import annotations

import ast
import os
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

MAX_SEED = 2**32 - 1  # the largest that torch, numpy and transformers all take
FORMATS = ".txt, .jsonl with text or messages, also .xz, .gz; hf://datasets/OWNER/NAME; repeat for more."

Model = Annotated[str, typer.Argument(help="A model folder, a GGUF file, or a name on the hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: an accelerator if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: that of the checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Seed = Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Random seed for sampling.")]


def shows_defaults(*sources: str, **names: str) -> type[TyperCommand]:
    """Return a command class whose help shows the defaults of the functions that the command calls.

    An option that the user leaves out is None and is not passed on, so that each default stands in one place.

    Args:
        sources: ``file:name`` of functions or classes of the package.
        names: options that are called otherwise there.
    """

    class Command(TyperCommand):
        def format_help(self, context, formatter) -> None:
            defaults = {name: value for source in sources for name, value in read_defaults(source)}
            for option in self.params:
                if option.default is None:
                    option.default = defaults.get(names.get(option.name, option.name))
            super().format_help(context, formatter)

    return Command


def read_defaults(source: str) -> Iterator[tuple[str, Any]]:
    """Yield name and default of a function's parameters or a class's fields without importing them: torch takes seconds."""
    file, _, name = source.partition(":")
    tree = ast.parse((Path(find_spec("tenfold").origin).parent / file).read_text())
    node = next(node for node in tree.body if getattr(node, "name", None) == name)
    if isinstance(node, ast.ClassDef):
        found = [(field.target.id, field.value) for field in node.body if isinstance(field, ast.AnnAssign)]
    else:
        positional, keywords = node.args.args[-len(node.args.defaults) or None :], node.args.kwonlyargs
        found = zip([one.arg for one in positional + keywords], node.args.defaults + node.args.kw_defaults, strict=True)
    for name, value in found:
        if isinstance(value, ast.Call) and value.args:  # Field(default, ...)
            value = value.args[0]
        yield name, getattr(value, "value" if isinstance(value, ast.Constant) else "attr", None)  # torch.float16


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def is_first() -> bool:
    """Return whether this is the only process, or the first of several: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def command_line() -> str:
    """Return the exact command, for model cards."""
    return shlex.join(["tenfold", *sys.argv[1:]])


def load_with_tokenizer(name: str, device: str | None, dtype: str | None):
    """Load a model and its tokenizer; raise ValueError if it has none."""
    from tenfold import api

    model, tokenizer = api.load(name, device, dtype)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    return model, tokenizer
