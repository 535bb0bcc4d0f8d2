"""Memory of a command that works on large tensors."""

from __future__ import annotations

import ctypes
import sys

# glibc's parameters of mallopt
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4


def keep_freed() -> None:
    """Keep what is freed for the next tensor, where glibc would hand tensors of megabytes back to the system at once.

    The system clears every page before it hands it out again: a third of the time of healing, whose tensors come and go all the
    time. The peak grows by what lies between (a tenth). Elsewhere than under glibc nothing is changed.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(TOP_PAD, 2**26)
