"""Commands whose parameters accelerate shares out among two processes (FSDP2) do what they do with whole ones."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
import toy_tasks
from torch.distributed.fsdp import MixedPrecisionPolicy
from train import sharded, sharded_commands
from train.test_processes import ONE, two
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tenfold
from tenfold.train import shards
from tenfold_cli import app

LLAMA = {"model_type": "llama", "max_position_embeddings": 32, "num_hidden_layers": 2, "hidden_size": 32}
LLAMA |= {"num_attention_heads": 2, "intermediate_size": 64}
TRAIN = {"batch": 4, "learning_rate": 5e-3, "tokens": 3200, "save_steps": 6, "held_out": 640, "precision": "float32"}
DENSE = {
    "name": "toy",
    "model": LLAMA | {"tie_word_embeddings": True},
    "tokenizer": {"vocab_size": 300},
    "train": TRAIN,
}
SHARED = DENSE | {"replace": [sharded.RULE | {"start": "noise"}]}
TAUGHT = SHARED | {"train": TRAIN | {"losses": {"kl": 0.5, "cross_entropy": 0.5}}}
LOW_RANK = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "low_rank", "rank": 4}}
FOLDED = DENSE | {"model": LLAMA, "replace": [LOW_RANK], "train": TRAIN | {"fold": 0.5}}
HEAL = {"steps": 6, "tokens_per_step": 256, "precision": "float32", "learning_rate": 1e-3, "chunk": 50, "save_steps": 2}
HEAL |= {"losses": {"kl": 1.0, "cross_entropy": 0.1, "hidden": 0.1}}
STAGED = {"name": "stages", "stages": [{"replace": [LOW_RANK | {"role": r}], "heal": HEAL} for r in LOW_RANK["role"]]}
KINDS = {"tuned": AutoModelForSequenceClassification}


def commands(place: Path) -> dict[str, list]:
    """By the name of what they write; their recipes and what they read is written to ``place``."""
    dense, data, text = small.folder(place / "dense"), toy_tasks.write_sst2(place, 64, 16), place / "text.txt"
    text.write_text(small.text())
    tenfold.pretrain(DENSE, [text], place / "teacher", torch.float32)
    for name, recipe in {"shared": SHARED, "folded": FOLDED, "taught": TAUGHT, "staged": STAGED}.items():
        (place / f"{name}.json").write_text(json.dumps(recipe))
    pretrain = {
        name: ["pretrain", place / f"{name}.json", "--dtype", "float32", "--data"]
        for name in ("shared", "folded", "taught")
    }
    how = ["--epochs", 2, "--batch", 16, "--learning-rate", 3e-3, "--device", "cpu"]
    return {
        "shared": [*pretrain["shared"], text],
        "folded": [*pretrain["folded"], text],
        "taught": [*pretrain["taught"], place / "teacher" / "tokens", "--teacher", place / "teacher"],
        "staged": ["compress", dense, "--recipe", place / "staged.json", "--heal", dense / "text.txt"],
        "tuned": ["finetune", dense, "--task", "sst2", "--data", data, *how],
    }


def curve_of(folder: Path) -> list:
    for file in ("training.json", "finetune.json", "tenfold.json"):
        if (folder / file).is_file():
            report = json.loads((folder / file).read_text())
            break
    if file == "training.json":
        return report["curve"] + report["held_out"]
    if file == "finetune.json":
        return [[row["loss"], row["score"]] for row in report["runs"][0]["curve"]]
    return [point for stage in report["stages"] for point in stage["heal"]["curve"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    given = commands(place)
    for kind in ("whole", "shared out"):
        (place / kind).mkdir()
        every = [[*map(str, command), "-o", str(place / kind / name)] for name, command in given.items()]
        (place / f"{kind}.json").write_text(json.dumps(every))
    for command in json.loads((place / "whole.json").read_text()):
        app(command, standalone_mode=False)
    two(sharded_commands.__file__, place / "shared out.json")
    return place


@pytest.mark.parametrize("name", ["shared", "folded", "taught", "staged", "tuned"])
def test_losses_and_models_are_those_of_whole_parameters(runs, name):
    one, other = runs / "whole" / name, runs / "shared out" / name
    np.testing.assert_allclose(curve_of(other), curve_of(one), rtol=1e-4)
    ids = torch.arange(3, 30)[None]
    logits = [
        KINDS.get(name, AutoModelForCausalLM).from_pretrained(f, dtype=torch.float32)(ids).logits for f in (one, other)
    ]
    torch.testing.assert_close(*logits, rtol=1e-2, atol=3e-2)
    assert sorted(f.name for f in one.iterdir()) == sorted(f.name for f in other.iterdir())


def last_of(folder: Path) -> Path:
    return max(folder.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def test_checkpoints_of_sharded_parameters_are_model_folders(runs):
    last = last_of(runs / "shared out" / "shared")
    assert list(last.glob("pytorch_model_fsdp_*"))  # they were in parts
    ids = torch.arange(3, 30)[None]
    end, kept = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (last.parents[1], last))
    torch.testing.assert_close(kept(ids).logits, end(ids).logits)


def begun_again(run: Path, place: Path) -> Path:
    """A run that stands at the checkpoint before its last one."""
    shutil.copytree(run, place)
    shutil.rmtree(last_of(place))
    for file in ("model.safetensors", "config.json", "training.json"):
        (place / file).unlink()
    return place


def test_a_sharded_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    whole = runs / "shared out" / "shared"
    begun, command = begun_again(whole, tmp_path / "run"), json.loads((runs / "shared out.json").read_text())[0][:-1]
    (tmp_path / "commands.json").write_text(json.dumps([[*command, str(begun)]]))
    two(sharded_commands.__file__, tmp_path / "commands.json", launcher=ONE)
    np.testing.assert_allclose(curve_of(begun), curve_of(whole), rtol=1e-4)
    with pytest.raises(ValueError, match="parameters lie in parts on several processes; go on with accelerate launch"):
        app([*command, str(begun_again(whole, tmp_path / "other"))], standalone_mode=False)


def test_a_run_of_whole_parameters_does_not_go_on_with_sharded_ones(tmp_path):
    (tmp_path / "optimizer.pt").touch()
    shards.check_parts(tmp_path, False)
    with pytest.raises(ValueError, match="parameters were whole in every process; go on without --use_fsdp"):
        shards.check_parts(tmp_path, True)


def test_losses_are_not_rounded_with_what_a_model_returns():
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16))
    shards.losses_as_they_are(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16)
    shards.losses_as_they_are(SimpleNamespace(mixed_precision_policy=None))
