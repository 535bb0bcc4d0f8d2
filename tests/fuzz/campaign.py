"""Read damaged inputs in forked processes, each under limits of time and memory, and collect what is no sentence."""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
import signal
import struct
import time
import traceback
import warnings
from pathlib import Path
from random import Random

from readers import Reader

SECONDS, MEMORY, BATCH = 10, 2 * 2**30, 2000
SENTENCES = (ValueError, OSError, ImportError, NotImplementedError)  # what the command line prints as one sentence


class Slow(BaseException):
    pass


def judge(reader: Reader, given, name: str) -> tuple[str, str] | None:
    """Read one input; return the kind of a finding and its words, None if all is well."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = reader.read(given)
        return None if reader.right(given, found) else ("another model, silently", str(given))
    except SENTENCES as reason:
        if reader.named and name not in str(reason):
            return f"unnamed {type(reason).__name__} {_place(reason)}", str(reason)[:300]
        return None
    except Slow:
        return f"more than {SECONDS} s", str(given)[:300]
    except BaseException as reason:
        return f"{type(reason).__name__} {_place(reason)}", str(reason)[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def try_seed(reader: Reader, folder: Path, seed: int) -> tuple[str, str] | None:
    """Write and read the damaged input of a seed."""
    try:
        given = reader.write(folder, Random(seed))
    except (RecursionError, UnicodeError, OverflowError):  # not every strange value can be written
        return None
    return judge(reader, given, given.name if isinstance(given, Path) else "")


def campaign(reader: Reader, folder: Path, first: int, count: int) -> dict[str, tuple[int, str]]:
    """Try ``count`` seeds from ``first``; return ``{kind: (first seed, words)}`` of the findings."""
    findings: dict[str, tuple[int, str]] = {}
    with mmap.mmap(-1, 8) as place:
        begin, end = first, first + count
        while begin < end:
            begin = _batch(reader, folder, begin, min(end, begin + BATCH), place, findings)
    return findings


def _batch(reader: Reader, folder: Path, begin: int, end: int, place: mmap.mmap, findings: dict) -> int:
    """Try the seeds ``begin`` to ``end`` in a process; return the one to go on with."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    answer = folder.with_suffix(".json")
    answer.unlink(missing_ok=True)
    place[:] = struct.pack("q", begin)
    pid = os.fork()
    if not pid:
        try:
            _limit()
            found: dict[str, tuple[int, str]] = {}
            for seed in range(begin, end):
                place[:] = struct.pack("q", seed)
                if wrong := try_seed(reader, folder, seed):
                    found.setdefault(wrong[0], (seed, wrong[1]))
            answer.write_text(json.dumps(found))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    last, since = begin, time.monotonic()
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        now = struct.unpack("q", place[:])[0]
        last, since = (now, time.monotonic()) if now != last else (last, since)
        if time.monotonic() - since > 2 * SECONDS:  # in a loop of C, which no signal ends
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    if answer.is_file():
        for kind, (seed, words) in json.loads(answer.read_text()).items():
            findings.setdefault(kind, (seed, words))
        return end
    seed = struct.unpack("q", place[:])[0]
    findings.setdefault(f"the process ends with {os.waitstatus_to_exitcode(ended[1])}", (seed, ""))
    return seed + 1


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    signal.signal(signal.SIGALRM, _raise_slow)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)


def _raise_slow(*_) -> None:
    raise Slow


def _place(reason: BaseException) -> str:
    """Return file and line of the package's innermost call, and of the innermost one of all."""
    frames = traceback.extract_tb(reason.__traceback__)
    ours = [frame for frame in frames if "/tenfold" in frame.filename and "/tests/" not in frame.filename]
    told = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:])]
    return "at " + ", in ".join(dict.fromkeys(told))
