"""Thousands of calls and steps in one process: memory and open files stay as they are after the first few.

``TENFOLD_LONG=10000 pytest tests/faults/test_long_runs.py`` is the long form, which ``make faults`` runs.
"""

import gc
import os
from pathlib import Path

import psutil
import pytest
import small
import torch

import tenfold
from tenfold.train.tokenizer import train_tokenizer

TIMES = int(os.environ.get("TENFOLD_LONG", "120"))
WARM, GROWTH = 40, 24 * 2**20  # calls before the first look; bytes that allocators may keep


@pytest.fixture
def folded():
    tokenizer = train_tokenizer([small.text()], 300, 32)
    recipe = {"name": "x", "replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 8}}]}
    return tenfold.compress(small.model(len(tokenizer)), recipe)[0].eval(), tokenizer


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0


def grown(call, times: int) -> tuple[int, int]:
    """Return the bytes and open files by which the process grew from call ``WARM`` to the last."""
    process = psutil.Process()
    for number in range(times):
        if number == WARM:
            gc.collect()
            memory, files = process.memory_info().rss, open_files()
        call(number)
    gc.collect()
    return process.memory_info().rss - memory, open_files() - files


def test_generating_does_not_grow(folded):
    model, tokenizer = folded
    memory, files = grown(lambda n: tenfold.generate(model, tokenizer, "the old", 4, temperature=0.5, seed=n), TIMES)
    assert memory < GROWTH and files <= 0, (memory, files)


def test_training_steps_do_not_grow(folded):
    model, _ = folded
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step(number):
        ids = torch.randint(300, (4, 16 + number % 4))  # other shapes, other plans
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    memory, files = grown(step, TIMES)
    assert memory < GROWTH and files <= 0, (memory, files)


def test_jobs_do_not_grow(folded, tmp_path):
    """Saving, loading, compressing and healing, again and again in one process."""
    model, tokenizer = folded
    tenfold.save(model, tmp_path / "m", tokenizer)
    (tmp_path / "text.txt").write_text(small.text(300))

    def job(number):
        found, reader = tenfold.load(tmp_path / "m", "cpu")
        tenfold.save(found, tmp_path / "out", reader)
        tenfold.evaluate(found, reader, [tmp_path / "text.txt"], window=32, limit=64)

    memory, files = grown(job, WARM + TIMES // 20)
    assert memory < 2 * GROWTH and files <= 0, (memory, files)
