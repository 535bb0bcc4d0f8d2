"""Outputs in unusual places: two runs at once, a symlink, a mount point, small disks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from trials import JOBS, SECONDS, Bench, contents, finish, fresh, last_line, run, says_full, start


def two_at_once(bench: Bench, name: str) -> str | None:
    """Stop a run in its middle, start another one on its output, and let the first one go on."""
    bench.undisturbed(name)
    folder = fresh(bench.base, f"{name}-two", JOBS[name])
    first = start(folder, JOBS[name], "SIGSTOP", bench.changes[name] // 2)
    os.waitpid(first, os.WUNTRACED)
    second = run(folder, JOBS[name])
    os.kill(first, signal.SIGCONT)
    ended = finish(folder, first, SECONDS)
    told = f"the second run ends with {second.status} ({last_line(second)}), the first one with {ended.status}"
    refused = second.status == 2 and str(first) in last_line(second)  # says which process has it
    wrong = None if refused and ended.status == 0 else told
    return _told(name, "two at once", folder, wrong or bench.judge_result(name, folder))


def symlink(bench: Bench, name: str) -> str | None:
    """Write to a link to an empty folder, which stays a link."""
    bench.undisturbed(name)
    folder = fresh(bench.base, f"{name}-link", JOBS[name])
    place = bench.base / f"{name}-linked"
    place.mkdir()
    if (folder / "out").exists():
        shutil.copytree(folder / "out", place, dirs_exist_ok=True)
        shutil.rmtree(folder / "out")
    (folder / "out").symlink_to(place)
    ended = run(folder, JOBS[name])
    wrong = last_line(ended) if ended.status else bench.judge_result(name, folder)
    if wrong is None and not (folder / "out").is_symlink():
        wrong = "the link is gone"
    shutil.rmtree(place, ignore_errors=True)
    return _told(name, "a link as output", folder, wrong)


def mount_point(bench: Bench, name: str) -> str | None:
    """Write to the root of a file system, as to the volume of a container; nothing is tried where mounting is not allowed."""
    bench.undisturbed(name)
    folder = fresh(bench.base, f"{name}-mounted", JOBS[name])
    old = folder / "old"
    if (folder / "out").exists():
        (folder / "out").rename(old)
    (folder / "out").mkdir()
    if not _mount(folder / "out", "64m"):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    try:
        if old.exists():
            shutil.copytree(old, folder / "out", dirs_exist_ok=True)
            shutil.rmtree(old)
        ended = run(folder, JOBS[name])
        wrong = last_line(ended) if ended.status else bench.judge_result(name, folder)
    finally:
        _unmount(folder / "out")
    return _told(name, "a mount point as output", folder, wrong)


def small_disks(bench: Bench, name: str, sizes: tuple[int, ...] = (24, 60, 120, 200, 300, 400, 500, 600)) -> str | None:
    """Fill small file systems (KiB), and run again with room."""
    bench.undisturbed(name)
    for size in sizes:
        folder = fresh(bench.base, f"{name}-small", JOBS[name])
        old = {file.name: file for file in folder.iterdir()}
        if old or not _mount(folder, f"{size}k"):
            return None  # jobs that overwrite have no room for the old result
        try:
            ended, wrong = run(folder, JOBS[name]), None
            if ended.status and not says_full(ended):
                wrong = f"{size} KiB: status {ended.status}: {last_line(ended)}"
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
            if wrong is None and ended.status:
                wrong = bench.judge_rerun(name, folder)
        finally:
            _unmount(folder)
        if wrong:
            return _told(name, "a small disk", folder, wrong)
        shutil.rmtree(folder, ignore_errors=True)
    return None


CHECKS = {"two": two_at_once, "link": symlink, "mount": mount_point, "small disks": small_disks}


def can_mount(base: Path) -> bool:
    (base / "probe").mkdir(exist_ok=True)
    return _mount(base / "probe", "64k") and _unmount(base / "probe")


def _mount(folder: Path, size: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.name == "posix" and subprocess.run(command, check=False, capture_output=True).returncode == 0


def _unmount(folder: Path) -> bool:
    return subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode == 0


def _told(name: str, place: str, folder: Path, wrong: str | None) -> str | None:
    shutil.rmtree(folder, ignore_errors=True)
    return wrong and f"{name}, {place}: {wrong}"


__all__ = ["CHECKS", "can_mount", "contents", "mount_point", "small_disks", "symlink", "two_at_once"]
