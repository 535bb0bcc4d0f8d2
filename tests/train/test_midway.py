"""Compression midway: one run on one schedule, dense first, which resumes from either part."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import small
import torch
from losses import off_by
from runs import Killed, killed_at, same_weights
from test_pretrain import CHOICE, FOLDED, RECIPE, STILL
from transformers import AutoModelForCausalLM, get_scheduler

from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.pretrain import pretrain, set_schedule
from tenfold.train.tokens import Tokens
from tenfold.train.trainer import DivergenceGuardTrainer, PackedDataset

NARROW = {"replace": [{"prune": "mlp"}], "calibrate": {"num_samples": 20}, "budget": {"keep": 0.7, "of": "blocks"}}
BLOCKS = {"replace": [FOLDED]}


def halfway(rules: dict, **more) -> dict:
    return RECIPE | {"model": STILL, "train": RECIPE["train"] | {"compress_at": 0.5} | more} | rules


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return an uninterrupted run."""
    place = tmp_path_factory.mktemp("whole")
    (place / "text.txt").write_text(small.text())
    pretrain(halfway(NARROW), [place / "text.txt"], place / "run")
    return place / "run"


def test_a_folded_model_is_not_compared_with_the_dense_one(text, tmp_path, monkeypatch):
    """Its loss starts higher, also if it is resumed after compression."""
    monkeypatch.setattr(DivergenceGuardTrainer, "STEPS", 3)
    off_by(monkeypatch, {0: 0.0, 12: 3.0})
    slow = halfway(BLOCKS, learning_rate=1e-9)
    with pytest.raises(Killed):
        pretrain(slow, [text], tmp_path / "run", advance=killed_at(20))
    assert pretrain(slow, [text], tmp_path / "run")["curve"][-1][1] > 8


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").open()]


@pytest.mark.parametrize("rules", [NARROW, BLOCKS], ids=["by activations", "without data"])
def test_it_is_one_run_and_ends_folded(text, tmp_path, rules):
    plain = pretrain(halfway({}, compress_at=0.0), [text], tmp_path / "plain")
    report = pretrain(halfway(rules), [text], tmp_path / "run")
    assert [step for step, _ in report["curve"]] == [step for step, _ in plain["curve"]]
    assert report["curve"][:6] == plain["curve"][:6], "dense to step 12 of 25"
    assert report["curve"][6:] != plain["curve"][6:] and report["curve"][-1][1] < report["curve"][5][1]
    rates = [[row["learning_rate"] for row in log(tmp_path / name)] for name in ("run", "plain")]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.transformer.h[0].mlp.c_fc.structure.kind == {"prune": "dense"}.get(
        next(iter(rules["replace"][0])), "block_train"
    )
    assert report["parameters"] == model.num_parameters() < plain["parameters"]
    assert not (tmp_path / "run" / "dense").exists()


def test_a_new_optimizer_is_where_the_old_one_was_on_its_schedule():
    def begun(*rates):
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
        optimizer = torch.optim.SGD(groups)
        return optimizer, get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=20)

    (old, before), (new, after) = begun(0.3, 0.6), begun(0.9)
    for _ in range(8):
        old.step()
        before.step()
    set_schedule(after, 8, [0.9])
    for _ in range(12):
        assert new.param_groups[0]["lr"] == pytest.approx(3 * old.param_groups[0]["lr"])
        assert after.get_last_lr() == [new.param_groups[0]["lr"]]
        for optimizer, scheduler in ((old, before), (new, after)):
            optimizer.step()
            scheduler.step()


def test_it_is_folded_by_what_it_was_trained_on(text, tmp_path, monkeypatch):
    seen = []

    def compress(model, recipe, text):
        seen.extend(row.tolist() for batch in text.batches for row in batch["input_ids"])
        assert all(bool(batch["attention_mask"].all()) for batch in text.batches)
        return model, {}

    monkeypatch.setattr("tenfold.train.compress_midway.compress", compress)
    pretrain(halfway(NARROW, seed=3), [text], tmp_path / "run")
    windows = PackedDataset(Tokens(tmp_path / "run" / "tokens").ids, 32, 3)
    trained = [windows[k]["input_ids"].tolist() for k in range(12 * 4)]
    assert len(seen) == 20 and all(row in trained for row in seen)
    assert seen[0] == trained[0] and seen[-1] == trained[-1], "spread over all of it"


