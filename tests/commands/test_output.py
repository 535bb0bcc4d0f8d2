"""Progress in a log file and on a terminal: the phase of a run, and the time left for it."""

import pytest

from tenfold.compression.actions import BlockPlan
from tenfold_cli import output
from tenfold_cli.options import parse_count


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(output.time, "perf_counter", lambda: now[0])
    return now


def run(progress, clock, items: int, phase, seconds: float) -> None:
    for _ in progress(range(items), phase):
        clock[0] += seconds


def test_time_left_is_that_of_the_phase(clock, capsys):
    progress = output.Progress("compressing")
    run(progress, clock, 4, "forward", 10)
    run(progress, clock, 3, "fits", 40)
    assert capsys.readouterr().err.splitlines() == [
        "compressing: forward 0 of 4",
        "compressing: forward 3 of 4, 0:00:10 left",
        "compressing: forward 4 of 4, 0:00:00 left",
        "compressing: fits 0 of 3",
        "compressing: fits 1 of 3, 0:01:20 left",
        "compressing: fits 2 of 3, 0:00:40 left",
        "compressing: fits 3 of 3, 0:00:00 left",
    ]


def test_a_terminal_has_one_line(clock, capsys, monkeypatch):
    monkeypatch.setattr(output.sys.stderr, "isatty", lambda: True, raising=False)
    run(output.Progress("fitting"), clock, 2, "", 1)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_log_has_a_line_every_half_minute(clock, capsys):
    run(output.Progress("fitting"), clock, 1000, "", 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 1000 // 30 + 1 and lines[1] == "fitting 30 of 1,000, 0:16:10 left"


def test_steps_of_two_trainings(clock, capsys):
    """The time left of a resumed training comes from the steps since it resumed."""
    progress = output.Progress("healing")
    for step in (31, 32, 33, 40, 1, 2):
        progress.advance(step, 40, 100.0)
        clock[0] += 30
    assert capsys.readouterr().err.splitlines() == [
        "healing: step 31 of 40, 100 tokens/s",
        "healing: step 32 of 40, 0:04:00 left, 100 tokens/s",
        "healing: step 33 of 40, 0:03:30 left, 100 tokens/s",
        "healing: step 40 of 40, 0:00:00 left, 100 tokens/s",
        "healing: step 1 of 40, 100 tokens/s",
        "healing: step 2 of 40, 0:19:00 left, 100 tokens/s",
    ]


def test_every_block_has_a_line_in_a_log(clock, capsys):
    progress = output.Progress("compressing")
    for _ in progress([BlockPlan(f"h.{k}", [], []) for k in range(3)], "fits"):
        clock[0] += 1.5
    assert capsys.readouterr().err.splitlines() == [
        "compressing: fits 0 of 3",
        "compressing: fits 1 of 3: h.0, 1.5 s, 0:00:03 left",
        "compressing: fits 2 of 3: h.1, 1.5 s, 0:00:02 left",
        "compressing: fits 3 of 3: h.2, 1.5 s, 0:00:00 left",
    ]


@pytest.mark.parametrize(("free", "said"), [(0.2, "+0.40"), (None, "can't meet this budget")])
def test_stock_shapes_are_said_in_one_line(capsys, free, said):
    choice = {"item": "h.0.down", "chosen": 640, "parameters": 64, "of": 100, "loss": 0.3, "unit": "nats a token"}
    gone = choice | {"item": "h.1", "shape": {"kind": "block", "size": 0, "of": 1, "free": free}}
    output.show_choices([choice | {"shape": {"kind": "mlp", "size": 640, "of": 1024, "free": free}}, gone])
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "stock shapes: MLPs 640 of 1,024 wide, without h.1",
        f"stock shapes: foreseen +0.60 nats a token, free widths: {said}",
    ]


@pytest.mark.parametrize(("text", "count"), [("5M", 5_000_000), ("2.5k", 2500), ("17", 17), ("1b", 10**9)])
def test_counts_are_written_short(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "0", "-3k", "nan", "infM", "five"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError):
        parse_count(text)
