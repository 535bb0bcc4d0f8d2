"""Compression by two processes equals that by one: statistics, choices and fits are distributed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import small
import torch
from compress import processes as in_memory
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from tenfold import checkpoint_jobs
from tenfold.compression import calibration

RECIPE = {"name": "narrow", "replace": [{"prune": "mlp"}, {"prune": "attention"}], "budget": {"keep": 0.8}}


def two(*command: str) -> subprocess.Popen:
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*torchrun, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    started = two(in_memory.__file__, str(folder))
    _, said = started.communicate(timeout=300)
    assert started.returncode == 0, said[-3000:]
    return folder


@pytest.mark.parametrize("case", in_memory.CASES)
def test_two_processes_compress_as_one(by_two, case):
    first, second = (torch.load(by_two / f"{case}-{which}.pt") for which in ("first", "second"))
    one = in_memory.compressed(case)
    assert first.keys() == second.keys() == one.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]) and first[name].shape == value.shape, name
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)


def test_from_disk_to_disk_also_after_one_was_killed(tmp_path):
    dense = small.folder(tmp_path / "dense")
    config = GPT2Config.from_pretrained(dense, n_layer=8)
    GPT2LMHeadModel(config).save_pretrained(dense)
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    text.write_text(small.text(6000))
    recipe.write_text(
        json.dumps(RECIPE | {"calibrate": {"num_samples": 160, "fisher_tokens": 4096, "precision": "float32"}})
    )
    command = ["-m", "tenfold", "compress", str(dense), "-o", str(tmp_path / "out"), "--recipe", str(recipe)]
    first = two(*command, "--calibrate", str(text))
    reached = tmp_path / "out.partial" / "unfinished" / "block-00000.json"
    while first.poll() is None and not reached.exists():
        time.sleep(0.005)
    workers = psutil.Process(first.pid).children()
    assert len(workers) == 2, first.communicate()[1]
    workers[1].kill()
    assert first.wait(timeout=120) != 0 and not (tmp_path / "out").exists()
    second = two(*command, "--calibrate", str(text))
    said = second.communicate(timeout=300)
    assert second.returncode == 0, said[1]
    assert said[0].count("saved in") == 1  # one of them speaks
    checkpoint_jobs.compress_checkpoint(dense, tmp_path / "one", str(recipe), [text])
    one, out = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "out"))
    assert one.keys() == out.keys() and not (tmp_path / "out.partial").exists()
    for name, value in one.items():
        torch.testing.assert_close(out[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("processes", [4, 7, 13])
def test_every_process_has_something_to_read(monkeypatch, processes):
    monkeypatch.setattr(calibration, "num_processes", lambda: processes)
    batches = [{"input_ids": torch.full((2, 16), k), "attention_mask": torch.ones(2, 16)} for k in range(6)]
    if processes == 13:
        with pytest.raises(ValueError, match="13 processes can't share 12 samples of calibration text"):
            calibration.split_for_processes(batches)
    else:
        found = calibration.split_for_processes(batches)
        assert len(found) == (6 if processes == 4 else 12)
        assert torch.equal(*(torch.cat([b["input_ids"] for b in some]) for some in (found, batches)))
