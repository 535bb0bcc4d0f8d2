"""Pre-training of toy models: it learns, resumes exactly where it was, and reports errors."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import small
import torch
from losses import off_by
from runs import Killed, killed_at, same_weights, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from tenfold import api
from tenfold.api import compress, evaluate
from tenfold.models.recipe import load_recipe, recipe_names
from tenfold.nn import FactorizedLinear
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.model_factory import window_length
from tenfold.train.pretrain import pretrain
from tenfold.train.recipe_checks import check_recipe_keys
from tenfold.train.self_guided import SelfGuidance, without_guides
from tenfold.train.tokenizer import train_tokenizer
from tenfold.train.tokens import Tokens, write_tokens
from tenfold.train.trainer import DivergenceGuardTrainer, PackedDataset, split_step, training_arguments

RECIPE = {
    "name": "toy",
    "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32},
    "tokenizer": {"vocab_size": 300},
    "train": {"batch_size": 4, "learning_rate": 5e-3, "tokens": 3200, "save_steps": 6},
}
STILL = RECIPE["model"] | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # each process draws its own
COLA = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "cola", "rank": 8}}
BLOCKS = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
BERT = {"model_type": "bert", "max_position_embeddings": 32} | BLOCKS
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {
    "model_type": "mixtral",
    "max_position_embeddings": 32,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
} | BLOCKS
EXPERTS |= {"output_router_logits": True, "router_aux_loss_coef": 1.0}
FOLDED = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "block_train", "rank": 2}}


def with_train(**more) -> dict:
    return RECIPE | {"train": RECIPE["train"] | more}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return a finished run; tests that change it copy it."""
    place = tmp_path_factory.mktemp("finished")
    (place / "text.txt").write_text(small.text())
    pretrain(RECIPE, [place / "text.txt"], place / "run")
    return place / "run"


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Return a run that was killed in step 15; tests that change it copy it."""
    place = tmp_path_factory.mktemp("begun")
    (place / "text.txt").write_text(small.text())
    with pytest.raises(Killed):
        pretrain(RECIPE, [place / "text.txt"], place / "run", advance=killed_at(15))
    return place / "run"


@pytest.mark.parametrize(
    ("rules", "train"),
    [([], {}), ([FOLDED], {"optimizer": "adamw", "lr_scaling": "fans"}), ([COLA], {})],
    ids=["dense-muon", "folded-adamw by fans", "cola-muon"],
)
def test_it_learns_and_reloads(text, tmp_path, rules, train):
    report = pretrain(with_train(**train) | {"replace": rules}, [text], tmp_path / "run")
    assert report["tokens"] == 3200 and json.loads((tmp_path / "run" / "training.json").read_text()) == report
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "checkpoint-24"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        assert evaluate(model.float(), tokenizer, [text], limit=640)["perplexity"] < 200
        assert hasattr(model.transformer.h[0].mlp.c_fc, "structure") == bool(rules)


def test_masked_words_are_learnt(text, tmp_path):
    recipe = with_train(objective="masked") | {"model": BERT}
    report = pretrain(recipe, [text], tmp_path / "run")
    assert report["curve"][-1][1] < report["curve"][0][1] < 7
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run").config.vocab_size == 300
    assert AutoTokenizer.from_pretrained(tmp_path / "run").mask_token == "<|mask|>"


def placed(folder: Path, windows: int = 300) -> Path:
    """Write noisy tokens that are predictable from their position, and a tokenizer with padding."""
    tokenizer, numbers = train_tokenizer([small.text()], 299, 32), np.random.default_rng(0)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>", "pad_token": "<|endoftext|>"})
    ids = np.tile(np.arange(32) * 3 + 20, (windows, 1))
    ids = np.where(numbers.random(ids.shape) < 1 / 3, numbers.integers(20, 200, ids.shape), ids)
    (folder / "some.txt").write_text("a road " * ids.size)
    write_tokens(folder / "tokens", [folder / "some.txt"], tokenizer, ids.size)
    ids.astype(np.uint16).tofile(folder / "tokens" / "tokens.bin")
    return folder / "tokens"


def held_out_again(run: Path, tokens: Path, count: int) -> float:
    """Return the mean loss of the masked tokens of the last ``count`` windows, for the model as it is loaded."""
    model = AutoModelForMaskedLM.from_pretrained(run, dtype=torch.float32).eval()
    hidden = PackedDataset(Tokens(tokens).ids[-count * 32 :], 32, masked=(AutoTokenizer.from_pretrained(run), 0.15))
    batch = {key: torch.stack([hidden[k][key] for k in range(count)]) for key in hidden[0]}
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("more", [{}, {"pad_token_id": 3}], ids=["the tokenizer's padding", "the recipe's"])
def test_a_model_loads_with_the_positions_that_it_was_trained_with(tmp_path, more):
    """RoBERTa counts positions from its padding token."""
    tokens = placed(tmp_path)
    model = BERT | {"model_type": "roberta", "max_position_embeddings": 40, "initializer_range": 0.2} | more
    train = {"objective": "masked", "sequence_length": 32, "tokens": None, "eval_tokens": 1280, "learning_rate": 2e-2}
    recipe = {"name": "placed", "model": model, "train": RECIPE["train"] | train | {"precision": "float32"}}
    told = pretrain(recipe, [tokens], tmp_path / "run", torch.float32)["held_out"][-1][1]
    assert held_out_again(tmp_path / "run", tokens, 40) == pytest.approx(told, rel=1e-4)
    found = json.loads((tmp_path / "run" / "config.json").read_text())["pad_token_id"]
    assert found == more.get("pad_token_id", 0)


@pytest.mark.parametrize("kind", ["modernbert", "roberta", "xlm"])
def test_masked_models_train_with_the_numbers_of_their_tokenizer(text, tmp_path, kind):
    """Their own special tokens are outside of its vocabulary."""
    more = {"xlm": {"emb_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}}
    model = {"model_type": kind, **more.get(kind, BLOCKS | {"max_position_embeddings": 40})}
    pretrain(with_train(objective="masked", sequence_length=32) | {"model": model}, [text], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    numbers = {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}
    assert numbers["pad_token_id"] == 0 and max(numbers.values()) < 300
    assert numbers.get("mask_token_id", 299) == 299


@pytest.mark.parametrize(
    ("model", "pad"),
    [({"model_type": "olmo"}, None), ({"model_type": "roberta", "is_decoder": True, "max_position_embeddings": 40}, 0)],
    ids=["olmo", "roberta"],
)
def test_a_tokenizer_without_padding_makes_no_token_padding_that_is_none(text, tmp_path, model, pad):
    """An embedding of padding is not trained; the end-of-text token is padding where positions are counted from it."""
    pretrain(
        with_train(sequence_length=32) | {"model": BLOCKS | {"max_position_embeddings": 32} | model},
        [text],
        tmp_path / "run",
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert found.config.pad_token_id == pad and found.get_input_embeddings().padding_idx == pad


def test_next_tokens_are_learnt_by_decoders_only(text, tmp_path):
    """A model that sees the tokens after a position is refused, below."""
    model = BLOCKS | {"max_position_embeddings": 32}
    pretrain(RECIPE | {"model": model | {"model_type": "bert", "is_decoder": True}}, [text], tmp_path / "run")
    pretrain(RECIPE | {"model": model | {"model_type": "gpt_neox"}}, [text], tmp_path / "other")  # says it is none


def test_what_is_hidden_depends_on_the_window_only(tmp_path):
    tokenizer = train_tokenizer([small.text()], 300, 32)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    tokens = np.arange(20, 20 + 256)
    one, other = (PackedDataset(tokens, 32, 3, (tokenizer, 0.3)) for _ in range(2))
    backwards = {k: other[k] for k in reversed(range(8))}
    hidden = torch.cat([one[k]["labels"] != -100 for k in range(8)])
    assert 0.1 < hidden.float().mean() < 0.5
    for k in range(8):
        window = one[k]
        assert torch.equal(window["input_ids"], backwards[k]["input_ids"])
        known = torch.from_numpy(tokens[int(one.order[k]) * 32 :][:32])
        shown = window["labels"] == -100
        assert torch.equal(window["input_ids"][shown], known[shown])
        assert torch.equal(window["labels"][~shown], known[~shown])


def test_a_killed_run_goes_on_exactly_where_it_was(text, tmp_path, finished, begun):
    """The weights are bit-identical to those of an uninterrupted run, and the log has every step once."""
    shutil.copytree(begun, tmp_path / "run")
    steps = []
    report = pretrain(RECIPE, [text], tmp_path / "run", advance=lambda k, *rest: steps.append(k))
    assert steps == list(range(13, 26)), "it loses the steps since the last checkpoint, at 12, and no others"
    assert same_weights(finished, tmp_path / "run")
    assert report["curve"] == json.loads((finished / "training.json").read_text())["curve"]
    logged = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (finished, tmp_path / "run")]
    assert [row["step"] for row in logged[0]] == [row["step"] for row in logged[1]]
    assert logged[1][-1]["tokens_per_second"] > 0 and logged[1][-1]["tokens"] == 25 * 128


def test_what_is_half_written_is_no_checkpoint(text, tmp_path, begun):
    shutil.copytree(begun, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "checkpoint-12" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    (tmp_path / "run" / "tokens" / "tokens.json").unlink()
    steps = []
    pretrain(RECIPE, [text], tmp_path / "run", advance=lambda k, *rest: steps.append(k))
    assert steps[0] == 7, "from checkpoint 6"


@pytest.mark.parametrize("tokens", [3200, 326])
def test_a_finished_run_has_nothing_left_to_do(text, tmp_path, tokens):
    """Nor is it trained on by the windows that fill no step."""
    recipe, steps = with_train(tokens=tokens, schedule="constant"), []
    first = pretrain(recipe, [text], tmp_path / "run")
    before = weights(tmp_path / "run")
    again = pretrain(recipe, [text], tmp_path / "run", advance=lambda k, *rest: steps.append(k))
    assert steps == [] and again["curve"] == first["curve"]
    assert last_checkpoint(tmp_path / "run" / "checkpoints").name == f"checkpoint-{tokens // 128}"
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize("more", ["gradient_checkpointing", pytest.param("compile", marks=pytest.mark.traced)])
def test_losses_are_the_same(text, tmp_path, more, monkeypatch):
    """Use activation checkpointing, or torch.compile (inductor takes a minute)."""
    calls, compiled, forward, compile = [], [], FactorizedLinear.forward, torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or compile(model, backend="eager"))
    if more == "gradient_checkpointing":
        monkeypatch.setattr(FactorizedLinear, "forward", lambda layer, x: calls.append(1) or forward(layer, x))
    recipe = with_train(tokens=640, precision="float32") | {"replace": [FOLDED], "model": STILL}
    expected = pretrain(recipe, [text], tmp_path / "plain")["curve"]
    once = len(calls)
    found = pretrain(recipe | {"train": recipe["train"] | {more: True}}, [text], tmp_path / "run")["curve"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_equal((len(calls) - once, bool(compiled)), (2 * once, more == "compile"))
    expected = weights(tmp_path / "plain")
    for place in (tmp_path / "run", last_checkpoint(tmp_path / "run" / "checkpoints")):
        assert all(torch.allclose(value, expected[name], atol=1e-3) for name, value in weights(place).items())


def test_index_maps_are_saved_as_they_are(text, tmp_path):
    """They include integers above 256, which bfloat16 can't represent."""
    structure = {"kind": "placed", "base": {"kind": "kronecker", "outs": [256, 2], "ins": [16, 2]}}
    recipe = with_train(tokens=800, save_steps=100) | {"replace": [{"role": "mlp.in", "structure": structure}]}
    recipe["model"] = RECIPE["model"] | {"n_inner": 512}
    pretrain(recipe, [text], tmp_path / "run", torch.bfloat16)
    trained, saved = (
        {
            key: value
            for key, value in load_file(folder / "model.safetensors").items()
            if key.endswith((".rows", ".columns"))
        }
        for folder in (last_checkpoint(tmp_path / "run" / "checkpoints"), tmp_path / "run")
    )
    assert len(saved) == 2 and all(torch.equal(value, trained[key]) for key, value in saved.items())
    assert sorted(len(set(value.tolist())) for value in saved.values()) == [32, 512]
    assert all(value.dtype == torch.int32 for value in saved.values())


