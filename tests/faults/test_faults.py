"""Jobs that are killed, stopped or out of room, run again: a sample of what ``make faults`` tries."""

import shutil

import pytest
from places import can_mount, mount_point, small_disks, symlink, two_at_once
from trials import Bench

REFUSED = "the same command refuses its own work, after a kill before the first note or after the result is there"
NOTES = "files of the user are moved into a folder that is deleted; the command refuses its own work"
KILLED = {  # until issue 29 is closed: what does not hold yet, by job
    **dict.fromkeys(("compress", "compress-shards", "compress-stages", "heal", "finetune"), REFUSED),
    "compress-overwrite": NOTES,
    "pretrain": "",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    base = tmp_path_factory.mktemp("faults")
    yield Bench(base)
    shutil.rmtree(base, ignore_errors=True)


def xfail(name: str, reasons: dict[str, str]):
    return pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=reasons[name])] if reasons.get(name) else [])


def each(names, reasons):
    return pytest.mark.parametrize("name", [xfail(name, reasons) for name in names])


@each(KILLED, KILLED)
def test_killed_jobs_resume_to_the_same_bytes(bench, name):
    points = bench.points(name, 40, last=2)
    assert not [wrong for at in points if (wrong := bench.trial(name, "kill", at))]


@each(["compress"], {})
def test_a_full_disk_is_a_sentence_and_the_job_goes_on_with_room(bench, name):
    assert not [wrong for at in (1, 30, 60) if (wrong := bench.trial(name, "full", at))]


@each(["compress"], {"compress": "the second run deletes what the first one has written"})
def test_two_runs_on_one_output(bench, name):
    assert not two_at_once(bench, name)


@each(["compress-memory", "heal"], {"heal": "rmtree of a link, after the work"})
def test_an_output_that_is_a_link(bench, name):
    assert not symlink(bench, name)


@each(["compress-memory", "heal"], dict.fromkeys(("compress-memory", "heal"), "errno 16 or 18, after the work"))
def test_an_output_that_is_a_mount_point(bench, name):
    if not can_mount(bench.base):
        pytest.skip("mounting is not allowed here")
    assert not mount_point(bench, name)


@each(["compress-memory"], {})
def test_small_disks(bench, name):
    assert not small_disks(bench, name, (60, 200))


@each(["heal"], {"heal": "SIGTERM ends the process without a word"})
def test_a_terminated_job_says_how_to_go_on(bench, name):
    assert not [wrong for fault in ("SIGINT", "SIGTERM") if (wrong := bench.trial(name, fault, 40))]
