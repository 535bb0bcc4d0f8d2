"""Progress in a log file: the phase of a run, and the time left for all of them."""

import pytest

from tenfold.compression.progress import Phase, estimate_phases
from tenfold_cli import output


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(output.time, "perf_counter", lambda: now[0])
    return now


def run(progress, clock, items: int, phase, seconds: float) -> None:
    for _ in progress(range(items), phase):
        clock[0] += seconds


def test_time_left_covers_all_phases(clock, capsys):
    """A quarter took 40 seconds, so three quarters take 120; the time of phases of unknown length does not count."""
    progress = output.PhaseProgress("compressing")
    run(progress, clock, 4, Phase("forward", 0.25), 10)
    run(progress, clock, 2, Phase("divergences"), 500)
    run(progress, clock, 3, Phase("fits", 0.75), 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "compressing: forward 0 of 4",
        "compressing: forward 3 of 4, 0:02:10 left",
        "compressing: forward 4 of 4, 0:02:00 left",
        "compressing: divergences 0 of 2",
        "compressing: divergences 1 of 2",
        "compressing: divergences 2 of 2",
        "compressing: fits 0 of 3, 0:02:00 left",
        "compressing: fits 1 of 3, 0:01:20 left",
        "compressing: fits 2 of 3, 0:00:40 left",
        "compressing: fits 3 of 3, 0:00:00 left",
    ]


def test_a_log_has_a_line_every_half_minute(clock, capsys):
    run(output.PhaseProgress("folding"), clock, 1000, "", 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 1000 // 30 + 1 and lines[1] == "folding 30 of 1,000, 0:16:10 left"


def test_shares_of_phases_add_up_to_one():
    for gradients in (True, False):
        phases = estimate_phases(32_768, 196_608, gradients)
        assert phases == ("forward", "backward", "fits") and sum(p.share for p in phases) == pytest.approx(1)


def test_steps_of_two_trainings(clock, capsys):
    """The time left of a resumed training comes from the steps since it resumed."""
    with output.StepProgress("healing") as advance:
        clock[0] += 1000
        for step in (31, 32, 33, 40, 1, 2):
            advance(step, 40, 100.0)
            clock[0] += 30
    assert capsys.readouterr().err.splitlines() == [
        "healing: step 31 of 40, 100 tokens/s",
        "healing: step 32 of 40, 0:04:00 left, 100 tokens/s",
        "healing: step 33 of 40, 0:03:30 left, 100 tokens/s",
        "healing: step 40 of 40, 0:00:00 left, 100 tokens/s",
        "healing: step 1 of 40, 100 tokens/s",
        "healing: step 2 of 40, 0:19:00 left, 100 tokens/s",
    ]
