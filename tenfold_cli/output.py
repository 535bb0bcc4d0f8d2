"""What the commands print: tables and JSON on standard output, choices and progress bars on standard error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def show_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def short(structure: dict) -> str:
    fields = [
        f"{key}={value}".replace(" ", "")
        for key, value in structure.items()
        if key in ("rank", "ranks", "terms", "outs", "ins")
    ]
    return " ".join([structure["kind"], *fields])


def show_cells(cells: list[dict]) -> None:
    """Layers against dense ones, and how near they come to the floor."""
    rows = [
        [
            short(cell["structure"]),
            "x".join(map(str, cell["shape"])),
            str(cell["layers"]),
            f"{cell['rows']:,}",
            cell["pass"],
            f"{1e3 * cell['seconds']:.3f}",
            f"{1e3 * cell['dense_seconds']:.3f}",
            f"{cell['ratio']:.2f}",
            f"{cell['floor'] / cell['seconds']:.0%}",
            f"{cell['bytes'] / 2**20:,.1f}",
            f"{cell['dense_bytes'] / 2**20:,.1f}",
        ]
        for cell in cells
    ]
    columns = [
        "structure",
        "out x in",
        "layers",
        "rows",
        "pass",
        "ms",
        "dense ms",
        "dense / ours",
        "of the floor",
        "MiB",
        "dense MiB",
    ]
    show_table(columns, rows)


def show_speeds(results: list[dict], other: str) -> None:
    """Speed and memory of a model beside those of another one."""
    rows = [
        [
            name,
            str(result["rows"][name]),
            f"{r['tokens_per_second']:,.0f}",
            f"{r['dense_tokens_per_second']:,.0f}",
            f"{r['ratio']:.2f}",
            f"{r['tokens_per_second'] / r['most_tokens_per_second']:.0%}",
            f"{r['bytes'] / 2**20:,.1f}",
            f"{r['dense_bytes'] / 2**20:,.1f}",
            str(result["cached_at"].get(name, 0)),
        ]
        for result in results
        for name in ("prefill", "decode", "training")
        if name in result
        for r in [result[name]]
    ]
    columns = ["", "rows", "tokens/s", f"{other} tokens/s", "ratio", "of the most", "MiB", f"{other} MiB", "cached W"]
    show_table(columns, rows)


def count_line(report: dict) -> str:
    count, dense = report["parameters"], report["parameters_dense"]
    kept = [count[key] / dense[key] for key in ("total", "without_head")]
    counted = report.get("counted")
    bytes_ = f"; {counted['note']}: {counted['dense_bytes']:,} -> {counted['bytes']:,}" if counted else ""
    return (
        f"parameters {dense['total']:,} -> {count['total']:,} with the head ({kept[0]:.1%} kept), "
        f"{dense['without_head']:,} -> {count['without_head']:,} without ({kept[1]:.1%} kept){bytes_}"
    )


def error(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


def tracked(what: str) -> Callable[..., Iterable]:
    """A progress bar around a list, on standard error; ``what`` is shown, whatever the phase."""

    def wrap(items: Iterable, phase: str = "") -> Iterable:
        from rich.console import Console
        from rich.progress import track

        return track(list(items), description=what, console=Console(stderr=True), transient=True)

    return wrap


class phased:
    """Progress of a run in phases, on standard error: the phase, how far it is, and the time left for the whole run.

    A bar where someone looks, else a line at the beginning of a phase and then every ``EVERY`` seconds. It is a ``progress`` as
    :mod:`tenfold.compress.progress` says; what runs twice tells twice.
    """

    EVERY = 30.0

    def __init__(self, what: str):
        self.what, self.begun, self.said, self.done = what, time.perf_counter(), -math.inf, 0.0
        self.unknown = 0.0  # seconds in phases of which nobody knows how long they take

    def __call__(self, items: Iterable, phase: str = "") -> Iterator:
        items = list(items)
        with self._shown(f"{self.what}: {phase}" if phase else self.what, len(items)) as show:
            share, begun = getattr(phase, "share", None if phase else 1.0), time.perf_counter()
            show(0, self._left(self.done))
            for number, item in enumerate(items, 1):
                yield item
                if share is None:
                    spent = time.perf_counter() - begun
                    show(number, self._left(self.done, spent, spent * (len(items) / number - 1)))
                else:
                    show(number, self._left(self.done + share * number / len(items)))
            self.done += share or 0.0
            self.unknown += 0.0 if share else time.perf_counter() - begun

    def _left(self, done: float, spent: float = 0.0, here: float = 0.0) -> str:
        """The time left once ``done`` of the known phases is done; another one has ``spent`` so much and will take ``here``."""
        known = time.perf_counter() - self.begun - self.unknown - spent
        ahead = known / done * max(0.0, 1 - done) if done else 0.0
        return f"{timedelta(seconds=round(here + ahead))} left" if done or here else ""

    @contextmanager
    def _shown(self, told: str, total: int) -> Iterator[Callable[[int, str], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        if not sys.stderr.isatty():
            self.said = -math.inf
            yield partial(self._line, told, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(told, total=total, left="")
            yield lambda number, left: bar.update(task, completed=number, left=left)

    def _line(self, told: str, total: int, number: int, left: str) -> None:
        if time.perf_counter() - self.said >= self.EVERY or number == total:
            self.said = time.perf_counter()
            print(f"{told} {number} of {total}, {left}".removesuffix(", "), file=sys.stderr, flush=True)


class counted:
    """A progress bar that is told ``(step, steps, tokens a second)``; where no one looks, a line every twentieth."""

    def __init__(self, what: str):
        self.what, self.step = what, math.inf

    def __enter__(self) -> Callable[..., None]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        if not sys.stderr.isatty():
            self.bar = None
            return self._line
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[speed]}"), console=Console(stderr=True), transient=True)
        task = self.bar.add_task(self.what, speed="")

        def update(step: int, steps: int, speed: float | None = None) -> None:
            self.bar.start()  # not before it is told anything: only one bar can be shown, and others may come first
            self.bar.update(task, completed=step, total=steps, speed=_speed(speed))
            if step == steps:
                self.bar.stop()

        return update

    def _line(self, step: int, steps: int, speed: float | None = None) -> None:
        if step <= self.step:  # the first one, where an interrupted run goes on, or the first of the next healing
            self.said, self.first, self.begun = 20 * (step - 1) // steps, step, time.perf_counter()
        self.step, twentieth = step, 20 * step // steps
        if twentieth > self.said or step == self.first:
            self.said, done = twentieth, step - self.first
            seconds = (time.perf_counter() - self.begun) / max(1, done) * (steps - step)
            left = f", {timedelta(seconds=round(seconds))} left" if done else ""
            told = f"{self.what}: step {step:,} of {steps:,}{left} {_speed(speed)}"
            print(told.rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *reason) -> None:
        if self.bar is not None:
            self.bar.stop()


def _speed(tokens: float | None) -> str:
    return "" if tokens is None else f"{tokens:,.0f} tokens/s"


def show_choices(choices: list[dict]) -> None:
    """What is about to be done, on standard error: parameters, and the loss that is foreseen."""
    for choice in choices:
        shown = choice["chosen"] if not isinstance(choice["chosen"], dict) else short(choice["chosen"])
        kept = f"{choice['parameters']:>12,} of {choice['of']:>12,}"
        loss = "" if choice["loss"] is None else f"loss {choice['loss']:.5f}"
        print(f"{choice['item']:<48} {shown!s:<24} {kept} {loss}".rstrip(), file=sys.stderr)
    known = [choice for choice in choices if choice["loss"] is not None]
    if known:
        print(f"foreseen: {sum(choice['loss'] for choice in known):.4f} {known[0]['unit']}", file=sys.stderr)
