"""Commands give the same results if accelerate shards the parameters over two processes (FSDP2)."""

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
from tenfold.train import fsdp
from tenfold.train.checkpoints import check_checkpoint, write_hashes
from tenfold_cli import app

LLAMA = {"model_type": "llama", "max_position_embeddings": 32, "num_hidden_layers": 2, "hidden_size": 32}
LLAMA |= {"num_attention_heads": 2, "intermediate_size": 64}
TRAIN = {
    "batch_size": 4,
    "learning_rate": 5e-3,
    "tokens": 3200,
    "save_steps": 6,
    "eval_tokens": 640,
    "precision": "float32",
}
DENSE = {
    "name": "toy",
    "model": LLAMA | {"tie_word_embeddings": True},
    "tokenizer": {"vocab_size": 300},
    "train": TRAIN,
}
ALLOCATORS = DENSE | {"replace": [sharded.RULE | {"start": "noise"}]}
TAUGHT = ALLOCATORS | {"train": TRAIN | {"losses": {"kl": 0.5, "cross_entropy": 0.5}}}
LOW_RANK = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "low_rank", "rank": 4}}
FOLDED = DENSE | {"model": LLAMA, "replace": [LOW_RANK], "train": TRAIN | {"compress_at": 0.5}}
HEAL = {"steps": 6, "tokens_per_step": 256, "precision": "float32", "learning_rate": 1e-3, "chunk": 50, "save_steps": 2}
HEAL |= {"losses": {"kl": 1.0, "cross_entropy": 0.1, "hidden": 0.1}}
STAGED = {"name": "stages", "stages": [{"replace": [LOW_RANK | {"role": r}], "heal": HEAL} for r in LOW_RANK["role"]]}
KINDS = {"tuned": AutoModelForSequenceClassification}


def commands(place: Path) -> dict[str, list]:
    """Return commands by the name of their output, and write their recipes and inputs to ``place``."""
    dense, data, text = small.folder(place / "dense"), toy_tasks.write_sst2(place, 64, 16), place / "text.txt"
    text.write_text(small.text())
    tenfold.pretrain(DENSE, [text], place / "teacher", torch.float32)
    for name, recipe in {"shared": ALLOCATORS, "folded": FOLDED, "taught": TAUGHT, "staged": STAGED}.items():
        (place / f"{name}.json").write_text(json.dumps(recipe))
    pretrain = {
        name: ["pretrain", place / f"{name}.json", "--dtype", "float32", "--data"]
        for name in ("shared", "folded", "taught")
    }
    how = ["--epochs", 2, "--batch-size", 16, "--learning-rate", 3e-3, "--device", "cpu"]
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
        return report["runs"][0]["curve"] + report["runs"][0]["scores"]
    return [point for stage in report["stages"] for point in stage["heal"]["curve"]]


def last_of(folder: Path) -> Path:
    return max(folder.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def begun_again(run: Path, place: Path) -> Path:
    """Copy a run, and return it to the checkpoint before its last one."""
    shutil.copytree(run, place)
    shutil.rmtree(last_of(place))
    for file in ("model.safetensors", "config.json", "training.json"):
        (place / file).unlink()
    return place


def test_commands_end_as_with_whole_parameters(tmp_path):
    """Compare losses, models and files in one test, since the runs take long."""
    given = commands(tmp_path)
    for kind in ("whole", "shared out"):
        (tmp_path / kind).mkdir()
        every = [[*map(str, command), "-o", str(tmp_path / kind / name)] for name, command in given.items()]
        (tmp_path / f"{kind}.json").write_text(json.dumps(every))
    for command in json.loads((tmp_path / "whole.json").read_text()):
        app(command, standalone_mode=False)
    two(sharded_commands.__file__, tmp_path / "shared out.json")
    for name in given:
        same_result(tmp_path / "whole" / name, tmp_path / "shared out" / name, name)
    run = tmp_path / "shared out" / "shared"
    checkpoints_are_model_folders(run)
    goes_on_with_one_process(run, json.loads((tmp_path / "shared out.json").read_text())[0][:-1], tmp_path)


def same_result(one: Path, other: Path, name: str) -> None:
    np.testing.assert_allclose(curve_of(other), curve_of(one), rtol=1e-4, err_msg=name)
    kind, ids = KINDS.get(name, AutoModelForCausalLM), torch.arange(3, 30)[None]
    logits = [kind.from_pretrained(folder, dtype=torch.float32)(ids).logits for folder in (one, other)]
    torch.testing.assert_close(*logits, rtol=1e-2, atol=3e-2)
    assert sorted(f.name for f in one.iterdir()) == sorted(f.name for f in other.iterdir()), name


def checkpoints_are_model_folders(run: Path) -> None:
    last, ids = last_of(run), torch.arange(3, 30)[None]
    assert list(last.glob("pytorch_model_fsdp_*"))  # they were in parts
    end, kept = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (run, last))
    torch.testing.assert_close(kept(ids).logits, end(ids).logits)


def goes_on_with_one_process(run: Path, command: list[str], place: Path) -> None:
    """A single process has to shard the parameters, too."""
    begun = begun_again(run, place / "begun")
    (place / "commands.json").write_text(json.dumps([[*command, str(begun)]]))
    two(sharded_commands.__file__, place / "commands.json", launcher=ONE)
    np.testing.assert_allclose(curve_of(begun), curve_of(run), rtol=1e-4)
    with pytest.raises(ValueError, match="with sharded parameters; resume it with accelerate launch"):
        app([*command, str(begun_again(run, place / "other"))], standalone_mode=False)


def test_a_run_of_whole_parameters_does_not_go_on_with_sharded_ones(tmp_path):
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, tmp_path / name)
    write_hashes(tmp_path)
    check_checkpoint(tmp_path, False)
    with pytest.raises(ValueError, match="without sharded parameters; resume it without --use_fsdp"):
        check_checkpoint(tmp_path, True)


def test_a_sharded_checkpoint_may_be_written_as_a_whole(tmp_path):
    """accelerate does so with FULL_STATE_DICT."""
    torch.save({}, tmp_path / "scheduler.pt")
    (tmp_path / "optimizer.bin").touch()
    write_hashes(tmp_path)
    check_checkpoint(tmp_path, True)
    with pytest.raises(ValueError, match="with sharded parameters"):
        check_checkpoint(tmp_path, False)


def test_losses_are_not_rounded_with_what_a_model_returns():
    policy = MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy, fsdp_version=2)
    fsdp.keep_output_dtype(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16)
    fsdp.keep_output_dtype(SimpleNamespace(mixed_precision_policy=None, fsdp_version=2))
    with pytest.raises(ValueError, match="second version only; give accelerate launch --fsdp_version 2"):
        fsdp.keep_output_dtype(SimpleNamespace(mixed_precision_policy=None, fsdp_version=1))
