"""The formats of ``tenfold export``. To add one, write a file with its ``FORMAT``, and a line in ``FORMATS``."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from tenfold.export import dense, gguf, onnx, remote_code, stock
from tenfold.export.card import Format, write_card
from tenfold.models.atomic_io import atomic_directory, file_stamps
from tenfold.models.auto import load_tokenizer, read_config
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.output_folder import check_output, claim_output, digest
from tenfold.models.suggestions import check_name

FORMATS: dict[str, Format] = {
    "dense": dense.FORMAT,
    "stock": stock.FORMAT,
    "remote-code": remote_code.FORMAT,
    "gguf": gguf.FORMAT,
    "onnx": onnx.FORMAT,
}


def export(name: str | Path, to: str, output: str | Path, overwrite: bool = False, **options: Any) -> Path:
    """Write the checkpoint ``name`` to the folder ``output`` in the format ``to``, with tokenizer and model card.

    Args:
        name: a folder, or a name on a hub.
        to: a name of ``FORMATS``.
        options: of the format.

    Raises:
        FileExistsError: ``output`` is not empty.
        ImportError: the format needs a package that is not installed.
        ValueError: the format can't hold this model; the message names the nearest one that can.
    """
    check_name(to, FORMATS, "format")
    kind, output = FORMATS[to], Path(output)
    if idle := sorted(options.keys() - set(kind.options)):
        raise ValueError(
            f"the format {to} has no option {idle[0]}; its options are {', '.join(kind.options) or 'none'}"
        )
    check_plain(read_config(name), name)
    run = digest([version("tenfold"), str(name), _stamps(name), to, options])
    with claim_output(output, alone=True):
        if check_output(output, overwrite, run):
            return output
        tokenizer = load_tokenizer(name)
        with atomic_directory(output, run) as new:
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            kind.write(name, new, **options)
            write_card(new, output.absolute().name, kind, name)
    return output


def _stamps(name: str | Path) -> list[list[Any]]:
    return file_stamps(sorted(file for file in Path(name).glob("*") if file.is_file()))
