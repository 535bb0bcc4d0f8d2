"""YAML that others wrote: plain values, of bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

BYTES, NODES, DEPTH = 2**18, 10_000, 32


class _Loader(yaml.SafeLoader):
    """Loader that stops at aliases, of which a few lines make gigabytes, and at too many or too deep values."""

    nodes = depth = 0

    def compose_node(self, parent, index):
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*); write out what they stand for")
        if self.nodes > NODES or self.depth > DEPTH:
            raise yaml.YAMLError(f"it has more than {NODES:,} values, or more than {DEPTH} in one another")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(path: Path) -> Any:
    """Read a file of YAML.

    Raises:
        ValueError: it is too large, has aliases, or is no YAML.
    """
    with path.open("rb") as file:
        return parse_yaml(file.read(BYTES + 1), path)


def parse_yaml(raw: bytes | str, where: str | Path) -> Any:
    """Parse YAML that is in ``where``, as ``read_yaml`` does."""
    if len(raw) > BYTES:
        raise ValueError(f"{where} has more than {BYTES:,} bytes of YAML; leave out what is not needed")
    try:
        return yaml.load(raw, _Loader)
    except Exception as reason:  # a tag on a value of another type raises whatever that type does
        raise ValueError(f"{where} is not YAML: {shorten(str(reason), 400)}") from None


def shorten(text: str, length: int = 100) -> str:
    """Return one line of at most ``length`` characters."""
    text = " ".join(text[: 4 * length].split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
