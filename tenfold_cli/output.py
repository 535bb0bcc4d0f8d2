"""What the commands print: tables and JSON on standard output, choices and progress on standard error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from tenfold_cli.options import is_first

SECONDS = 30.0  # between two lines of progress where standard error is no terminal


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


def format_structure(structure: dict) -> str:
    fields = ("rank", "ranks", "terms", "outs", "ins")
    sizes = [f"{key}={structure[key]}".replace(" ", "") for key in structure if key in fields]
    return " ".join([structure["kind"], *sizes])


def format_counts(report: dict) -> str:
    """Return parameters before and after compression, with and without the head."""
    count, dense = report["parameters"], report["parameters_dense"]
    total, without_head = (
        f"{dense[key]:,} -> {count[key]:,} {{}} ({count[key] / dense[key]:.1%} kept)"
        for key in ("total", "without_head")
    )
    line = f"parameters {total.format('with the head')}, {without_head.format('without')}"
    if counted := report.get("counted"):
        line += f"; {counted['note']}: {counted['dense_bytes']:,} -> {counted['bytes']:,}"
    return line


def show_layer_times(cells: list[dict]) -> None:
    """Print times of layers against dense ones, and the share of the machine's floor that they reach."""
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
    ]
    rows = [
        [
            format_structure(cell["structure"]),
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
    show_table([*columns, "dense MiB"], rows)


def show_model_speeds(results: list[dict], other: str) -> None:
    """Print speed and memory of a model beside those of another one."""
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


def show_choices(choices: list[dict]) -> None:
    """Print on standard error what is about to be done: parameters, and the predicted loss."""
    if not is_first():
        return
    for choice in choices:
        chosen = choice["chosen"] if not isinstance(choice["chosen"], dict) else format_structure(choice["chosen"])
        kept = f"{choice['parameters']:>12,} of {choice['of']:>12,}"
        loss = "" if choice["loss"] is None else f"loss {choice['loss']:.5f}"
        print(f"{choice['item']:<48} {chosen!s:<24} {kept} {loss}".rstrip(), file=sys.stderr)
    known = [choice for choice in choices if choice["loss"] is not None]
    if known:
        print(f"foreseen: {sum(choice['loss'] for choice in known):.4f} {known[0]['unit']}", file=sys.stderr)


class Display:
    """A progress bar on standard error, or a line every ``SECONDS`` where that is no terminal; only of the first process."""

    def __init__(self):
        self.bar, self.text, self.done, self.printed = None, "", 0, -math.inf

    def show(self, text: str, done: int, total: int, *notes: str) -> None:
        note = ", ".join(filter(None, notes))
        if not is_first():
            return
        if sys.stderr.isatty():
            self._draw(text, done, total, note)
            return
        started = text != self.text or done < self.done
        if started or done == total or time.perf_counter() - self.printed >= SECONDS:
            self.printed = time.perf_counter()
            print(f"{text} {done:,} of {total:,}{note and ', '}{note}", file=sys.stderr, flush=True)
        self.text, self.done = text, done

    def _draw(self, text: str, done: int, total: int, note: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        if self.bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.add_task(text, note="")
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], description=text, completed=done, total=total, note=note)
        if done == total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class PhaseProgress:
    """Progress of a run in phases: a ``progress`` function as ``tenfold.compression.progress`` describes.

    It shows the phase, how far it is, and the time left for the whole run, unless the length of the phase is unknown.
    """

    def __init__(self, title: str):
        self.title, self.display, self.begun = title, Display(), time.perf_counter()
        self.done = 0.0  # share of the run

    def __call__(self, items: Iterable, phase: str = "") -> Iterator:
        items, text = list(items), f"{self.title}: {phase}" if phase else self.title
        share, begun = getattr(phase, "share", None if phase else 1.0), time.perf_counter()
        try:
            self.display.show(text, 0, len(items), self._time_left(self.done, share))
            for number, item in enumerate(items, 1):
                yield item
                done = self.done + (share or 0.0) * number / len(items)
                self.display.show(text, number, len(items), self._time_left(done, share))
        finally:
            self.display.close()
        if share is None:
            self.begun += time.perf_counter() - begun  # this time says nothing about the other phases
        else:
            self.done += share

    def _time_left(self, done: float, share: float | None) -> str:
        if share is None or not done:
            return ""
        return _format_left((time.perf_counter() - self.begun) / done * max(0.0, 1 - done))


class StepProgress:
    """Progress of a training: a context that gives the function ``advance(step, steps, tokens_per_second)``."""

    def __init__(self, title: str):
        self.title, self.display, self.step = title, Display(), math.inf

    def __enter__(self):
        return self.advance

    def __exit__(self, *reason) -> None:
        self.display.close()

    def advance(self, step: int, steps: int, speed: float | None = None) -> None:
        if step <= self.step:  # the first step, also of a resumed training, or of the next one
            self.first, self.begun = step, time.perf_counter()
        self.step, done = step, step - self.first
        left = _format_left((time.perf_counter() - self.begun) / done * (steps - step)) if done else ""
        self.display.show(f"{self.title}: step", step, steps, left, f"{speed:,.0f} tokens/s" if speed else "")


def _format_left(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} left"
