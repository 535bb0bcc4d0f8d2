"""Two processes: sharded parameters (FSDP2), and data-parallel healing and fine-tuning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import toy_tasks
from train import sharded
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tenfold
from tenfold.api import compress, save
from tenfold.models.distillation_config import Heal
from tenfold.train.heal import heal

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ONE = (*TORCHRUN[:2], "--nproc-per-node=1")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no")  # with --cpu it wants MPI  # fmt: skip


def two(*command: str, launcher=TORCHRUN) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", *launcher]
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    given = [*run, *map(str, command)]
    done = subprocess.run(
        given, capture_output=True, text=True, env=environment, timeout=300
    )  # processes may wait for good
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_heal_as_one(tmp_path):
    """The windows of a step are split, also after the first pass over the text, and one process writes and prints."""
    dense = small.folder(tmp_path / "dense")
    student, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    compress(student, {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]})
    save(student, tmp_path / "folded", tokenizer)
    section = {"steps": 14, "tokens_per_step": 256, "precision": "float32"}
    section |= {"learning_rate": 5e-3, "losses": {"kl": 1.0, "cross_entropy": 0.1}}
    (tmp_path / "heal.yaml").write_text(json.dumps({"heal": section}))
    text = dense / "text.txt"
    one = heal(student, dense, tokenizer, [text], Heal(**section))
    given = ("--teacher", dense, "--data", text, "--recipe", tmp_path / "heal.yaml", "-o", tmp_path / "out")
    done = two("-m", "tenfold", "heal", tmp_path / "folded", *given)
    report = json.loads((tmp_path / "out" / "tenfold.json").read_text())["heal"]
    np.testing.assert_allclose(report["curve"], one["curve"], rtol=1e-4)
    assert report["tokens"] == one["tokens"] == 14 * 256
    assert done.stdout.count("saved in") == 1 and not (tmp_path / "out.partial").exists()
    healed, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(3, 30)[None]
    torch.testing.assert_close(healed(ids).logits, student(ids).logits, rtol=1e-3, atol=1e-3)


def test_two_processes_fine_tune_as_one(tmp_path):
    """The examples of a batch are split, and one process writes and prints."""
    dense, place = small.folder(tmp_path / "dense"), toy_tasks.write_sst2(tmp_path, 64, 16)
    given = {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3, "device": "cpu"}
    one = tenfold.finetune(dense, "sst2", place, tmp_path / "one", seeds=[0], **given)
    options = ("--epochs", 2, "--batch-size", 16, "--learning-rate", 3e-3, "--device", "cpu")
    call = ("-m", "tenfold", "finetune", dense, "--task", "sst2", "--data", place, "-o", tmp_path / "two", *options)
    done = two(*call, launcher=ACCELERATE)
    report = json.loads((tmp_path / "two" / "finetune.json").read_text())
    curves = [run["runs"][0]["curve"] + run["runs"][0]["scores"] for run in (one, report)]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    assert done.stdout.count("saved in") == 1 and not list((tmp_path / "two").glob("*.partial"))
    with pytest.raises(AssertionError, match="2 processes can't share 1 batches of 15 examples"):  # there are two
        two(*call, "--batch-size", 15, launcher=ACCELERATE)
    model, other = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("one", "two"))
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-3, atol=1e-3)


def test_one_of_two_processes_writes(tmp_path):
    """Files of deepen, export and evaluate are complete, and reported once."""
    dense, deep, plain = small.folder(tmp_path / "dense"), tmp_path / "deep", tmp_path / "plain"
    figures = ("--text", dense / "text.txt", "--limit", 100, "--json")
    deepen = ("deepen", dense, "--layers", 4, "-o", deep, "--device", "cpu")
    for command in (deepen, ("export", deep, "--to", "dense", "-o", plain)):
        done = two("-m", "tenfold", *command)
        assert done.stdout.count("saved in") == 1, done.stdout
    done = two("-m", "tenfold", "evaluate", plain, *figures)
    assert len(json.loads(done.stdout)) == 1
    one, ids = tenfold.deepen(AutoModelForCausalLM.from_pretrained(dense), 4)[0], torch.arange(3, 30)[None]
    for folder in (deep, plain):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(model(ids).logits, one(ids).logits, rtol=1e-3, atol=1e-3)


def test_sharded_parameters_train_as_whole_ones(tmp_path):
    two(sharded.__file__, tmp_path / "losses.json")
    result = json.loads((tmp_path / "losses.json").read_text())
    for kind, found in result.items():
        np.testing.assert_allclose(found, sharded.losses(kind, False), rtol=sharded.TOLERANCE[kind], err_msg=kind)
        assert found[-1] < found[0], kind
