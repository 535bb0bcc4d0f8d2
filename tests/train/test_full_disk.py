"""A full disk is reported in one sentence, whichever library meets it, and existing files stay."""

import json
import sys

import pytest
import small
import torch
import toy_tasks
import transformers
from safetensors import SafetensorError

import tenfold
import tenfold_cli
from tenfold.models.atomic_io import atomic_directory, disk_full_errors
from tenfold.train.pretrain import pretrain

REASONS = [
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    RuntimeError("basic_ios::clear: iostream error"),
    Exception("No space left on device (os error 28)"),
    OSError(28, "No space left on device"),
]
SENTENCE = r"can't be written \(.*\); make room, and repeat the command"


def raises(reason):
    def full(*arguments, **keywords):
        raise reason

    return full


@pytest.fixture
def dense(tmp_path):
    return small.folder(tmp_path / "dense")


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: type(reason).__name__)
def test_what_libraries_say_is_one_sentence(tmp_path, reason):
    with pytest.raises(OSError, match=f"there {SENTENCE}"), disk_full_errors("there"):
        raise reason
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(OSError, match=SENTENCE), atomic_directory(tmp_path / "out") as new:
        (new / "new").write_text("new")
        raise reason
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with pytest.raises(RuntimeError, match="something else"), disk_full_errors("there"):
        raise RuntimeError("something else")
    cut = SafetensorError("Error while deserializing header: invalid header length")
    with pytest.raises(ValueError, match="there has a file that is cut off"), disk_full_errors("there"):
        raise cut


def test_pretraining_goes_on_once_there_is_room(tmp_path, monkeypatch):
    recipe = {
        "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 16},
        "tokenizer": {"vocab_size": 300},
        "train": {"tokens": 640, "batch_size": 4, "save_steps": 5},
    }
    (tmp_path / "text.txt").write_text(small.text(1000))
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", raises(REASONS[3]))
        with pytest.raises(OSError, match=f"tokens {SENTENCE}"):
            pretrain(recipe, [tmp_path / "text.txt"], tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", raises(REASONS[1]))
        with pytest.raises(OSError, match=f"checkpoints {SENTENCE}"):
            pretrain(recipe, [tmp_path / "text.txt"], tmp_path / "run")
    assert pretrain(recipe, [tmp_path / "text.txt"], tmp_path / "run")["tokens"] == 640


def test_fine_tuning_leaves_what_was_there(dense, tmp_path, monkeypatch):
    place = toy_tasks.write_sst2(tmp_path, 16, 8)
    given = {"epochs": 1, "batch_size": 8, "device": "cpu"}
    before = tenfold.finetune(dense, "sst2", place, tmp_path / "out", **given)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", raises(REASONS[0]))
        with pytest.raises(OSError, match=f"seed-0.partial {SENTENCE}"):
            tenfold.finetune(dense, "sst2", place, tmp_path / "out", overwrite=True, **given)
    assert json.loads((tmp_path / "out" / "finetune.json").read_text()) == before


@pytest.mark.parametrize(
    "command", [("deepen", "--layers", "3"), ("export", "--to", "dense")], ids=lambda command: command[0]
)
def test_commands_that_write_a_model(dense, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["tenfold", *command, str(dense), "-o", str(tmp_path / "out")])
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", raises(REASONS[0]))
    monkeypatch.setattr("tenfold.export.weights.save_file", raises(REASONS[0]))
    with pytest.raises(SystemExit) as stopped:
        tenfold_cli.main()
    said = capsys.readouterr().err.splitlines()
    assert (
        stopped.value.code == 2 and "make room, and repeat the command" in said[-1] and not (tmp_path / "out").exists()
    )
