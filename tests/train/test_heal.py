"""Healing and pre-training, on models of toy size."""

import math

import pytest
import small
import torch
from transformers import AutoModelForCausalLM

from tenfold.api import compress
from tenfold.models.recipe import Heal
from tenfold.train.heal import distillation_loss, heal
from tenfold.train.pretrain import train_tokenizer


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
