"""Pre-training with a teacher: the training loss, the held-out loss, which has no teacher, and resuming."""

import json
import shutil

import pytest
import small
import torch
from models import toys
from runs import Killed, killed_at, same_weights
from test_pretrain import FOLDED, RECIPE, STILL
from transformers import AutoModelForCausalLM

import tenfold
import tenfold_cli
from tenfold import api
from tenfold.models.distillation_config import Heal
from tenfold.train.distillation import Distillation
from tenfold.train.pretrain import LOSSES

DENSE = RECIPE | {"model": STILL, "train": RECIPE["train"] | {"tokens": 1600}}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return the folder of a trained model with its tokens."""
    place = tmp_path_factory.mktemp("dense")
    (place / "text.txt").write_text(small.text(3000))
    tenfold.pretrain(DENSE, [place / "text.txt"], place / "run", torch.float32)
    return place / "run"


def taught(dense, **train) -> dict:
    rest = {key: value for key, value in DENSE.items() if key != "tokenizer"}
    return rest | {"replace": [FOLDED], "train": DENSE["train"] | {"teacher": str(dense)} | train}


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]


@pytest.mark.parametrize("losses", [None, {"kl": 1.0}, {"cross_entropy": 0.25, "reverse_kl": 2.0}])
def test_the_loss_is_that_of_the_text_and_of_the_teacher(dense, losses):
    teacher = AutoModelForCausalLM.from_pretrained(dense)
    student = AutoModelForCausalLM.from_config(teacher.config)
    ids = torch.arange(64).view(2, 32) % 300
    q, p = log_probabilities(student.eval(), ids), log_probabilities(teacher, ids)
    text = -q.gather(-1, ids[:, 1:, None]).mean()
    of = {
        "cross_entropy": text,
        "kl": (p.exp() * (p - q)).sum(-1).mean(),
        "reverse_kl": (q.exp() * (q - p)).sum(-1).mean(),
    }
    student.forward = Distillation(student, teacher, Heal(losses=losses or LOSSES))
    expected = sum(weight * of[name] for name, weight in (losses or LOSSES).items())
    assert student.train()(input_ids=ids, labels=ids)["loss"].item() == pytest.approx(float(expected), rel=1e-4)
    with torch.no_grad():
        assert student.eval()(input_ids=ids, labels=ids)["loss"].item() == pytest.approx(float(text), rel=1e-4)


def test_it_learns_what_the_teacher_knows(dense, tmp_path):
    text = [dense / "tokens"]
    report = tenfold.pretrain(taught(dense, losses={"kl": 1.0}, eval_tokens=320), text, tmp_path / "run", torch.float32)
    first, last = report["curve"][0][1], report["curve"][-1][1]
    assert last < 0.8 * first and report["held_out"][-1][1] > last, "what is held out is the loss of the text"
    model, _ = api.load(tmp_path / "run", dtype="float32")
    plain = tenfold.pretrain(
        taught(dense, losses={"kl": 1.0}) | {"replace": []}, text, tmp_path / "dense", torch.float32
    )
    assert plain["curve"] != report["curve"] and "forward" not in model.__dict__


@pytest.mark.traced
def test_both_may_be_compiled(dense, tmp_path, monkeypatch):
    traced, compile, curves = [], torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model, **_: traced.append(model) or compile(model, backend="eager"))
    for wanted in (False, True):
        recipe = taught(dense, compile=wanted, precision="float32", eval_tokens=320)
        report = tenfold.pretrain(recipe, [dense / "tokens"], tmp_path / str(wanted), torch.float32)
        curves.append([*report["curve"], *report["held_out"]])
        assert len(traced) == (2 if wanted else 0), "student and teacher, and not the model around them once more"
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=0)


def test_a_killed_run_goes_on_exactly_where_it_was(dense, tmp_path):
    recipe, text = taught(dense), [dense / "tokens"]
    tenfold.pretrain(recipe, text, tmp_path / "whole", torch.float32)
    with pytest.raises(Killed):
        tenfold.pretrain(recipe, text, tmp_path / "run", torch.float32, advance=killed_at(9))
    tenfold.pretrain(recipe, text, tmp_path / "run", torch.float32)
    assert same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"objective": "masked"}, "objective masked"),
        ({"compress_at": 0.5}, "compress_at"),
        ({"losses": {"hidden": 1.0}}, "hidden"),
    ],
)
def test_what_does_not_go_with_a_teacher_is_refused(dense, tmp_path, train, words):
    with pytest.raises(ValueError, match=words):
        tenfold.pretrain(taught(dense, **train), [dense / "tokens"], tmp_path / "run")


def test_a_run_goes_on_with_the_same_teacher_only(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "teacher")
    recipe = taught(tmp_path / "teacher")
    with pytest.raises(Killed):
        tenfold.pretrain(recipe, [dense / "tokens"], tmp_path / "run", advance=killed_at(7))
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.transformer.h[0].mlp.c_fc.weight.data *= 1.1
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(
        ValueError,
        match=r"run on other data, or with another model \(teacher is \w+ there and \w+ here\); repeat it with that",
    ):
        tenfold.pretrain(recipe, [dense / "tokens"], tmp_path / "run")
    shutil.copy(dense / "model.safetensors", tmp_path / "teacher")
    assert tenfold.pretrain(recipe, [dense / "tokens"], tmp_path / "run")["curve"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", toys.EXPERTS)
def test_experts_are_balanced_with_a_teacher_too(name, whole):
    model = toys.build(name).train()
    model.config.output_router_logits = True
    ids, parameters = torch.arange(16).view(2, 8), list(model.parameters())
    plain = model(input_ids=ids, labels=ids).loss
    loss = Distillation(model, None, Heal(losses={"cross_entropy": 1.0}))
    loss.student.whole = loss.verified = whole
    found = loss(ids, ids)["loss"]
    torch.testing.assert_close(found, plain)
    for one, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_a_teacher_has_to_be_named_and_to_read_the_same_tokens(dense, tmp_path, capsys, monkeypatch):
    text = dense.parent / "text.txt"
    without = taught(dense, losses={"kl": 1.0})
    without["train"].pop("teacher")
    with pytest.raises(ValueError, match=r"learns from a teacher.*--teacher DIR"):
        tenfold.pretrain(without, [dense / "tokens"], tmp_path / "run")
    other = taught(dense) | {"tokenizer": {"vocab_size": 280}}
    with pytest.raises(ValueError, match=r"number|predicts"):
        tenfold.pretrain(other, [text], tmp_path / "other")
    with pytest.raises((OSError, ValueError), match="nowhere"):
        tenfold.pretrain(taught("nowhere/at/all"), [dense / "tokens"], tmp_path / "none")
    (tmp_path / "recipe.yaml").write_text(json.dumps(without))
    given = ["--data", dense / "tokens", "--teacher", dense, "-o", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", [str(word) for word in ("tenfold", "pretrain", tmp_path / "recipe.yaml", *given)])
    with pytest.raises(SystemExit) as ended:
        tenfold_cli.main()
    assert not ended.value.code and (tmp_path / "run" / "training.json").is_file(), capsys.readouterr().err
