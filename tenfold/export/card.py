"""Description of a format, and the model card of an export, which says how to load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from tenfold.models.model_card import escape_markdown, quote, read_card

CARD = """---
{header}---

# {title}

{what}

```{language}
{load}
```
"""
KEPT = ("base_model", "base_model_relation", "license", "language", "datasets")  # of the card of the compressed model


@dataclass(frozen=True)
class Format:
    """A format: how it is written, and what its model card says.

    Args:
        write: ``write(name, folder, **options)`` writes the checkpoint ``name`` to ``folder``.
        what: a sentence on what needs what.
        load: the code that loads ``{title}``.
        library: ``library_name`` of the card.
        language: of ``load``.
        options: the keyword arguments of ``write``.
    """

    write: Callable[..., None]
    what: str
    load: str
    library: str = "transformers"
    language: str = "python"
    options: tuple[str, ...] = ()


def write_card(folder: Path, title: str, kind: Format, source: str | Path) -> None:
    """Write the model card of an export; licence, base model and figures are those of the card of ``source``."""
    header, body = read_card(Path(source) / "README.md")
    header = {key: header[key] for key in KEPT if key in header}
    header |= {"library_name": kind.library, "tags": ["tenfold", "pruned"]}
    new = CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        title=escape_markdown(title), what=kind.what, language=kind.language,
        load=kind.load.replace("{title}", quote(title)[1:-1]),
    )  # fmt: skip
    made = body.find("Made by:")
    (folder / "README.md").write_text(new + (f"\n{body[made:].strip()}\n" if made >= 0 else ""), encoding="utf-8")


def require(*packages: str, extra: str) -> None:
    """Raise ImportError with the line to install if one of ``packages`` is missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(f"the export to {extra} needs {' and '.join(missing)}: pip install 'tenfold[{extra}]'")
