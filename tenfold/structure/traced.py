"""Whether torch follows what is done here, to write it down or to differentiate it in a way of its own."""

from __future__ import annotations

import torch
from torch._C._functorch import peek_interpreter_stack  # type: ignore[attr-defined]
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Under ``torch.compile``, a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``), or forward-mode derivatives.

    Then there are plain products only: no autograd function of our own, and nothing that writes to memory that it made.
    """
    if torch.compiler.is_compiling():
        return True
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0
