"""What the commands print: tables and JSON on standard output, choices and progress on standard error."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TextIO

from tenfold_cli.options import is_first

SECONDS = 30.0  # between two lines of progress where standard error is no terminal


# control characters, with which a name or a generated text could write to the terminal, directions of writing, half characters
CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def escape(text: str) -> str:
    """Return ``text`` with its control characters, but tabs and ends of lines, written out."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str, file: TextIO | None = None, begin: str = "", end: str = "\n") -> None:
    """Print ``text``, which may come from a file: every word that a command prints goes through here, or a table."""
    print(f"{begin}{escape(text)}", file=file, end=end, flush=True)


def show_json(value: Any) -> None:
    say(json.dumps(value, indent=1))


def show_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False).print(table)


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
    """Print times and memory of layers against dense ones."""
    rows = [
        [
            format_structure(cell["structure"]),
            "x".join(map(str, cell["shape"])),
            *(f"{cell[name]:,}" for name in ("layers", "rows")),
            cell["pass"],
            *(f"{1e3 * cell[name]:.3f}" for name in ("seconds", "dense_seconds")),
            f"{cell['ratio']:.2f}",
            *(f"{cell[name] / 2**20:,.1f}" for name in ("bytes", "dense_bytes")),
        ]
        for cell in cells
    ]
    columns = ["structure", "out x in", "layers", "rows", "pass", "ms", "dense ms", "dense / ours", "MiB", "dense MiB"]
    show_table(columns, rows)


def show_model_speeds(results: list[dict], other: str) -> None:
    """Print speed and memory of a model beside those of another one."""
    rows = [
        [
            name,
            str(rows),
            *(f"{result[name][key]:,.0f}" for key in ("tokens_per_second", "dense_tokens_per_second")),
            f"{result[name]['ratio']:.2f}",
            *(f"{result[name][key] / 2**20:,.1f}" for key in ("bytes", "dense_bytes")),
        ]
        for result in results
        for name, rows in result["rows"].items()
    ]
    show_table(["", "rows", "tokens/s", f"{other} tokens/s", "ratio", "MiB", f"{other} MiB"], rows)
    if cached := results[0]["cached"]:
        say(f"{cached} layers multiply by a cached dense matrix at some numbers of rows, as dense ones do")


def show_choices(choices: list[dict]) -> None:
    """Print on standard error what is about to be done: parameters, and the predicted loss."""
    if not is_first():
        return
    for choice in choices:
        chosen = choice["chosen"] if not isinstance(choice["chosen"], dict) else format_structure(choice["chosen"])
        kept = f"{choice['parameters']:>12,} of {choice['of']:>12,}"
        loss = "" if choice["loss"] is None else f"loss {choice['loss']:.5f}"
        say(f"{choice['item']:<48} {chosen!s:<24} {kept} {loss}".rstrip(), file=sys.stderr)
    known = [choice for choice in choices if choice["loss"] is not None]
    loss = sum(choice["loss"] for choice in known)
    if shapes := [choice["shape"] for choice in choices if "shape" in choice]:
        gone = [choice["item"] for choice in choices if choice["shape"]["kind"] == "block"]
        say(f"stock shapes: {describe_mix(shapes, gone)}", file=sys.stderr)
        free = [shape["free"] for shape in shapes]
        other = "can't meet this budget" if None in free else f"{sum(free):+.2f}"
        say(f"stock shapes: foreseen {loss:+.2f} {known[0]['unit']}, free widths: {other}", file=sys.stderr)
    elif known:
        say(f"foreseen: {loss:.4f} {known[0]['unit']}", file=sys.stderr)


def show_forecast(stages: list[dict], recipe: Any) -> None:
    """Print what ``tenfold.forecast`` returns."""
    for stage, rules in zip(stages, recipe.stage_recipes(), strict=True):
        rows = [[s["role"], s["rule"], f"{s['matrices']:,}", f"{s['parameters']:,}"] for s in stage["sites"]]
        show_table(["role", "rule", "matrices", "parameters"], rows)
        whole, kept, budget = stage["parameters"], stage["kept"], rules.budget
        if kept is not None:
            say(f"parameters {whole:,} -> {kept:,} ({kept / whole:.1%} kept)")
        elif budget is not None:
            say(f"parameters {whole:,}; keeps {budget.keep:g} of the {budget.of}, in {budget.shapes} shapes")
        phases = {name: timedelta(seconds=math.ceil(seconds)) for name, seconds in stage["seconds"].items()}
        total = sum(phases.values(), timedelta())
        parts = ", ".join(f"{name} {span}" for name, span in phases.items())
        say(
            f"memory: about {stage['memory'] / 1e9:.2g} GB; time: {f'about {total} ({parts})' if parts else 'not known'}"
        )
    say("nothing was done or written (--dry-run)")


def describe_mix(shapes: list[dict], gone: list[str]) -> str:
    """Return the sizes of stock ``shapes`` in words, and the blocks that are ``gone``."""
    sizes = {shape["kind"]: (shape["size"], shape["of"]) for shape in shapes if shape["kind"] != "block"}
    words = {"heads": "{:,} of {:,} groups of heads", "mlp": "MLPs {:,} of {:,} wide"}
    parts = [words.get(kind, f"{kind} {{:,}} of {{:,}} wide").format(*pair) for kind, pair in sorted(sizes.items())]
    return ", ".join([*parts, f"without {', '.join(gone)}" if gone else "all blocks"])


class Progress:
    """Progress on standard error: one line, written over, on a terminal, else a line for every block, or every ``SECONDS``.

    Call it to wrap the items of a phase, as ``tenfold.compression.progress`` describes; ``advance`` shows steps of a training.
    """

    def __init__(self, title: str):
        self.title, self.text, self.done = title, "", 0

    def __call__(self, items: Iterable, phase: str = "") -> Iterator:
        items, text = list(items), f"{self.title}: {phase}" if phase else self.title
        self._show(text, 0, len(items))
        for done, item in enumerate(items, 1):
            begun = time.perf_counter()
            yield item
            block = getattr(item, "path", "")  # a block takes long enough for a line of its own
            self._show(text, done, len(items), block=block and f": {block}, {time.perf_counter() - begun:.1f} s")

    def advance(self, step: int, steps: int, speed: float | None = None) -> None:
        self._show(f"{self.title}: step", step, steps, f", {speed:,.0f} tokens/s" if speed else "")

    def _show(self, text: str, done: int, total: int, note: str = "", block: str = "") -> None:
        now, terminal = time.perf_counter(), sys.stderr.isatty()
        if text != self.text or done <= self.done:  # another phase, or a training that starts or resumes
            self.text, self.first, self.begun, self.shown = text, done, now, -math.inf
        self.done = done
        if not is_first() or (done < total and now - self.shown < (0.1 if terminal else 0 if block else SECONDS)):
            return
        self.shown = now
        if done > self.first:
            seconds = (now - self.begun) / (done - self.first) * (total - done)
            note = f", {timedelta(seconds=round(seconds))} left{note}"
        line, end = f"{text} {done:,} of {total:,}{block}{note}", "\r" if terminal and done < total else "\n"
        say(line, sys.stderr, "\x1b[K" if terminal else "", end)
