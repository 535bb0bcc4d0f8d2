"""Signals that end a command: Ctrl-C and SIGTERM alike end it with one line that says how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tenfold_cli.options import is_first
from tenfold_cli.output import say


@contextmanager
def stops_with_a_sentence() -> Iterator[None]:
    """End the program with status 128 and the number of the signal; the second signal ends it at once."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_DFL)
    if is_first():
        name = signal.Signals(number).name
        say(f"tenfold: stopped by {name}; rerun the same command to go on", sys.stderr, "\n")
    sys.exit(128 + number)
