"""The command that exports: to formats that run without tenfold."""

from __future__ import annotations

from typing import Annotated

import typer

from tenfold_cli.options import Model, Output, Overwrite, given, is_first
from tenfold_cli.output import say


def export(
    model: Model,
    output: Output,
    to: Annotated[str, typer.Option(help="dense, stock, remote-code, gguf or onnx.")],
    outtype: Annotated[str | None, typer.Option(help="With gguf: f32, f16 or q8_0; default: f16.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model in a format that runs without tenfold, with a model card that says how to load it."""
    from tenfold.export.formats import export

    if is_first():
        export(model, to, output, overwrite, **given(outtype=outtype))
        say(f"saved in {output}; README.md there says how to load it")


COMMANDS = {export: None}