def test_it_is_folded_in_stages(text, tmp_path):
    half = {"transform": "drop-layers", "calibrate": {"num_samples": 7}, "budget": {"keep": 0.6, "of": "blocks"}}
    two = {"model": STILL | {"n_layer": 2}}
    plain = pretrain(halfway({}, compress_at=0.0) | two, [text], tmp_path / "plain")
    report = pretrain(halfway({"stages": [half, NARROW]}) | two, [text], tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert len(model.transformer.h) == 1 and model.transformer.h[0].mlp.c_fc.out_features < 128
    assert report["curve"][:6] == plain["curve"][:6] and report["curve"][-1][1] < report["curve"][5][1]
    again = pretrain(halfway({"stages": [half, NARROW]}) | two, [text], tmp_path / "run")  # from its last checkpoint
    assert again["curve"] == report["curve"]


@pytest.mark.parametrize("step", [9, 12, 13, 20])
def test_a_killed_run_ends_as_one_that_was_not(text, tmp_path, whole, step):
    recipe = halfway(NARROW)
    with pytest.raises(Killed):
        pretrain(recipe, [text], tmp_path / "run", advance=killed_at(step))
    steps = []
    report = pretrain(recipe, [text], tmp_path / "run", advance=lambda k, *rest: steps.append(k))
    assert steps[0] > step - 6 and steps == list(range(steps[0], 26)), "no step twice"
    assert same_weights(whole, tmp_path / "run")
    assert report["curve"] == json.loads((whole / "training.json").read_text())["curve"]


def test_a_run_that_is_killed_while_it_folds_folds_again(text, tmp_path, whole, monkeypatch):
    recipe = halfway(NARROW)
    with monkeypatch.context() as patch:
        patch.setattr("tenfold.train.compress_midway.compress", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            pretrain(recipe, [text], tmp_path / "run")
    kept = last_checkpoint(tmp_path / "run" / "dense")
    assert kept.name == "checkpoint-12" and AutoModelForCausalLM.from_pretrained(kept)
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is None
    steps = []
    pretrain(recipe, [text], tmp_path / "run", advance=lambda k, *rest: steps.append(k))
    assert steps == list(range(13, 26))
    assert same_weights(whole, tmp_path / "run")


def test_overwriting_begins_anew(text, tmp_path):
    with pytest.raises(Killed):
        pretrain(halfway(NARROW), [text], tmp_path / "run", advance=killed_at(9))
    steps = []
    pretrain(halfway(BLOCKS), [text], tmp_path / "run", advance=lambda k, *rest: steps.append(k), overwrite=True)
    assert steps == list(range(1, 26))


FLOPS, CORES = {"keep": 0.5, "of": "flops"}, {"kind": "kronecker", "inner": [5, 7]}


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (halfway({}), "train.compress_at compresses by the rules under replace, and there are none"),
        (halfway({"stages": [BLOCKS | {"heal": {}}]}), "so that nothing is left to heal; leave heal out"),
        (halfway({"stages": [{"transform": "drop-layers", "budget": {"keep": 0.5}}]}), "and transform, need activations"),
        (halfway({"replace": [CHOICE]}), "a choice of structures, .*: write a calibrate section"),
        (halfway(BLOCKS | {"budget": FLOPS}), "a budget of flops or bytes, .*: write a calibrate"),
        (halfway(BLOCKS, self_guided_fraction=0.5), "train.compress_at and train.self_guided_fraction are two ways to begin"),
        (halfway({"replace": [{"prune": "mlp"}]}), "rules that prune, and transform, need activations: write a calibrate"),
        (halfway({"replace": [{"role": "mlp.in", "structure": CORES}]}), "5"),
        (halfway({"replace": [{"role": "mlp.in", "structure": {"kind": "cola", "rank": 4}}]}),
         "role mlp.in: cola has a non-linearity between its factors"),
        (halfway(NARROW, compress_at=0.001), "train.compress_at 0.001 of 25 steps is none; give more of them"),
    ],
    ids=["no rule", "healed", "first", "choice", "flops", "guided", "no activations", "does not fit", "cola", "no step"],
)  # fmt: skip
def test_what_can_not_be_folded_is_told_first(text, tmp_path, recipe, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain(recipe, [text], tmp_path / "run", advance=lambda *given: pytest.fail("trained"))
