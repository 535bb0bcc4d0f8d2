"""The command that serves a model over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from tenfold_cli.options import Device, Dtype, Model


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all networks.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a model by transformers' server, which speaks OpenAI's API: completions, chat, streaming."""
    import tenfold  # noqa: F401 - teaches transformers to read compressed checkpoints

    try:
        import uvicorn  # noqa: F401  # pyright: ignore[reportMissingImports]
        from transformers.cli.serve import Serve
    except ImportError:
        raise ValueError("serving needs more packages: pip install 'tenfold[serve]'") from None
    Serve(force_model=model, host=host, port=port, device=device or "auto", dtype=dtype or "auto")


COMMANDS = {serve: None}
