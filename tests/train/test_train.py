"""Healing and pre-training, on models of toy size."""

import json
import math

import pytest
import small
import torch
from transformers import AutoModelForCausalLM

from tenfold.api import compress, evaluate
from tenfold.models.recipe import Heal
from tenfold.train.heal import distillation_loss, heal
from tenfold.train.optimizer import MuonAdamW
from tenfold.train.pretrain import pretrain, train_tokenizer

RECIPE = {
    "name": "toy",
    "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32},
    "tokenizer": {"vocab_size": 300},
    "train": {"batch": 4, "learning_rate": 5e-3, "tokens": 3200},
}
FOLDED = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "block_train", "rank": 2}}


@pytest.mark.parametrize(("distill", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.4, 2.0)])
def test_loss_is_its_formula(distill, temperature):
    logits, wanted, targets = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    total = 0.0
    for b in range(2):
        for t in range(3):
            p = torch.softmax(wanted[b, t].double() / temperature, 0)
            q = torch.softmax(logits[b, t].double() / temperature, 0)
            divergence = sum(float(p[v] * math.log(p[v] / q[v])) for v in range(5))
            surprise = -math.log(torch.softmax(logits[b, t].double(), 0)[targets[b, t]])
            total += distill * temperature**2 * divergence + (1 - distill) * surprise
    loss = distillation_loss(logits, wanted, targets, Heal(distill=distill, temperature=temperature))
    assert float(loss) == pytest.approx(total / 6, rel=1e-5)


def test_healing_brings_the_model_nearer_to_its_teacher(tmp_path):
    folder = small.folder(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = train_tokenizer([small.text()], 300, 32)
    compress(student, {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 1}}]})
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    seen = []
    settings = Heal(steps=12, learning_rate=5e-3, tokens_per_step=256)
    report = heal(
        student, teacher, tokenizer, [folder / "text.txt"], settings, advance=lambda k, n: seen.append((k, n))
    )
    student.save_pretrained(tmp_path / "healed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert torch.equal(*(m(input_ids=torch.arange(8)[None]).logits for m in (student, again))), "still in autocast"
    assert student.config.use_cache, "Trainer turned the cache off"
    assert report["steps"] == 12 and report["tokens"] == 12 * 256 and seen[-1] == (12, 12)
    assert report["curve"][-1][1] < 0.6 * report["curve"][0][1] or report["curve"][-1][1] < 1e-3
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())


def test_pretraining_dense_and_folded_learns_and_reloads(tmp_path):
    (tmp_path / "text.txt").write_text(small.text())
    for name, recipe in {"dense": RECIPE, "folded": RECIPE | {"replace": [FOLDED]}}.items():
        folder = tmp_path / name
        report = pretrain(recipe, [tmp_path / "text.txt"], folder)
        model = AutoModelForCausalLM.from_pretrained(folder).float()
        tokenizer = train_tokenizer([small.text()], 300, 32)
        assert evaluate(model, tokenizer, [tmp_path / "text.txt"], limit=640)["perplexity"] < 200
        assert report["tokens"] == 3200 and json.loads((folder / "training.json").read_text()) == report
        assert model.dtype == torch.float32 and (folder / "tokenizer.json").exists()
    assert hasattr(model.transformer.h[0].mlp.c_fc, "structure")


def test_pretraining_resumes_where_it_was(tmp_path):
    (tmp_path / "text.txt").write_text(small.text())
    pretrain(RECIPE, [tmp_path / "text.txt"], tmp_path / "run")
    steps = []
    pretrain(RECIPE, [tmp_path / "text.txt"], tmp_path / "run", advance=lambda k, n: steps.append(k))
    assert steps == [], "a finished run has nothing left to do"


def test_a_recipe_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="has no model, tokenizer or train section"):
        pretrain({"name": "empty"}, [], tmp_path / "run")


def test_every_parameter_is_in_one_group_and_schedulers_reach_all():
    model = small.model()
    optimizer = MuonAdamW(model, lr=0.1, weight_decay=0.0, betas=(0.9, 0.95))
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(
        a is b
        for a, b in zip(optimizer.param_groups, [g for p in optimizer.parts for g in p.param_groups], strict=True)
    )
