"""With TensorBoard installed, every kind of training writes the curves that it reports."""

import json

import pytest
import small
import torch
import toy_tasks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tenfold
from tenfold.checkpoint_jobs import heal_checkpoint
from tenfold.models.distillation_config import Heal
from tenfold.train.pretrain import pretrain

RECIPE = {
    "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 16},
    "tokenizer": {"vocab_size": 300},
    "train": {"tokens": 640, "batch_size": 4},
}


def pretrained(place):
    (place / "text.txt").write_text(small.text(300))
    report = pretrain(RECIPE, [place / "text.txt"], place / "run", torch.float32)
    return report["curve"], place / "run" / "checkpoints"


def healed(place):
    dense = small.folder(place / "dense")
    settings = Heal(steps=4, tokens_per_step=64, losses={"cross_entropy": 1.0})
    report = heal_checkpoint(dense, None, place / "out", [dense / "text.txt"], settings)
    return report["curve"], place / "out"


def fine_tuned(place):
    dense, data = small.folder(place / "dense"), toy_tasks.write_sst2(place, 32, 8)
    tenfold.finetune(dense, "sst2", data, place / "out", epochs=2, batch_size=16, device="cpu")
    lines = [json.loads(line) for line in (place / "out" / "log-0.jsonl").open()]
    return [[row["step"], row["loss"]] for row in lines if "loss" in row], place / "out"


@pytest.mark.parametrize("train", [pretrained, healed, fine_tuned], ids=lambda train: train.__name__)
def test_the_curves_are_there(tmp_path, train):
    curve, folder = train(tmp_path)
    (events,) = (folder / "runs").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    assert [[one.step, pytest.approx(one.value, rel=1e-5)] for one in found.Scalars("train/loss")] == curve
