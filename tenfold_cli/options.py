"""Arguments and options that several commands take."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A model folder, a GGUF file, or a name on the hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option(help="Write into a folder that holds something already.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; an accelerator where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; that of the checkpoint unless given.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
SEEDS = 2**32 - 1  # the largest one that all of torch, numpy and transformers take
TEXT = typer.Option("--text", help="Text: .txt, .jsonl with text or messages, also .xz, .gz; hf://datasets/OWNER/NAME.")


def first() -> bool:
    """Whether this is the first of several processes, or the only one: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def stated(context: typer.Context) -> list[str]:
    """The options that the user gave, in the order of the help page."""
    options = [one for one in context.command.params if one.param_type_name == "option"]
    return [one.opts[0] for one in options if context.get_parameter_source(one.name).name == "COMMANDLINE"]


def command() -> str:
    """The exact command, for model cards."""
    return shlex.join(["tenfold", *sys.argv[1:]])
