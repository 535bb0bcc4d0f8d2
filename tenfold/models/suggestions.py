"""Check of names that users write: an unknown one is refused with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def check_name(name: str, known: Iterable[str], what: str) -> None:
    """Raise ValueError unless ``name`` is one of ``known``, each of which is a ``what``."""
    known = list(known)
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"there is no {what} {name!r}; {hint}")
