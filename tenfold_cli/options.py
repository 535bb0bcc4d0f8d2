"""Arguments and options that several commands take."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

MAX_SEED = 2**32 - 1  # the largest that torch, numpy and transformers all take
FORMATS = ".txt, .jsonl or .json with text or messages, also .xz, .gz; hf://datasets/OWNER/NAME; repeat for more."

Model = Annotated[str, typer.Argument(help="A model folder, a GGUF file, or a name on the hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: an accelerator if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: that of the checkpoint.")]
SavedDtype = Annotated[str | None, typer.Option(help="Dtype of the saved model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Seed = Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]


def shows_defaults(*sources: str) -> type[TyperCommand]:
    """Return a command class whose help shows the defaults of the functions that the command calls.

    An option that the user leaves out is None and is not passed on, so that each default stands in one place. Only the help of
    such a command imports torch.

    Args:
        sources: ``module:name`` of functions or classes of the package.
    """

    class Command(TyperCommand):
        def format_help(self, ctx, formatter) -> None:
            found: dict[str, Parameter] = {}
            for module, _, name in (source.partition(":") for source in sources):
                found |= signature(getattr(import_module(f"tenfold.{module}"), name)).parameters
            for option in self.params:
                if option.default is None and option.name in found:
                    default = found[option.name].default
                    option.default = None if default is Parameter.empty else default
            super().format_help(ctx, formatter)

    return Command


def parse_count(text: str) -> int:
    """Return the number that ``text`` says: ``5M``, ``250k``, ``1000``."""
    factors = {"k": 10**3, "m": 10**6, "b": 10**9}
    last = text[-1:].lower()
    number = float(text[:-1] if last in factors else text) * factors.get(last, 1)
    if not 1 <= number < 1e15:
        raise ValueError(f"{text} is no count")
    return round(number)


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def is_first() -> bool:
    """Return whether this is the only process, or the first of several: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def command_line() -> str:
    """Return the exact command, for model cards."""
    return shlex.join(["tenfold", *sys.argv[1:]])