def test_the_loss_on_held_out_text_is_told(text, tmp_path):
    report = pretrain(with_train(eval_tokens=320), [text], tmp_path / "run")
    assert [step for step, _ in report["held_out"]] == [6, 12, 18, 22] and report["tokens"] == 22 * 128


def test_the_best_checkpoint_and_the_last_one_are_kept(text, tmp_path, monkeypatch):
    def worse(self, *arguments, **keywords):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(DivergenceGuardTrainer, "evaluate", worse)
    pretrain(with_train(eval_tokens=320), [text], tmp_path / "run")
    kept = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert {path.name for path in kept} == {"checkpoint-6", "checkpoint-22"}


def test_another_recipe_is_not_mixed_in(text, tmp_path, begun):
    shutil.copytree(begun, tmp_path / "run")
    other = with_train(learning_rate=1e-3)
    with pytest.raises(
        ValueError, match=r"is a run of another recipe \(train.learning_rate is 0.005 there and 0.001 here\)"
    ):
        pretrain(other, [text], tmp_path / "run")


def test_a_run_goes_on_with_another_learning_rate(text, tmp_path, finished, begun):
    """After ``run.json`` is edited, all groups continue at the same place of the schedule."""
    shutil.copytree(begun, tmp_path / "run")
    noted = json.loads((tmp_path / "run" / "run.json").read_text())
    noted["recipe"]["train"]["learning_rate"] = 5e-4
    (tmp_path / "run" / "run.json").write_text(json.dumps(noted))
    pretrain(with_train(learning_rate=5e-4), [text], tmp_path / "run")
    lower, whole = (
        {row["step"]: row["learning_rate"] for row in map(json.loads, (run / "log.jsonl").open()) if "loss" in row}
        for run in (tmp_path / "run", finished)
    )
    for step, rate in lower.items():
        assert rate == pytest.approx(whole[step] / (10 if step > 12 else 1)), step
    assert max(lower) == 25


