"""Pre-training, on models of toy size."""

import json

import pytest
import small
import torch
from transformers import AutoModelForCausalLM

from tenfold.api import evaluate
from tenfold.train.optimizer import MuonAdamW
from tenfold.train.pretrain import pretrain, train_tokenizer

RECIPE = {
    "name": "toy",
    "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32},
    "tokenizer": {"vocab_size": 300},
    "train": {"batch": 4, "learning_rate": 5e-3, "tokens": 3200},
}
FOLDED = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "block_train", "rank": 2}}


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
