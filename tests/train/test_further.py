"""Pre-training that starts from a trained model: dense, compressed or deepened."""

import json
import shutil

import pytest
import small
import torch
from losses import off_by
from runs import Killed, killed_at, same_weights, weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tenfold import api, deepen
from tenfold.api import compress, evaluate
from tenfold.models.recipe import load_recipe
from tenfold.train.pretrain import pretrain
from tenfold.train.recipe_checks import check_recipe_keys
from tenfold.train.tokenizer import train_tokenizer
from tenfold.train.tokens import write_tokens

TRAIN = {"batch_size": 4, "learning_rate": 5e-3, "tokens": 3200, "save_steps": 6, "eval_tokens": 320}
STILL = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def further(folder, **more) -> dict:
    return {"name": "further", "model": {"from": str(folder)}, "train": TRAIN | more}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a text, a dense model trained on it, and a compressed and a deepened version of it."""
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
    data = [place / "dense" / "tokens"]
    shutil.copytree(place / "dense", tmp_path / "origin")
    recipe = further(tmp_path / "origin")
    pretrain(recipe, data, tmp_path / "whole")
    with pytest.raises(Killed):
        pretrain(recipe, data, tmp_path / "run", advance=killed_at(8))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    pretrain(recipe, data, tmp_path / "run")
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "origin")
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    model.save_pretrained(tmp_path / "origin")
    with pytest.raises(
        ValueError,
        match=r"is a run on other data, or with another model \(model is \w+ there and \w+ here\); repeat",
    ):
        pretrain(recipe, data, tmp_path / "other")


def test_tokens_are_the_models_own(place, tmp_path):
    """A model without a tokenizer takes any that fits its vocabulary."""
    (tmp_path / "some.txt").write_text(small.text())
    shutil.copytree(place / "folded", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    for size in (280, 320):
        write_tokens(tmp_path / str(size), [tmp_path / "some.txt"], train_tokenizer([small.text(seed=5)], size, 32))
    with pytest.raises(ValueError, match=r"280 holds tokens of another tokenizer than .*folded; give text"):
        pretrain(further(place / "folded"), [tmp_path / "280"], tmp_path / "run")
    with pytest.raises(ValueError, match=r"bare knows 300 tokens, and the tokenizer has 31\d: take the model's own"):
        pretrain(further(tmp_path / "bare"), [tmp_path / "320"], tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"recipe .further. has a model without a tokenizer, .*bare, and the data is text"
    ):
        pretrain(further(tmp_path / "bare"), [tmp_path / "some.txt"], tmp_path / "other")


def test_a_named_tokenizer_is_the_models_own(place, tmp_path):
    train_tokenizer([small.text(seed=5)], 280, 32).save_pretrained(tmp_path / "280")
    wrong = further(place / "dense") | {"tokenizer": {"name": str(tmp_path / "280")}}
    with pytest.raises(
        ValueError, match=r"dense has another tokenizer than .*280; leave the recipe's tokenizer section out"
    ):
        pretrain(wrong, [place / "text.txt"], tmp_path / "run")
    shutil.copytree(place / "dense", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    named = further(tmp_path / "bare") | {"tokenizer": {"name": str(place / "dense")}}
    pretrain(named, [place / "text.txt"], tmp_path / "run")


def test_a_run_goes_on_without_the_tokenizer_that_it_named(place, tmp_path):
    """The hub that it is from may be offline."""
    shutil.copytree(place / "dense", tmp_path / "named", ignore=shutil.ignore_patterns("checkpoints", "tokens"))
    shape = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}
    recipe = {"name": "new", "model": shape, "tokenizer": {"name": str(tmp_path / "named")}, "train": TRAIN}
    pretrain(recipe, [place / "text.txt"], tmp_path / "run")
    shutil.rmtree(tmp_path / "named")
    pretrain(recipe, [place / "text.txt"], tmp_path / "run")


def test_special_tokens_make_no_other_tokenizer(place, tmp_path):
    """The padding token of a model section is set after the text is tokenized."""
    shape = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32, "pad_token_id": 5}
    new = {"name": "new", "model": shape, "tokenizer": {"vocab_size": 300}, "train": TRAIN}
    pretrain(new, [place / "text.txt"], tmp_path / "padded")
    pretrain(further(tmp_path / "padded"), [tmp_path / "padded" / "tokens"], tmp_path / "run")


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_nothing_is_written_over_the_model(place, tmp_path, role):
    shutil.copytree(place / "dense", tmp_path / "one")
    kept = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    if role == "model":
        recipe = further(tmp_path / "one" / "checkpoints" / "checkpoint-22")
    else:
        recipe = further(place / "dense", teacher=str(tmp_path / "one"))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"is in .*one, where the run would write over it; give another folder"):
            pretrain(recipe, [place / "text.txt"], tmp_path / "one", overwrite=overwrite)
    assert kept == {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}


def test_a_teacher_predicts_what_the_model_does(place, tmp_path):
    """Vocabularies may be padded beyond the tokenizer's."""
    for name in ("dense", "folded"):
        model = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32)
        model.resize_token_embeddings(320)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(place / name).save_pretrained(tmp_path / name)
    recipe = further(tmp_path / "folded", teacher=str(tmp_path / "dense"))
    report = pretrain(recipe, [place / "text.txt"], tmp_path / "run")
    assert report["held_out"][-1][1] < report["held_out"][0][1]
    with pytest.raises(ValueError, match=r"predicts 300 tokens and the (student|model) "):
        pretrain(further(tmp_path / "folded", teacher=str(place / "dense")), [place / "text.txt"], tmp_path / "other")