RULES = {"replace": [FOLDED]}
CHOICE = {"role": "mlp.in", "structure": [{"kind": "low_rank"}, {"kind": "kronecker"}]}
HALF = {"keep": 0.5, "of": "blocks"}
MODEL, ROBERTA = RECIPE["model"], {"model_type": "roberta", "max_position_embeddings": 34} | BLOCKS
XLM = {"model_type": "xlm", "emb_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
AHEAD = "attends to the tokens after .*; write objective: masked .*, or"
MASKED = {"objective": "masked"}
REFUSED = [
    ({"model": MODEL | {"vocab_size": 300}}, "model: a model has vocab_size from its tokenizer; leave that out"),
    ({"model": MODEL | {"eos_token_id": 0}}, "model: a model has eos_token_id from its tokenizer"),
    ({"model": {"n_positions": 32}}, "model: a model needs its model_type, for instance"),
    ({"model": {"model_type": "lama"}}, "transformers knows no model_type 'lama'; did you mean 'llama'"),
    ({"model": {"model_type": "qqqqq"}}, "no model_type 'qqqqq'; there are llama, gpt2, bert and many more"),
    ({"model": MODEL | {"n_head": "a"}}, "recipe 'toy' has a model that can't be"),
    ({"model": MODEL | {"n_embd": 1.5}}, "recipe 'toy' has a model that can't be"),
    ({"model": MODEL | {"num_layers": 1}}, "a model of model_type 'gpt2' has no 'num_layers'; did you mean 'n"),
    ({"model": MODEL | {"qqqq": 1}}, "a model of model_type 'gpt2' has no 'qqqq'; leave it out"),
    ({"model": BERT | {"n_layers": 1}}, "a model of model_type 'bert' has no 'n_layers'; did you mean "),
    ({"model": BERT}, f"a bert {AHEAD} is_decoder: true"),
    ({"model": XLM}, f"a xlm {AHEAD} causal: true"),
    ({"model": {"model_type": "t5", "d_model": 16, "num_layers": 1}, "train": {"sequence_length": 16}},
     "^transformers has no AutoModelForCausalLM of T5; take a model that it has one of$"),
    ({"train": {"mlm_probability": 0.5}}, "train.mlm_probability 0.5 is of objective masked, and nothing is hidden here; leave"),
    ({"train": {"temperature": 2.0}}, "recipe 'toy' learns from a teacher, .* name it"),
    ({"train": {"temperature": 2.0, "teacher": "x", "losses": {"cross_entropy": 1.0}}},
     "train.temperature 2 is of divergences from a teacher, and the losses have none; leave it out"),
    ({"train": {"seed": 2**70}}, "train.seed: Input should be less than 4294967296, not 1180591620717411303424"),
    ({"train": {"sequence_length": 64}}, "sequence_length 64 of recipe 'toy' is longer than the 32 positions of its model"),
    ({"model": ROBERTA, "train": MASKED | {"sequence_length": 33}}, "sequence_length 33 .* longer than the 32 positions"),
    ({"stages": [RULES]}, "stages of recipe 'toy' is for a trained model: train dense .*, train: {compress_at: 0.5}, or"),
    ({"transform": "drop-layers", "budget": HALF}, "transform of recipe 'toy' is for a trained model"),
    ({"squeeze": {"role": "mlp.in"}}, "squeeze of recipe 'toy' is for a trained model"),
    (RULES | {"calibrate": {}}, "calibrate of recipe 'toy' is for a trained model"),
    (RULES | {"heal": {"steps": 5}}, "heal of recipe 'toy' is for a compressed model, .*: leave it out"),
    ({"budget": HALF}, "budget of recipe 'toy' does nothing without rules under replace: write one, or leave it out"),
    ({"untie": True}, "untie of recipe 'toy' does nothing without rules"),
    ({"replace": [{"prune": "mlp"}]}, "has prune: mlp, which activations of a trained model decide: train dense"),
    ({"replace": [CHOICE]}, "has a choice of 2 structures, which activations .*, train: {compress_at: 0.5} with calibrate"),
    (RULES | {"budget": {"keep": 0.5, "of": "flops"}}, "has a budget of flops, which activations of a trained"),
    ({"replace": [FOLDED | {"start": "fanz"}]}, "there is no start 'fanz'; did you mean 'fans'"),
    ({"replace": [FOLDED | {"start": "nonsense"}], "train": {"compress_at": 0.5}}, "no start .nonsense.; did you mean .noise"),
    ({"replace": [FOLDED | {"start": "mpo"}]},
     "the start mpo of recipe 'toy' is a fit to a trained matrix, .*: draw by noise, balanced, fans, or"),
    ({"replace": [FOLDED | {"start": "nearest"}]}, "the start nearest of recipe 'toy' is a fit to a trained matrix"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "sentence"), REFUSED)
def test_what_can_not_be_is_refused_before_anything_is_written(text, tmp_path, recipe, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain(RECIPE | recipe, [text], tmp_path / "run")
    assert not (tmp_path / "run").exists()


NUMBER = r"pad_token_id 5000 in its model section, but its tokenizer has the tokens 0 to 299; leave that"
OLMO = BLOCKS | {"model_type": "olmo", "max_position_embeddings": 32, "pad_token_id": 10**6}


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"model": MODEL | {"pad_token_id": 5000}}, NUMBER),
        ({"model": OLMO}, "recipe 'toy' has a model that can't be: Padding_idx"),
        ({"train": RECIPE["train"] | {"self_guided_fraction": 0.5}}, "there is nothing to guide"),
        (
            {"train": RECIPE["train"] | {"self_guided_fraction": 0.5}, "replace": [COLA]},
            "self_guided_fraction needs a matrix beside every structured layer, and none .* cola",
        ),
        ({"tokenizer": {"name": "nowhere"}}, "there is no tokenizer nowhere; name a folder that has one, or"),
    ],
)
def test_what_does_not_fit_the_text_is_refused(text, tmp_path, recipe, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain(RECIPE | recipe, [text], tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_no_number_is_told_and_not_saved(text, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"the loss is (nan|inf) at step \d+ \(windows \d+ to \d+ of epoch 1, .* 0; learning rate 1e\+30\)",
    ):
        pretrain(with_train(learning_rate=1e30, optimizer="adamw"), [text], tmp_path / "run")
    assert not any((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_weights_that_are_no_numbers_are_not_saved(text, tmp_path, monkeypatch):
    """A gradient may be NaN where the loss is not; training resumes from the checkpoint before it."""

    def poisoned(self, *arguments, **keywords):
        loss = whole(self, *arguments, **keywords)
        if self.state.global_step == 11:
            self.model.transformer.ln_f.weight.grad[3] = torch.nan
        return loss

    whole = DivergenceGuardTrainer.training_step
    monkeypatch.setattr(DivergenceGuardTrainer, "training_step", poisoned)
    with pytest.raises(
        ValueError, match=r"weights are NaN or infinite after step 12 \(.*\); the last good .* is .*checkpoint-6;"
    ):
        pretrain(with_train(), [text], tmp_path / "run")
    monkeypatch.undo()
    assert pretrain(with_train(), [text], tmp_path / "run")["curve"][-1][0] == 25


def test_a_process_is_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert training_arguments(tmp_path, 1e-3, 4, use_cpu=False, bf16=False).n_gpu == 1
    assert training_arguments(tmp_path, 1e-3, 4, use_cpu=True).n_gpu == 0
    # inactive guides have no gradient; with activation checkpointing Trainer assumes that there are none
    assert training_arguments(tmp_path, 1e-3, 1, activation_checkpointing=True).ddp_find_unused_parameters


AWAY = r"the loss has run away to .* over the best mean before it; "


def test_a_loss_that_runs_away_is_stopped(text, tmp_path, monkeypatch):
    """The message names a checkpoint at which the loss was good, not simply the last one."""
    monkeypatch.setattr(DivergenceGuardTrainer, "STEPS", 3)
    off_by(monkeypatch, {0: 0.0, 8: 1.5, 14: 50.0})
    with pytest.raises(ValueError, match=AWAY + r"the last good checkpoint is .*checkpoint-6 \(delete later ones"):
        pretrain(with_train(learning_rate=1e-9), [text], tmp_path / "run")
    kept = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert {path.name for path in kept} == {"checkpoint-6", "checkpoint-12"}
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_loss_that_runs_away_at_once_has_no_good_checkpoint(text, tmp_path):
    """A short run that diverges does not finish, either; the loss of a guess is the logarithm of the vocabulary."""
    wild = {"learning_rate": 3.0, "warmup": 0.0, "schedule": "constant", "batch_size": 1, "save_steps": 20}
    none = AWAY + "the loss was not good at any checkpoint, so start again; lower the learning rate"
    with pytest.raises(ValueError, match=none):
        pretrain(with_train(**wild), [text], tmp_path / "long")
    assert {row["step"] for row in map(json.loads, (tmp_path / "long" / "log.jsonl").open())} == {1, 10, 20, 30, 40, 50}
    with pytest.raises(ValueError, match=AWAY + "there is no checkpoint yet"):
        pretrain(with_train(**wild | {"tokens": 640}), [text], tmp_path / "short")
    assert not (tmp_path / "short" / "model.safetensors").exists()


def test_a_run_that_goes_on_knows_how_good_it_was(text, tmp_path, begun, monkeypatch):
    shutil.copytree(begun, tmp_path / "run")
    monkeypatch.setattr(DivergenceGuardTrainer, "STEPS", 3)
    off_by(monkeypatch, {0: 4.0})
    with pytest.raises(
        ValueError, match=AWAY + r"the last good checkpoint is .*checkpoint-12; lower the learning rate"
    ):
        pretrain(RECIPE, [text], tmp_path / "run")


def test_no_hidden_token_in_the_first_step_is_no_good_loss(text, tmp_path, monkeypatch):
    """Later losses are not compared with it."""
    monkeypatch.setattr(DivergenceGuardTrainer, "STEPS", 3)
    off_by(monkeypatch, {0: -5.7, 1: 0.0})
    assert pretrain(with_train(objective="masked", learning_rate=1e-9) | {"model": BERT}, [text], tmp_path / "run")[
        "curve"
    ]


# guides -----------------------------------------------------------------------------------------------------------


def test_a_guide_leads_and_leaves(text, tmp_path):
    """Outputs change from those of the guide over a mixture to those of the structured layer."""
    model = small.model().train()
    compress(model, {"replace": [FOLDED]})
    ids, unguided = torch.arange(8)[None], model.state_dict().keys()
    before, guided = model(input_ids=ids).logits, SelfGuidance(model, 0.5)
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=0)
    layer, x = guided.layers[0], torch.randn(3, 32)
    with torch.no_grad():
        layer.guide.weight.add_(0.1)
    for step, share in [(0, 1.0), (5, 0.5), (10, 0.0), (15, 0.0)]:
        guided.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=20), None)
        expected = share * (x @ layer.guide.weight.T) + (1 - share) * (x @ layer.dense().T) + layer.bias
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    guided.on_step_begin(None, SimpleNamespace(global_step=0, max_steps=20), None)
    torch.testing.assert_close(layer.eval()(x), x @ layer.dense().T + layer.bias, atol=1e-5, rtol=0)
    assert without_guides(model.state_dict()).keys() == unguided


def test_guided_training_ends_structured_and_resumes(text, tmp_path):
    recipe = with_train(self_guided_fraction=0.5) | {"replace": [FOLDED]}
    pretrain(recipe, [text], tmp_path / "whole")
    with pytest.raises(Killed):
        pretrain(recipe, [text], tmp_path / "run", advance=killed_at(9))
    pretrain(recipe, [text], tmp_path / "run")
    assert not any("guide" in name for name in weights(tmp_path / "run"))
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_the_loss_on_held_out_text_is_that_of_the_checkpoint(text, tmp_path):
    """A guided checkpoint is evaluated without its guides."""
    recipe = with_train(self_guided_fraction=1.0, eval_tokens=320, precision="float32") | {"replace": [FOLDED]}
    report = pretrain(recipe, [text], tmp_path / "run")
    place = last_checkpoint(tmp_path / "run" / "checkpoints").with_name("checkpoint-18")
    model = AutoModelForCausalLM.from_pretrained(place)
    tokens = torch.from_numpy(Tokens(tmp_path / "run" / "tokens").ids[2880:].astype(np.int64)).reshape(10, 32)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss for window in tokens]
    assert float(sum(losses)) / 10 == pytest.approx(dict(report["held_out"])[18], rel=2e-5)


