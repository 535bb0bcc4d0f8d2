"""Run commands in forked processes, disturb them, run them again, and compare with an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import small
import toy_tasks
from interception import Faults

import tenfold_cli

SECONDS, NOTES = 120, "notes.txt"
PASSING = ("checkpoints", "runs", "training_args.bin", NOTES)  # hold times of day, or are the user's
RECIPE = """
name: toy
model: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 1, n_positions: 16}
tokenizer: {vocab_size: 300}
train: {tokens: 384, batch_size: 4, save_steps: 3, precision: float32}
"""
STAGES = """
name: stages
stages:
  - replace: [{role: mlp.in, structure: {kind: low_rank}, keep: 0.6}]
    heal: {steps: 2, tokens_per_step: 64}
  - replace: [{role: mlp.out, structure: {kind: low_rank}, keep: 0.6}]
    calibrate: {num_samples: 4}
"""


@dataclass(frozen=True)
class Job:
    """A command whose result is ``out`` in the working folder; ``..`` holds what it reads."""

    arguments: str
    overwrites: bool = False

    def command(self) -> list[str]:
        return [*self.arguments.split(), *(["--overwrite"] if self.overwrites else [])]


BLOCKS = "compress ../dense -o out --keep 0.8 --calibrate ../text.txt --num-samples 4 --dtype float32"
HEAL = "heal ../folded --teacher ../dense --text ../text.txt --steps 3 --tokens-per-step 64 -o out"
FINETUNE = "finetune ../dense --task sst2 --data .. -o out --epochs 2 --batch-size 8"
JOBS = {
    "compress": Job(BLOCKS),
    "compress-overwrite": Job(BLOCKS, overwrites=True),
    "compress-shards-overwrite": Job(f"{BLOCKS} --max-shard-size 20KB", overwrites=True),
    "compress-memory": Job("compress ../dense -o out --structure low_rank --keep 0.8"),
    "compress-stages": Job("compress ../dense -o out --recipe ../s.yaml --calibrate ../text.txt --heal ../text.txt"),
    "heal": Job(HEAL),
    "heal-overwrite": Job(HEAL, overwrites=True),
    "pretrain": Job("pretrain ../r.yaml --data ../text.txt -o out --device cpu"),
    "finetune": Job(FINETUNE),
    "finetune-overwrite": Job(FINETUNE, overwrites=True),
    "export": Job("export ../folded --to dense -o out"),
    "deepen": Job("deepen ../dense -o out --layers 3"),
}


@dataclass(frozen=True)
class Ended:
    """How a command ended; a negative status is the signal that ended it."""

    status: int
    changes: int
    said: str


def prepare(base: Path) -> Path:
    """Write what the jobs read: a dense and a folded toy, a text, a task and two recipes."""
    small.folder(base / "dense")
    shutil.move(base / "dense" / "text.txt", base / "text.txt")
    toy_tasks.write_sst2(base, 8, 8)
    (base / "r.yaml").write_text(RECIPE)
    (base / "s.yaml").write_text(STAGES)
    ended = run(base, Job("compress dense -o folded --structure low_rank --keep 0.8"))
    assert ended.status == 0, ended.said
    return base


def start(folder: Path, job: Job, fault: str = "kill", at: int = 0) -> int:
    """Start ``job`` in a forked process and return its number."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.chdir(folder)
        os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.argv = ["tenfold", *job.command()]
        faults = Faults(fault, at)
        faults.install()
        try:
            tenfold_cli.main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        except BaseException:
            traceback.print_exc()
        Path(f"{folder}.changes").write_text(str(faults.seen))
    finally:
        os._exit(status)


def finish(folder: Path, pid: int, seconds: float = SECONDS) -> Ended:
    """Wait for the process ``pid`` of ``folder``, which is killed after ``seconds``."""
    until = time.monotonic() + seconds
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    changes = Path(f"{folder}.changes")
    said = Path(f"{folder}.log").read_text(errors="replace")
    return Ended(os.waitstatus_to_exitcode(found[1]), int(changes.read_text()) if changes.exists() else 0, said)


def run(folder: Path, job: Job, fault: str = "kill", at: int = 0) -> Ended:
    return finish(folder, start(folder, job, fault, at))


