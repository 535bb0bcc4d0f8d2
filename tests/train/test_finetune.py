"""Fine-tuning on tasks, on toy models: which parameters are trained, what is learned, and what is saved."""

import json
import statistics
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import toy_tasks
from losses import off_by
from runs import Killed, killed_at
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tenfold
from tenfold.api import evaluate_task, load
from tenfold.models.sites import base_model
from tenfold.nn import Adapter, FactorizedLinear
from tenfold.structure import Cola
from tenfold.train.finetune import TaskTrainer, count_parameters
from tenfold.train.methods import METHODS, unfreeze_head
from tenfold.train.trainer import DivergenceGuardTrainer

RATES = {"full": 3e-3, "auxiliary": 1e-2, "lora": 1e-2}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Return a factory of cached toy models, and the folder of the data."""
    place, made = tmp_path_factory.mktemp("toys"), {}
    toy_tasks.write_summaries(toy_tasks.write_sst2(place))
    (place / "STS-B").mkdir()
    toy_tasks.write_stsb(place / "STS-B")

    def toy(kind, folded):
        if (kind, folded) not in made:
            made[kind, folded] = toy_tasks.folder(place, kind, folded)
        return made[kind, folded]

    return toy, place


def trained(toys, output, kind, folded, train, task="sst2", **more):
    toy, place = toys
    settings = {"epochs": 4, "batch_size": 16, "learning_rate": RATES[train], "device": "cpu"} | more
    return tenfold.finetune(toy(kind, folded), task, place, output, method=train, **settings)


@pytest.fixture(scope="module")
def learned(toys, tmp_path_factory):
    """Return a cached factory of fine-tuning runs on the easy task; tests must not change the folders."""
    made = {}

    def once(*case):
        if case not in made:
            output = tmp_path_factory.mktemp("learned") / "out"
            made[case] = trained(toys, output, *case), output
        return made[case]

    return once


LEARNED = [("gpt2", True, "full"), ("bert", False, "full"), ("bert", True, "auxiliary"), ("llama", True, "auxiliary")]
LEARNED += [("gpt2", False, "lora"), ("bert", True, "lora")]


@pytest.mark.parametrize(("kind", "folded", "train"), LEARNED)
def test_an_easy_task_is_learned_saved_and_read_again(toys, learned, kind, folded, train):
    report, output = learned(kind, folded, train)
    assert report["score"]["mean"] > 0.95 and report["runs"][0]["accuracy"] == report["score"]["mean"]
    assert report["score"]["std"] is None
    assert json.loads((output / "finetune.json").read_text()) == report
    model = AutoModelForSequenceClassification.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert evaluate_task(model, tokenizer, "sst2", toys[1])["score"] == report["score"]["mean"]
    assert model.config.id2label == {0: "negative", 1: "positive"} and model.dtype == torch.float32
    assert any(isinstance(layer, FactorizedLinear) for layer in model.modules()) == folded
    share = report["parameters"]["share"]
    assert share == 1.0 if train == "full" else share < 0.6, share
    assert not any("lora" in name for name in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "folded", "train"), [("gpt2", True, "auxiliary"), ("bert", True, "lora"), ("bert", False, "lora")]
)
def test_saved_numbers_are_predicted_again(toys, tmp_path, kind, folded, train):
    report = trained(toys, tmp_path / "out", kind, folded, train, "stsb")
    again = evaluate_task(*load(tmp_path / "out", "cpu"), "stsb", toys[1])
    for name in ("pearson", "spearman", "score"):
        assert again[name] == pytest.approx(report["runs"][0][name], abs=1e-5)
    assert report["runs"][0]["pearson"] != 0.0


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_auxiliary_leaves_central_tensors_and_what_is_dense(toys, tmp_path, kind):
    report = trained(toys, tmp_path / "out", kind, True, "auxiliary", epochs=1)
    seen = (AutoModelForSequenceClassification.from_pretrained(f) for f in (toys[0](kind, True), tmp_path / "out"))
    before, after = seen
    new, moved, total = report["runs"][0]["new"], 0, 0
    values, layers = dict(before.named_parameters()), dict(before.named_modules())
    for name, value in after.named_parameters():
        path, leaf = name.rpartition(".")[::2]
        layer = layers[path]
        total += value.numel()
        if isinstance(layer, FactorizedLinear) and leaf != "bias":
            sizes = {factor: getattr(layer, factor).numel() for factor in layer.structure.factor_shapes()}
            free = leaf != max(sizes, key=sizes.get)
        else:
            free = value.ndim == 1 or name in new or path.split(".")[0] in ("classifier", "score")
        moved += value.numel() * free
        if name not in new:  # drawn anew by either load
            assert torch.equal(value, values[name]) != free or values[name].norm() == 0, name
    assert report["parameters"] == {"total": total, "trainable": moved, "share": moved / total}


def test_shared_central_tensors_stay(toys):
    model, _ = toy_tasks.bert()
    share = {"factors": ["core_1"], "across": "layers"}
    tenfold.compress(model, {"replace": [{"role": "mlp.in", "structure": toy_tasks.TRAIN, "share": share}]})
    METHODS["auxiliary"].prepare(model, 8)
    free = {name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    assert free == {f"bert.encoder.layer.{k}.intermediate.dense.core_{j}" for k in (0, 1) for j in (0, 2)}


@pytest.mark.parametrize("roles", [["mlp.in"], ["mlp.in", "pooler"]])
def test_a_pooler_is_trained_as_a_whole_unless_it_is_folded(roles):
    masked, _ = toy_tasks.bert()
    model = AutoModelForSequenceClassification.from_config(masked.config)
    tenfold.compress(model, {"replace": [{"role": roles, "structure": toy_tasks.TRAIN}]})
    METHODS["auxiliary"].prepare(model, 8)
    free = {name.split(".")[-1] for name, p in model.bert.pooler.dense.named_parameters() if p.requires_grad}
    assert free == ({"core_0", "core_2", "bias"} if "pooler" in roles else {"weight", "bias"})


def test_what_a_recipe_freezes_stays_in_auxiliary_but_not_in_full(toys):
    model, _ = toy_tasks.gpt2()
    rule = {"role": "mlp.in", "structure": toy_tasks.TRAIN, "freeze": ["core_0"]}
    tenfold.compress(model, {"replace": [rule]})
    layer = model.transformer.h[0].mlp.c_fc
    METHODS["auxiliary"].prepare(model, 8)
    assert [layer.get_parameter(f"core_{k}").requires_grad for k in range(3)] == [False, False, True]
    METHODS["full"].prepare(model, 8)
    assert count_parameters(model)["share"] == 1.0


def test_lora_starts_at_the_same_function_and_frees_its_parts_and_the_head(toys):
    toy, _ = toys
    for folded in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(toy("gpt2", folded), pad_token_id=0).eval()
        ids = torch.arange(1, 13).reshape(2, 6)
        with torch.no_grad():
            wanted = model(ids).logits
            METHODS["lora"].prepare(model, 2)
            unfreeze_head(model, set())
            assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
        outs = [3 * 32, 32, 4 * 32, 32]
        inner = [32, 32, 32, 4 * 32]
        low_rank = 2 * sum(2 * (out + width) for out, width in zip(outs, inner, strict=True))
        assert count_parameters(model)["trainable"] == low_rank + model.score.weight.numel()


def test_seeds_repeat_and_their_spread_is_reported(toys, tmp_path):
    given = {"task": "stsb", "epochs": 1, "limit": 48, "dev_limit": 20}
    steps = []
    report = trained(
        toys, tmp_path / "a", "bert", True, "auxiliary", seeds=[3, 1, 2], advance=lambda *now: steps.append(now[:2]), **given
    )  # fmt: skip
    scores = [run["score"] for run in report["runs"]]
    assert len(set(scores)) > 1 and report["examples"] == {"train": 48, "dev": 20}
    assert report["score"] == {"mean": statistics.mean(scores), "std": statistics.stdev(scores)}
    assert report["best_seed"] == [3, 1, 2][scores.index(max(scores))]
    assert steps == [(k, 9) for k in range(1, 10)]
    order = sorted((3, 1, 2), key=lambda seed: -scores[[3, 1, 2].index(seed)])[
        :2
    ]  # the best one first, then a worse one
    again = trained(toys, tmp_path / "c", "bert", True, "auxiliary", seeds=order, **given)
    assert [run["curve"] for run in again["runs"]] == [report["runs"][[3, 1, 2].index(seed)]["curve"] for seed in order]
    saved = evaluate_task(*load(tmp_path / "c", "cpu"), "stsb", toys[1], limit=20)
    assert saved["score"] == pytest.approx(max(scores), abs=1e-6), "the best seed's model, not the last one's"


def test_a_seed_draws_its_own_head(toys, tmp_path):
    report = trained(
        toys, tmp_path / "out", "bert", False, "full", "stsb", seeds=[0, 1], learning_rate=1e-12, epochs=0.1
    )
    assert report["runs"][0]["score"] != report["runs"][1]["score"]


def judge(monkeypatch, scores, look=lambda model: None):
    """Use these scores for the epochs, instead of those of the dev examples."""
    left = iter(scores)

    class Judged(TaskTrainer):
        def __init__(self, *args, score_model, **kwargs):
            super().__init__(*args, score_model=self.judged, **kwargs)

        def judged(self, model):
            look(model)
            score = next(left)
            return {"score": score, "half": score / 2}

    monkeypatch.setattr("tenfold.train.finetune.TaskTrainer", Judged)


@pytest.mark.parametrize(("folded", "train"), [(True, "auxiliary"), (True, "lora"), (False, "lora")])
def test_the_best_epoch_is_kept_the_first_of_equals(toys, tmp_path, monkeypatch, folded, train):
    seen, ids = [], torch.arange(1, 13).view(2, 6)
    judge(monkeypatch, [0.2, 0.9, 0.4, 0.9], lambda model: seen.append(model(ids).logits.detach()))
    run = trained(toys, tmp_path / "out", "bert", folded, train, limit=32, dev_limit=8)["runs"][0]
    assert (run["score"], run["half"], run["best_epoch"]) == (0.9, 0.45, 2.0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(ids).logits, seen[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[1], seen[3], atol=1e-3)


@pytest.mark.parametrize(("kind", "folded", "train"), [("llama", True, "full"), ("gpt2", False, "lora")])
def test_a_decoder_learns_to_summarise(toys, tmp_path, kind, folded, train):
    before = evaluate_task(*load(toys[0](kind, folded), "cpu"), "samsum", toys[1])
    report = trained(toys, tmp_path / "out", kind, folded, train, "samsum", epochs=8, batch_size=4)
    assert before["score"] < 0.5 < 0.95 < report["score"]["mean"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = evaluate_task(model, AutoTokenizer.from_pretrained(tmp_path / "out"), "samsum", toys[1])
    assert again["rougeL"] == report["runs"][0]["rougeL"]


def test_a_fine_tuned_model_is_fine_tuned_further(toys, learned, tmp_path):
    report = tenfold.finetune(
        learned("bert", True, "auxiliary")[1],
        "sst2",
        toys[1],
        tmp_path / "two",
        epochs=0.2,
        learning_rate=1e-8,
        device="cpu",
    )
    assert report["runs"][0]["new"] == [] and report["score"]["mean"] > 0.95


SHORT = {"epochs": 1, "limit": 32, "dev_limit": 8}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_number_is_told_and_nothing_is_written_over(toys, tmp_path):
    trained(toys, tmp_path / "out", "gpt2", False, "full", **SHORT)
    before = contents(tmp_path / "out")
    what = r"(loss is (nan|inf) (at|after)|weights are NaN or infinite after) step \d"
    place = r"examples \d+ to \d+ of epoch 1, in the order of seed 5; learning rate 1e\+38"
    where = rf"{what} \({place}\); there is no checkpoint yet; lower the learning rate"
    with pytest.raises(ValueError, match=where):
        trained(toys, tmp_path / "out", "gpt2", False, "full", learning_rate=1e38, seeds=[5], overwrite=True, **SHORT)
    assert before.items() <= contents(tmp_path / "out").items()


def test_weights_that_are_no_numbers_are_told_though_the_loss_is_one(toys, tmp_path):
    """No training loss shows the effect of the last step."""
    toy, place = toys

    def call(output, **given):
        return tenfold.finetune(
            toy("gpt2", False), "sst2", place, output, batch_size=32, device="cpu", warmup=0.0, **SHORT, **given
        )

    where = r"weights are NaN or infinite after step 1 \(examples 0 to 32 of epoch 1, .* 0; learning rate 1e\+39\)"
    with pytest.raises(ValueError, match=where):
        call(tmp_path / "out", learning_rate=1e39)
    call(tmp_path / "out", learning_rate=1e-3)  # there is nothing to resume


def test_a_loss_that_runs_away_is_stopped(toys, tmp_path, monkeypatch):
    """A loss has diverged at twice that of the first step or of a guess, not where it is merely larger than before."""
    monkeypatch.setattr(DivergenceGuardTrainer, "STEPS", 3)
    off_by(monkeypatch, {0: 3.0, 21: 3.4})
    trained(toys, tmp_path / "worse", "gpt2", False, "full")
    off_by(monkeypatch, {0: 0.0, 21: 6.0})
    with pytest.raises(
        ValueError, match=r"the loss has run away to .* the last good checkpoint is .*checkpoint-20; lower the"
    ):
        trained(toys, tmp_path / "away", "gpt2", False, "full")
    with pytest.raises(ValueError, match=r"the loss has run away to .*; there is no checkpoint yet; lower the"):
        trained(toys, tmp_path / "wild", "gpt2", False, "full", learning_rate=10.0, epochs=1)


@pytest.mark.parametrize("parts", [1, 8])
def test_a_short_last_step_is_no_loss_that_runs_away(toys, tmp_path, parts, monkeypatch):
    """The last step of an epoch has a single example, in one micro-batch where other steps may have eight."""
    off_by(monkeypatch, {0: 0.0, 5: 2.0})
    toy, place = toys
    step = {"batch_size": 16 // parts, "gradient_accumulation_steps": parts}
    given = {"epochs": 3, "limit": 17, "device": "cpu", "learning_rate": 1e-5} | step
    tenfold.finetune(toy("gpt2", False), "sst2", place, tmp_path / "out", **given)


def test_every_run_has_its_log(toys, tmp_path):
    told = []
    report = trained(
        toys, tmp_path / "out", "gpt2", False, "full", epochs=2, limit=72, seeds=[4], advance=lambda *now: told.append(now)
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "log-4.jsonl").open()]
    losses, scores = ([row for row in rows if name in row] for name in ("loss", "eval_score"))
    assert [row["step"] for row in losses] == list(range(1, 11)) and [row["step"] for row in scores] == [5, 10]
    assert losses[0]["tokens_per_second"] > 0 and losses[0]["seconds_left"] >= 0 and "learning_rate" in losses[0]
    assert told[-1][:2] == (10, 10) and told[-1][2] > 0
    assert report["runs"][0]["curve"] == [[row["step"], row["loss"]] for row in losses]
    assert report["runs"][0]["scores"] == [[row["step"], row["eval_score"]] for row in scores]


def test_a_killed_call_goes_on_behind_the_last_seed(toys, tmp_path):
    given, out, seen = SHORT | {"dev_limit": 20, "learning_rate": 3e-4}, tmp_path / "out", []
    whole = trained(toys, tmp_path / "whole", "gpt2", False, "full", seeds=[1, 2], **given)
    with pytest.raises(Killed):
        trained(toys, out, "gpt2", False, "full", seeds=[1, 2], advance=killed_at(3), **given)
    with pytest.raises(
        ValueError,
        match=r"other settings \(task is sst2 .*; batch_size is 16 there and 8 here\); .* add --overwrite",
    ):
        trained(toys, out, "gpt2", False, "full", "stsb", seeds=[2], **given | {"batch_size": 8, "limit": 32})
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        trained(toys, toys[1], "gpt2", False, "full", seeds=[1], **given)
    report = trained(toys, out, "gpt2", False, "full", seeds=[1, 2], advance=lambda *now: seen.append(now[:2]), **given)
    assert seen == [(1, 2), (2, 2)], "one seed of two steps was left"
    runs = [[{k: v for k, v in run.items() if k != "seconds"} for run in one["runs"]] for one in (whole, report)]
    assert runs[0] == runs[1] and report["score"] == whole["score"] and report["best_seed"] == whole["best_seed"]
    assert json.loads((out / "finetune.json").read_text()) == report
    assert torch.equal(*(load_file(f / "model.safetensors")["score.weight"] for f in (tmp_path / "whole", out)))
    before = contents(out)
    assert trained(toys, out, "gpt2", False, "full", seeds=[2], **given) == report and contents(out) == before
    assert len(trained(toys, out, "gpt2", False, "full", seeds=[9], overwrite=True, **given)["runs"]) == 1


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_killed_call_goes_on_behind_the_last_epoch(toys, tmp_path, train):
    """The weights are the same, and the best epoch may precede the interruption."""
    given, out = {"limit": 32, "dev_limit": 20, "seeds": [1], "epochs": 4}, tmp_path / "out"
    whole = trained(toys, tmp_path / "whole", "bert", False, train, **given)
    for last in (5, 8):  # in the third epoch, and behind the last one
        with pytest.raises(Killed):
            trained(toys, out, "bert", False, train, advance=killed_at(last), **given)
        kept = out / "seed-1.partial" / f"checkpoint-{(last - 1) // 2 * 2}"
        assert kept.is_dir() and not (out / "finetune.json").exists()
    with pytest.raises(
        ValueError, match=r"seed-1.partial holds .* with other settings \(epochs is 4 there and 3 here\)"
    ):
        trained(toys, out, "bert", False, train, **given | {"epochs": 3})
    seen = []
    report = trained(toys, out, "bert", False, train, advance=lambda *now: seen.append(now[0]), **given)
    assert seen == [7, 8] and not (out / "seed-1.partial").exists()
    assert all(
        report["runs"][0][key] == whole["runs"][0][key] for key in ("score", "best_epoch", "steps", "curve", "scores")
    )
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    steps = [json.loads(line)["step"] for line in (out / "log-1.jsonl").open()]
    assert steps == sorted(steps) and set(steps) == set(range(1, 9))


def test_what_is_finished_but_not_written_yet_is_not_trained_again(toys, tmp_path, monkeypatch):
    given, out, scores = {"limit": 32, "dev_limit": 20, "epochs": 3}, tmp_path / "out", [0.2, 0.9, 0.4]
    judge(monkeypatch, scores)
    whole = trained(toys, tmp_path / "whole", "bert", False, "full", **given)
    judge(monkeypatch, scores)
    with monkeypatch.context() as patch:
        patch.setattr("tenfold.train.trainer.unwrap_model", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            trained(toys, out, "bert", False, "full", **given)
    seen = []
    report = trained(toys, out, "bert", False, "full", advance=lambda *now: seen.append(now), **given)
    assert not seen and report["runs"][0]["curve"] == whole["runs"][0]["curve"]
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.traced
def test_a_model_may_be_compiled(toys, tmp_path, monkeypatch):
    compiled, compile, curves = [], torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or compile(model, backend="eager"))
    for wanted in (False, True):
        report = trained(toys, tmp_path / str(wanted), "bert", True, "auxiliary", compile=wanted, **SHORT)
        curves.append([loss for _, loss in report["runs"][0]["curve"]])
        assert bool(compiled) == wanted
        AutoModelForSequenceClassification.from_pretrained(tmp_path / str(wanted))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("False", "True"))
    assert one.keys() == two.keys()


def test_a_step_in_parts_with_activations_made_again_is_the_same_step(toys, tmp_path):
    """Examples weigh alike: there is no dropout, and every step is complete."""
    curves = {}
    parts = {"batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    for name, more in (("one", {"batch_size": 8}), ("parts", parts)):
        report = trained(toys, tmp_path / name, "llama", True, "auxiliary", epochs=2, limit=32, dev_limit=8, **more)
        curves[name] = [loss for _, loss in report["runs"][0]["curve"]]
        assert report["runs"][0]["steps"] == 8
    np.testing.assert_allclose(curves["parts"], curves["one"], rtol=1e-5)


def test_a_batch_that_can_not_be_shared(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes can't share 1 batches of 16 examples evenly"):
        trained(toys, tmp_path / "out", "gpt2", False, "full")


REFUSED = {
    "unknown task": ({"task": "mprc"}, ValueError, "did you mean 'mrpc'"),
    "unknown method": ({"method": "auxilary"}, ValueError, "did you mean 'auxiliary'"),
    "dense auxiliary": (
        {"method": "auxiliary"},
        ValueError,
        "without structured layers has no auxiliary tensors; compress it",
    ),
    "no file": ({"task": "rte"}, FileNotFoundError, r"task rte has no train\.tsv"),
    "no model": ({"model": "./nothing"}, FileNotFoundError, "there is no model './nothing'"),
    "no epochs": ({"epochs": 0}, ValueError, "epochs 0 must be more than 0"),
    "no rate": ({"learning_rate": -1.0}, ValueError, r"learning_rate -1\.0"),
    "equal seeds": ({"seeds": [1, 1]}, ValueError, r"seeds \[1, 1\] must be different"),
    "an encoder's summary": ({"task": "samsum"}, ValueError, "needs a decoder such as gpt2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(toys, tmp_path, case):
    wrong, kind, message = REFUSED[case]
    (tmp_path / "SST-2").mkdir()
    toy_tasks.write_sst2(tmp_path / "SST-2")
    place = toy_tasks.write_summaries(tmp_path)
    toy = wrong.get("model") or toys[0]("bert", False)
    given = {"task": "sst2", "device": "cpu"} | {name: value for name, value in wrong.items() if name != "model"}
    with pytest.raises(kind, match=message):
        tenfold.finetune(toy, data=place, output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_head_of_another_task_is_drawn_anew(toys, learned, tmp_path):
    """The head has two classes, then one number."""
    given = {"device": "cpu", "epochs": 0.1, "limit": 32, "dev_limit": 8}
    report = tenfold.finetune(learned("bert", False, "full")[1], "stsb", toys[1], tmp_path / "out", **given)
    assert report["runs"][0]["new"] == ["classifier.bias", "classifier.weight"]
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.classifier.weight.shape[0] == saved.config.num_labels == 1


def test_no_adapter_goes_beside_a_non_linearity():
    layer = FactorizedLinear(Cola(out_features=8, in_features=8, rank=2))
    with pytest.raises(ValueError, match="an adapter goes beside a matrix, and a layer of kind cola has none"):
        Adapter(layer, 2)


def test_an_adapter_goes_beside_shared_factors_which_stay_shared(toys, tmp_path):
    model, tokenizer = toy_tasks.bert()
    share = {"factors": ["core_1"], "across": "layers"}
    tenfold.compress(model, {"replace": [{"role": "mlp.in", "structure": toy_tasks.TRAIN, "share": share}]})
    ids = torch.arange(5, 15)[None]
    before, shared = model.eval()(ids)[0], set(base_model(model).shared_factors.state_dict())
    finish = METHODS["lora"].prepare(model, 2)
    torch.testing.assert_close(model(ids)[0], before)
    freed = {name for name, value in model.named_parameters() if value.requires_grad}
    assert freed and all("lora_" in name or ".part_1_" in name for name in freed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(0.1 * torch.randn_like(value) if name in freed else 0)
    finish()
    after = model(ids)[0]
    assert not torch.allclose(after, before, atol=1e-3)
    tenfold.save(model, tmp_path / "out", tokenizer)
    again = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(ids)[0], after)
    assert set(base_model(again).shared_factors.state_dict()) == shared


def test_an_adapter_that_a_recipe_brings_stays(toys):
    model, _ = toy_tasks.bert()
    tenfold.compress(model, {"replace": [{"role": "mlp.in", "structure": toy_tasks.TRAIN, "adapter_rank": 2}]})
    before = list(model.parameters())  # held: the number of an object that is gone is given to the next
    METHODS["lora"].prepare(model, 3)
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(free) == 2 * 2 * 6 and not any(p is q for p in free.values() for q in before)
    assert all(3 in p.shape for p in free.values())