def test_the_loss_on_held_out_text_is_the_mean_over_its_hidden_tokens(text, tmp_path):
    """It does not depend on the batches; 11 windows are not a multiple of 4."""
    told, train = [], {"objective": "masked", "eval_tokens": 352, "precision": "float32", "learning_rate": 1e-9}
    for batch in (1, 4):
        train |= {"batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        told.append(pretrain(with_train(**train) | {"model": BERT}, [text], tmp_path / f"run-{batch}")["held_out"])
    np.testing.assert_allclose(told[0], told[1], rtol=1e-5)
    again = held_out_again(last_checkpoint(tmp_path / "run-4" / "checkpoints"), tmp_path / "run-4" / "tokens", 11)
    assert again == pytest.approx(told[1][-1][1], rel=1e-5)


def test_tokens_are_those_of_the_documents_with_their_ends(tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": small.text(20, k)}) for k in range(30)))
    tokenizer = train_tokenizer([small.text()], 300, 32)
    tokens = write_tokens(tmp_path / "tokens", [tmp_path / "lines.jsonl"], tokenizer, 777)
    each = [tokenizer(json.loads(line)["text"])["input_ids"] + [0] for line in (tmp_path / "lines.jsonl").open()]
    assert np.array_equal(tokens.ids, np.concatenate(each)[:777])
    assert np.array_equal(Tokens(tmp_path / "tokens", 300).ids, tokens.ids[:300])


def test_another_runs_tokens_are_data(text, tmp_path, finished):
    recipe = copy.deepcopy(RECIPE)
    del recipe["tokenizer"]
    pretrain(recipe, [finished / "tokens"], tmp_path / "other")
    assert same_weights(finished, tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds tokens of a vocabulary of 300, but recipe 'toy' wants 290"):
        pretrain(RECIPE | {"tokenizer": {"vocab_size": 290}}, [finished / "tokens"], tmp_path / "third")
    tokenizer = train_tokenizer([small.text(seed=5)], 280, 32)
    with pytest.raises(ValueError, match=r"holds the tokens of another run \(tokenizer is \w+ there and"):
        write_tokens(finished / "tokens", [text], tokenizer, 3200)


def test_a_run_goes_on_with_its_own_data_only(text, tmp_path):
    """Two folders of tokens differ in their tokens only; a folder may be moved."""
    tokenizer = train_tokenizer([small.text()], 300, 32)
    for name in ("one", "other"):
        (tmp_path / "data.txt").write_text(small.text()[:: 1 if name == "one" else -1])
        write_tokens(tmp_path / name, [tmp_path / "data.txt"], tokenizer, 3200)
    with pytest.raises(Killed):
        pretrain(RECIPE, [tmp_path / "one"], tmp_path / "run", advance=killed_at(7))
    with pytest.raises(
        ValueError,
        match=r"run is a run on other data, or with another model \(digest is \w+ there .* here\); repeat it",
    ):
        pretrain(RECIPE, [tmp_path / "other"], tmp_path / "run")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert pretrain(RECIPE, [tmp_path / "moved"], tmp_path / "run")["curve"][-1][0] == 25


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.jsonl", "\n", "there are no documents in .*empty.jsonl; give text"),
        ("empty.txt", "\n", "there are no documents in .*empty.txt; give text"),
        ("short.txt", "a road", "fewer than one window of 32: give more text"),
    ],
)
def test_too_short_a_text(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        pretrain(RECIPE, [tmp_path / name], tmp_path / "run")


@pytest.mark.parametrize("other", [with_train(batch_size=50), RECIPE | {"tokenizer": {"vocab_size": 280}}])
def test_fewer_windows_than_a_step(text, tmp_path, other):
    """A run that was refused stands in nobody's way, also if another one has other tokens."""
    with pytest.raises(ValueError, match=r"the text has 100 windows, fewer than the 400 of a step"):
        pretrain(with_train(batch_size=100, gradient_accumulation_steps=4), [text], tmp_path / "run")
    pretrain(other, [text], tmp_path / "run")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == other["tokenizer"]["vocab_size"]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_is_named(finished, text, tmp_path, name, damage):
    if (name, damage) == ("rng_state.pth", "missing"):
        return  # of another number of processes, others are drawn
    shutil.copytree(finished, tmp_path / "run")
    last = last_checkpoint(tmp_path / "run" / "checkpoints")
    data, _ = (last / name).read_bytes(), (last / name).unlink()
    if damage == "cut":
        (last / name).write_bytes(data[: len(data) // 2])
    for file in ("training.json", "model.safetensors"):
        (tmp_path / "run" / file).unlink()
    with pytest.raises(
        ValueError, match=rf"{name} is missing, cut off or changed; delete .*{last.name} and rerun the same command"
    ):
        pretrain(RECIPE, [finished / "tokens"], tmp_path / "run")
    shutil.rmtree(last)
    pretrain(RECIPE, [finished / "tokens"], tmp_path / "run")
    assert same_weights(finished, tmp_path / "run")


def test_keys_that_transformers_renames_moves_or_reads_by_default_are_known():
    for model in (
        RECIPE["model"] | {"num_hidden_layers": 2, "attn_implementation": "eager", "tie_word_embeddings": False},
        EXPERTS | {"rope_theta": 1e4, "experts_implementation": "eager"},
        {"model_type": "deberta-v2", "norm_rel_ebd": "layer_norm", "position_buckets": 8} | BLOCKS,
        {"model_type": "gemma3", "text_config": {"hidden_size": 32, "max_position_embeddings": 32}},
    ):
        objective = "masked" if model["model_type"] == "deberta-v2" else "causal"
        window_length(load_recipe(RECIPE | {"model": model, "train": {"sequence_length": 16, "objective": objective}}))


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("pretrain-")])
def test_shipped_recipes_can_be_trained(name):
    recipe = load_recipe(name)
    check_recipe_keys(recipe)
    assert window_length(recipe) == {"pretrain-btt": 512, "pretrain-cola": 256}.get(name, 1024), "the model's positions"


def test_masks_need_a_tokenizer_that_has_one(finished, tmp_path):
    with pytest.raises(ValueError, match="has no mask token, which the objective masked needs; give text"):
        recipe = {"name": "masked", "model": BERT, "train": RECIPE["train"] | {"objective": "masked"}}
        pretrain(recipe, [finished / "tokens"], tmp_path / "run")


def test_what_is_saved_has_a_type_of_its_own(text, tmp_path):
    with pytest.raises(ValueError, match="dtype auto is for models that are read"):
        pretrain(RECIPE, [text], tmp_path / "run", "auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "objective"),
    [(STILL, "causal"), (EXPERTS, "causal"), (BERT, "masked")],
    ids=["gpt2", "mixtral", "bert"],
)
def test_losses_are_means_over_the_tokens_of_a_step(text, tmp_path, model, objective):
    """A loss is the model's own for the windows of the step, however they are batched; masked tokens weigh alike."""
    more = {"objective": objective, "learning_rate": 1e-9, "precision": "float32", "tokens": 512, "save_steps": 1}
    told = {}
    for accumulate in (1, 2):
        recipe = with_train(**more, batch_size=4 // accumulate, gradient_accumulation_steps=accumulate) | {
            "model": model
        }
        told[accumulate] = pretrain(recipe, [text], tmp_path / f"run-{accumulate}")["curve"]
    place = tmp_path / "run-1"
    tokenizer = AutoTokenizer.from_pretrained(place)
    windows = PackedDataset(Tokens(place / "tokens").ids, 32, 0, (tokenizer, 0.15) if objective == "masked" else None)
    own = (AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM).from_pretrained(
        last_checkpoint(place / "checkpoints")
    )
    for step, loss in told[1]:
        some = [windows[k] for k in range(4 * step - 4, 4 * step)]
        batch = {key: torch.stack([window[key] for window in some]) for key in some[0]}
        assert loss == pytest.approx(own(**batch).loss.item(), rel=1e-4)
    np.testing.assert_allclose(told[2], told[1], rtol=1e-3 if model is EXPERTS else 1e-5)  # the load of half a batch


def test_tokens_of_another_tokenizer(tmp_path, finished):
    train_tokenizer([small.text(seed=5)], 280, 32).save_pretrained(tmp_path / "other")
    recipe = RECIPE | {"tokenizer": {"name": str(tmp_path / "other")}}
    with pytest.raises(ValueError, match="holds tokens of another tokenizer than"):
        pretrain(recipe, [finished / "tokens"], tmp_path / "two")


def _swapped(folder: Path) -> None:
    train_tokenizer([small.text(seed=5).upper()], 300, 32).save_pretrained(folder)


def _beyond(folder: Path) -> None:
    ids = np.fromfile(folder / "tokens.bin", np.uint16)
    ids[100] = 60000
    ids.tofile(folder / "tokens.bin")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_swapped, "has another tokenizer than the one that produced its tokens; restore tokenizer.json, or delete"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "has no tokenizer beside its tokens; copy tokenizer.json",
        ),
        (_beyond, r"tokens.bin holds token 60,000 of a vocabulary of 300; copy it again, or delete the folder"),
        (lambda folder: os.truncate(folder / "tokens.bin", 3000), r"tokens.bin is missing or cut off"),
        (lambda folder: os.truncate(folder / "tokens.bin", 0), r"tokens.bin is missing or cut off"),
        (lambda folder: (folder / "tokens.bin").unlink(), r"tokens.bin is missing or cut off"),
    ],
    ids=["tokenizer swapped", "no tokenizer", "token beyond", "cut off", "empty", "missing"],
)
@pytest.mark.parametrize("own", [True, False], ids=["its own", "another run's"])
def test_damaged_tokens_are_one_sentence(text, tmp_path, finished, damage, sentence, own):
    place = tmp_path / "run" if own else tmp_path / "other"
    shutil.copytree(finished, place)
    damage(place / "tokens")
    with pytest.raises(ValueError, match=sentence):
        pretrain(RECIPE, [text if own else place / "tokens"], tmp_path / "run")


