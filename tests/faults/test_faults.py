"""Jobs that are killed, stopped or out of room, run again: a sample of what ``make faults`` tries."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from places import can_mount, mount_point, small_disks, symlink, two_at_once
from trials import Bench

from tenfold.models import atomic_io
from tenfold.models.atomic_io import atomic_directory, near
from tenfold.models.output_folder import claim_output

KILLED = ("compress-overwrite", "compress-stages", "heal", "finetune", "pretrain")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    base = tmp_path_factory.mktemp("faults")
    yield Bench(base)
    shutil.rmtree(base, ignore_errors=True)


@pytest.mark.parametrize("name", KILLED)
def test_killed_jobs_resume_to_the_same_bytes(bench, name):
    points = bench.points(name, 40, last=2)
    assert not [wrong for at in points if (wrong := bench.trial(name, "kill", at))]


@pytest.mark.parametrize("name", ["compress"])
def test_a_full_disk_is_a_sentence_and_the_job_goes_on_with_room(bench, name):
    assert not [wrong for at in (1, 30, 60) if (wrong := bench.trial(name, "full", at))]


@pytest.mark.parametrize("name", ["compress"])
def test_two_runs_on_one_output(bench, name):
    assert not two_at_once(bench, name)


@pytest.mark.parametrize("name", ["compress-memory", "heal"])
def test_an_output_that_is_a_link(bench, name):
    assert not symlink(bench, name)


@pytest.mark.parametrize("name", ["compress-memory", "heal"])
def test_an_output_that_is_a_mount_point(bench, name):
    if not can_mount(bench.base):
        pytest.skip("mounting is not allowed here")
    assert not mount_point(bench, name)


@pytest.mark.parametrize("name", ["compress-memory"])
def test_small_disks(bench, name):
    assert not small_disks(bench, name, (60, 200))


@pytest.mark.parametrize("name", ["heal"])
def test_a_terminated_job_says_how_to_go_on(bench, name):
    assert not [wrong for fault in ("SIGINT", "SIGTERM") if (wrong := bench.trial(name, fault, 40))]


@pytest.fixture(params=["renamed", "fixed"])
def output(request, tmp_path, monkeypatch):
    """An output with an old model and the user's files; once in a place that can't be renamed, as a mount point."""
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "README.md", "notes.txt", "mine.safetensors", "sub/own"):
        (out / name).write_text(f"old {name}")
    monkeypatch.setattr(atomic_io, "_is_fixed", lambda folder: request.param == "fixed")
    return out


def publish(out: Path) -> None:
    with atomic_directory(out, "run") as new:
        for name in ("model.safetensors", "config.json", "README.md", "tokenizer.json"):
            (new / name).write_text(f"new {name}")


def test_a_result_is_published_whole_at_every_kill_point(output):
    """Whichever change is the last one: the user's files are somewhere, no weights are beside another model's files."""
    for at in range(1, 60):
        again = output.parent / f"{at}" / "out"
        shutil.copytree(output, again)
        if (pid := os.fork()) == 0:
            changes = [0]

            def stop(event, arguments, changes=changes, at=at):
                if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                    changes[0] += 1
                    if changes[0] == at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(stop)
            publish(again)
            os._exit(0)
        killed = os.waitpid(pid, 0)[1]
        own = [
            file.read_text()
            for file in again.parent.rglob("*")
            if file.name in ("notes.txt", "mine.safetensors", "own")
        ]
        assert sorted(own) == ["old mine.safetensors", "old notes.txt", "old sub/own"], at
        if (again / "model.safetensors").is_file():
            read = {(again / name).read_text()[:3] for name in ("model.safetensors", "config.json", "README.md")}
            assert len(read) == 1, at
        publish(again)
        found = {str(file.relative_to(again)): file.read_text() for file in again.rglob("*") if file.is_file()}
        new = {name: f"new {name}" for name in ("model.safetensors", "config.json", "README.md", "tokenizer.json")}
        assert found.pop(".tenfold-run") == "run" and not list(again.parent.glob(".out*"))
        assert found == new | {name: f"old {name}" for name in ("notes.txt", "mine.safetensors", "sub/own")}, at
        if not killed:
            return
    pytest.fail("there are more changes than were tried")


def test_an_output_has_one_writer(tmp_path):
    """A second one is told which process it is; the lock of a dead process is taken over."""
    with (
        claim_output(tmp_path / "out"),
        pytest.raises(FileExistsError, match=f"process {os.getpid()} is writing"),
        claim_output(tmp_path / "out"),
    ):
        pass
    near(tmp_path / "out", "lock").write_text("1")
    with claim_output(tmp_path / "out"):
        assert near(tmp_path / "out", "lock").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match="out is a file"), claim_output(tmp_path / "out"):
        pass
