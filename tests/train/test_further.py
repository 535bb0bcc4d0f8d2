"""Pre-training that begins with a trained model: dense, folded or deepened."""

import json
import shutil

import pytest
import small
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenfold import api, deepen
from tenfold.api import compress, evaluate
from tenfold.train.pretrain import pretrain
from tenfold.train.tokenizer import train_tokenizer
from tenfold.train.tokens import write_tokens

TRAIN = {"batch": 4, "learning_rate": 5e-3, "tokens": 3200, "save_steps": 6, "held_out": 320}
STILL = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def further(folder, **more) -> dict:
    return {"name": "further", "model": {"from": str(folder)}, "train": TRAIN | more}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, a dense model that was trained on it, one that was folded from it and one that was deepened."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text(small.text())
    shape = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32} | STILL
    new = {"name": "new", "model": shape, "tokenizer": {"vocab_size": 300}, "train": TRAIN}
    pretrain(new, [place / "text.txt"], place / "dense", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    rule = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "low_rank", "rank": 8}}
    for name in ("folded", "deepened"):
        model = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
        if name == "folded":
            compress(model, {"name": "half", "replace": [rule]})
        else:
            model, _ = deepen(model, 4)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("name", ["dense", "folded", "deepened"])
def test_it_begins_as_the_trained_one_and_goes_on(place, tmp_path, name):
    still = further(place / name, learning_rate=1e-30, weight_decay=0.0)
    pretrain(still, [place / "text.txt"], tmp_path / "still", dtype=torch.float32)
    before, after = weights(place / name), weights(tmp_path / "still")
    assert before.keys() == after.keys() and all(torch.allclose(before[key], after[key], 0, 1e-20) for key in before)
    report = pretrain(further(place / name), [place / "text.txt"], tmp_path / "on")
    assert report["held_out"][-1][1] < report["held_out"][0][1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place / name), AutoTokenizer.from_pretrained(place / name)
    known = evaluate(model, tokenizer, [place / "text.txt"], limit=640)["perplexity"]
    on = AutoModelForCausalLM.from_pretrained(tmp_path / "on", dtype=torch.float32)
    assert (
        evaluate(on, AutoTokenizer.from_pretrained(tmp_path / "on"), [place / "text.txt"], limit=640)["perplexity"]
        < known
    )


def test_a_killed_run_goes_on_where_it_was_with_the_same_model_only(place, tmp_path):
    class Killed(Exception):
        pass

    def kill(step, *rest):
        if step == 8:
            raise Killed

    data = [place / "dense" / "tokens"]
    shutil.copytree(place / "dense", tmp_path / "origin")
    recipe = further(tmp_path / "origin")
    pretrain(recipe, data, tmp_path / "whole")
    with pytest.raises(Killed):
        pretrain(recipe, data, tmp_path / "run", advance=kill)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    pretrain(recipe, data, tmp_path / "run")
    whole, run = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(whole[key], run[key]) for key in whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "origin")
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    model.save_pretrained(tmp_path / "origin")
    with pytest.raises(ValueError, match=r"is a run on other data \(other model\)"):
        pretrain(recipe, data, tmp_path / "other")


def test_tokens_are_the_models_own(place, tmp_path):
    """With a folder that lost its tokenizer the vocabulary has to be large enough at least."""
    (tmp_path / "some.txt").write_text(small.text())
    shutil.copytree(place / "folded", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    for size in (280, 320):
        write_tokens(tmp_path / str(size), [tmp_path / "some.txt"], train_tokenizer([small.text(seed=5)], size, 32))
    with pytest.raises(ValueError, match=r"280 holds tokens of another tokenizer than .*folded; give text"):
        pretrain(further(place / "folded"), [tmp_path / "280"], tmp_path / "run")
    with pytest.raises(ValueError, match=r"bare knows 300 tokens, and the tokenizer of the run has 31\d; give text"):
        pretrain(further(tmp_path / "bare"), [tmp_path / "320"], tmp_path / "run")
    with pytest.raises(ValueError, match=r"there is no tokenizer .*bare"):
        pretrain(further(tmp_path / "bare"), [tmp_path / "some.txt"], tmp_path / "other")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"model": {"from": "x", "n_layer": 3}}, "model: a model that is trained on is its folder or its name alone"),
        ({"model": {"from": 3}}, "model: a model that is trained on is its folder or its name alone"),
        ({"tokenizer": {"vocab_size": 300}}, "a model that is trained on has its tokenizer: leave vocab_size out"),
        ({"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank"}}]}, "replace of recipe .*: fold the trained one"),
        ({"budget": {"keep": 0.5}}, "budget of recipe 'further' is for a model that starts from noise: fold the trained"),
        ({"stages": [{"first": "order"}]}, "stages of recipe 'further' is for a model that starts from noise"),
        ({"train": TRAIN | {"window": 64}}, "window 64 of recipe 'further' is longer than the 32 positions of its model"),
        ({"train": TRAIN | {"objective": "masked"}}, "transformers has no AutoModelForMaskedLM of GPT2"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_trained_model_is_refused(place, tmp_path, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain(further(place / "dense") | more, [place / "text.txt"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_named(place, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model .*nowhere"):
        pretrain(further(tmp_path / "nowhere"), [place / "text.txt"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dense_one_is_folded_midway(place, tmp_path):
    rule = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "low_rank", "rank": 8}}
    recipe = further(place / "dense", fold=0.5) | {"replace": [rule]}
    api.pretrain(recipe, [place / "text.txt"], tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"folded is folded already, so that train.fold has nothing to do; leave it out"
    ):
        api.pretrain(recipe | {"model": {"from": str(place / "folded")}}, [place / "text.txt"], tmp_path / "again")
    assert "quantization_config" in json.loads((tmp_path / "run" / "config.json").read_text())