def fresh(base: Path, name: str, job: Job) -> Path:
    """Return a new working folder; with something to overwrite, and the user's own file beside it, where ``job`` does that."""
    folder = base / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for rest in (".log", ".changes"):
        Path(f"{folder}{rest}").unlink(missing_ok=True)
    if job.overwrites:
        shutil.copytree(base / "folded", folder / "out")
        (folder / "out" / NOTES).write_text("mine")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file of a result, without seconds."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_file() and not any(part in PASSING for part in Path(name).parts) and not name.endswith(".jsonl"):
            raw = file.read_bytes()
            if name.endswith(".json"):
                raw = json.dumps(_without_seconds(json.loads(raw))).encode()
            found[name] = hashlib.sha256(raw).hexdigest()[:12]
    return found


def _without_seconds(value):
    if isinstance(value, dict):
        return {key: _without_seconds(one) for key, one in value.items() if "seconds" not in key and key != "phases"}
    return [_without_seconds(one) for one in value] if isinstance(value, list) else value


class Bench:
    """The folder of all trials, and the undisturbed result of every job."""

    def __init__(self, base: Path):
        self.base, self.results, self.changes = prepare(base), {}, {}

    def undisturbed(self, name: str) -> dict[str, str]:
        if name not in self.results:
            folder = fresh(self.base, f"{name}-undisturbed", JOBS[name])
            ended = run(folder, JOBS[name])
            assert ended.status == 0, ended.said
            self.results[name], self.changes[name] = contents(folder / "out"), ended.changes
        return self.results[name]

    def points(self, name: str, every: int, last: int = 8) -> list[int]:
        """Return every ``every``-th change of the undisturbed run, and the last ones."""
        self.undisturbed(name)
        total = self.changes[name]
        return sorted({*range(1, total + 1, every), *range(max(1, total - last), total + 1)})

    def trial(self, name: str, fault: str, at: int) -> str | None:
        """Disturb the job ``name``, run it again, and return what is wrong then, None if nothing."""
        job, folder = JOBS[name], fresh(self.base, f"{name}-{fault}-{at}", JOBS[name])
        first = run(folder, job, fault, at)
        wrong = _judge_end(first, fault) or _judge_notes(folder, job)
        if wrong is None and first.status:
            wrong = self.judge_rerun(name, folder)
        shutil.rmtree(folder, ignore_errors=True)
        return wrong and f"{name}, {fault} at change {at}: {wrong}"

    def judge_rerun(self, name: str, folder: Path) -> str | None:
        """Run the job again in ``folder`` and return what differs from an undisturbed run."""
        again = run(folder, JOBS[name])
        if again.status:
            return f"the same command again ends with {again.status}: {last_line(again)}"
        return self.judge_result(name, folder)

    def judge_result(self, name: str, folder: Path) -> str | None:
        expected, found = self.undisturbed(name), contents(folder / "out")
        if other := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
            return f"the result differs in {', '.join(other[:4])}"
        left = sorted(file.name for file in folder.iterdir() if file.name != "out")
        return f"left behind: {', '.join(left)}" if left else _judge_notes(folder, JOBS[name], "out")


def last_line(ended: Ended) -> str:
    return (ended.said.strip().splitlines() or ["nothing is said"])[-1][:240]


def says_full(ended: Ended) -> bool:
    """Return whether a command ended with a sentence about the disk."""
    said = ended.said.strip().splitlines()[-1:]  # which may be longer than last_line
    return ended.status == 2 and any(words in line for line in said for words in ("room", "No space left on device: '"))


def _judge_end(ended: Ended, fault: str) -> str | None:
    """Return what is wrong with the way in which a disturbed command ended."""
    if "Traceback" in ended.said:
        return f"a traceback: {last_line(ended)}"
    if fault == "full" and ended.status and not says_full(ended):
        return f"status {ended.status}: {last_line(ended)}"
    expected = {"SIGTERM": 143, "SIGINT": 130}.get(fault)
    if expected and ended.status not in (0, expected):
        return f"status {ended.status} instead of {expected}: {last_line(ended)}"
    return None


def _judge_notes(folder: Path, job: Job, inside: str = ".") -> str | None:
    kept = not job.overwrites or any((folder / inside).rglob(NOTES))
    return None if kept else f"the user's {NOTES} is gone"