def test_a_recipe_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="has no model or no train section"):
        pretrain({"name": "empty"}, [], tmp_path / "run")


# several processes ------------------------------------------------------------------------------------------------


def test_windows_are_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (split_step(4, 2), split_step(4, 3)) == ((4, 1), (2, 3))
    with pytest.raises(ValueError, match="2 processes can't share 3 batches of 5 windows evenly"):
        split_step(5, 3)


def starting(processes: int, *command: str) -> subprocess.Popen:
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "tenfold",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*run, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_two_processes_train_as_one(text, tmp_path):
    """So they do if one is killed after compression midway, and if a single process resumes their run."""
    train = {
        "precision": "float32",
        "gradient_accumulation_steps": 2,
        "tokens": 13152,
        "eval_tokens": 352,
        "save_steps": 10,
        "compress_at": 0.2,
    }
    recipe = with_train(**train) | {"model": STILL}
    calibrate = {"num_samples": 20, "precision": "float32"}
    recipe |= {"replace": [{"prune": "mlp"}], "calibrate": calibrate, "budget": {"keep": 0.7, "of": "blocks"}}
    one = api.pretrain(recipe, [text], tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = ["pretrain", str(tmp_path / "recipe.yaml"), "--data", str(text), "-o", str(tmp_path / "two")]
    first = starting(2, *command)
    while first.poll() is None and not list((tmp_path / "two" / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    workers = psutil.Process(first.pid).children()
    assert len(workers) == 2, first.communicate()[1]
    workers[1].kill()
    assert first.wait(timeout=120) != 0
    second = starting(2, *command)
    assert second.communicate(timeout=300) and second.returncode == 0
    two = json.loads((tmp_path / "two" / "training.json").read_text())
    np.testing.assert_allclose(two["curve"], one["curve"], rtol=1e-5)
    np.testing.assert_allclose(two["held_out"], one["held_out"], rtol=1e-5)
    (last_checkpoint(tmp_path / "two" / "checkpoints") / "trainer_state.json").unlink()
    again = api.pretrain(recipe, [text], tmp_path / "two")
    np.testing.assert_allclose(again["curve"], one["curve"], rtol=1e-5)