def test_a_model_that_lacks_tensors_is_refused(place, tmp_path):
    """transformers would initialise them at random; a model of another class lacks the head."""
    shutil.copytree(place / "dense", tmp_path / "damaged")
    kept = load_file(tmp_path / "damaged" / "model.safetensors")
    del kept["transformer.h.1.mlp.c_fc.weight"]
    save_file(kept, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged lacks transformer.h.1.mlp.c_fc.weight \(1 tensors\); its weights"):
        pretrain(further(tmp_path / "damaged"), [place / "text.txt"], tmp_path / "run")
    config = AutoConfig.from_pretrained(place / "dense", tie_word_embeddings=False, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classes")
    AutoTokenizer.from_pretrained(place / "dense").save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match=r"classes lacks lm_head.weight .* which would be random"):
        pretrain(further(tmp_path / "classes"), [place / "text.txt"], tmp_path / "run")


def test_what_is_quantised_by_others_is_refused(place, tmp_path):
    shutil.copytree(place / "dense", tmp_path / "int")
    config = json.loads((tmp_path / "int" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "int" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"int is quantised \(gptq\); take the model that it was made of"):
        pretrain(further(tmp_path / "int"), [place / "text.txt"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_trained_model_that_is_wrecked_at_once_is_noticed(place, tmp_path, monkeypatch):
    """Its loss may still be lower than that of a guess."""
    off_by(monkeypatch, {0: 0.0, 2: 2.5})
    with pytest.raises(ValueError, match=r"the loss has run away to [4-7]\."):
        pretrain(further(place / "dense", learning_rate=1e-9), [place / "text.txt"], tmp_path / "run")


def test_an_untrained_run_takes_another_model(place, tmp_path):
    shutil.copytree(place / "dense", tmp_path / "origin")
    with pytest.raises(Killed):
        pretrain(further(tmp_path / "origin"), [place / "text.txt"], tmp_path / "run", advance=killed_at(1))
    shutil.copy(place / "folded" / "config.json", tmp_path / "origin")
    shutil.copy(place / "folded" / "model.safetensors", tmp_path / "origin")
    pretrain(further(tmp_path / "origin"), [place / "text.txt"], tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"model": {"from": "x", "n_layer": 3}}, "model: a model that is trained on is its folder or its name alone"),
        ({"model": {"from": " "}}, "model: a model that is trained on is its folder or its name alone"),
        ({"model": {"from": 3}}, "model: a model that is trained on is its folder or its name alone"),
        ({"tokenizer": {"vocab_size": 300}}, "a model that is trained on has its tokenizer: leave vocab_size out"),
        ({"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank"}}]}, "replace of recipe .*: do that first"),
        ({"budget": {"keep": 0.5}}, "budget of recipe 'further' would compress a trained model"),
        ({"stages": [{"transform": "rotate"}]}, "stages of recipe 'further' would compress a trained model"),
        ({"train": TRAIN | {"sequence_length": 64}}, "sequence_length 64 of recipe 'further' is longer than the 32 positions"),
        ({"train": TRAIN | {"objective": "masked"}}, "transformers has no AutoModelForMaskedLM of GPT2"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_trained_model_is_refused(place, tmp_path, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain(further(place / "dense") | more, [place / "text.txt"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refusal_says_nothing_of_other_recipes(place):
    rules = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 8}}]}
    with pytest.raises(ValueError, match="would compress a trained model"):
        check_recipe_keys(load_recipe(further(place / "dense") | rules))
    check_recipe_keys(load_recipe({"name": "new", "model": {"model_type": "gpt2"}, "train": TRAIN} | rules))


def test_a_model_that_is_not_there_is_named(place, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model .*nowhere"):
        pretrain(further(tmp_path / "nowhere"), [place / "text.txt"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dense_one_is_folded_midway(place, tmp_path):
    rule = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "low_rank", "rank": 8}}
    recipe = further(place / "dense", compress_at=0.5) | {"replace": [rule]}
    api.pretrain(recipe, [place / "text.txt"], tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"folded is compressed already, so that train.compress_at has nothing to do; leave it out"
    ):
        api.pretrain(recipe | {"model": {"from": str(place / "folded")}}, [place / "text.txt"], tmp_path / "again")
    assert "quantization_config" in json.loads((tmp_path / "run" / "config.json").read_text())
