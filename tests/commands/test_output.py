"""What a log file shows of a run in phases: which one it is in, and how long all of them will still take."""

import pytest

from tenfold.compress.progress import Phase, phases_of
from tenfold_cli import output


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(output.time, "perf_counter", lambda: now[0])
    return now


def run(told, clock, items: int, phase, seconds: float) -> None:
    for _ in told(range(items), phase):
        clock[0] += seconds


def test_the_time_left_is_that_of_all_phases(clock, capsys):
    """A quarter took 40 seconds: three quarters take 120. What nobody foresees is not counted as part of either."""
    told = output.phased("compressing")
    run(told, clock, 4, Phase("forward", 0.25), 10)
    run(told, clock, 2, Phase("divergences"), 500)
    run(told, clock, 3, Phase("fits", 0.75), 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "compressing: forward 0 of 4",
        "compressing: forward 3 of 4, 0:02:10 left",
        "compressing: forward 4 of 4, 0:02:00 left",
        "compressing: divergences 0 of 2, 0:02:00 left",
        "compressing: divergences 1 of 2, 0:10:20 left",
        "compressing: divergences 2 of 2, 0:02:00 left",
        "compressing: fits 0 of 3, 0:02:00 left",
        "compressing: fits 1 of 3, 0:01:20 left",
        "compressing: fits 2 of 3, 0:00:40 left",
        "compressing: fits 3 of 3, 0:00:00 left",
    ]


def test_a_log_has_a_line_every_half_minute(clock, capsys):
    run(output.phased("folding"), clock, 1000, "", 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 1000 // 30 + 1 and lines[1] == "folding 30 of 1000, 0:16:10 left"


def test_phases_share_the_whole():
    for gradients in (True, False):
        phases = phases_of(32_768, 196_608, gradients)
        assert phases == ("forward", "backward", "fits") and sum(p.share for p in phases) == pytest.approx(1)


def test_every_healing_is_told_from_its_first_step_on(clock, capsys):
    """Of one that goes on, time is that of the steps that were seen."""
    with output.counted("healing") as advance:
        clock[0] += 1000
        for step in (31, 32, 33, 40, 1, 2):
            advance(step, 40, 100.0)
            clock[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "healing: step 31 of 40 100 tokens/s",
        "healing: step 32 of 40, 0:01:20 left 100 tokens/s",
        "healing: step 40 of 40, 0:00:00 left 100 tokens/s",
        "healing: step 1 of 40 100 tokens/s",
        "healing: step 2 of 40, 0:06:20 left 100 tokens/s",
    ]
