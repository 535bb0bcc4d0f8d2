"""Jobs from checkpoint to checkpoint: same result from disk as in memory and after an interruption; errors lose nothing."""

import json
import shutil
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import small
import torch
import transformers
from models import toys
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tenfold
import tenfold_cli
from tenfold import api, checkpoint_jobs
from tenfold.compression.resume_state import ResumeState
from tenfold.compression.tensor_store import TensorStore
from tenfold.models import lazy_checkpoint
from tenfold.models.distillation_config import Heal
from tenfold.models.recipe import load_recipe
from tenfold.models.sites import find_sites

RECIPE = {
    "name": "narrow",
    "replace": [{"prune": "mlp"}, {"prune": "attention"}],
    "budget": {"keep": 0.8, "of": "model"},
}
LOW_RANK = {"name": "low", "replace": [{"role": "mlp.in", "structure": {"kind": "low_rank"}, "keep": 0.5}]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    """Return the function that gives the folder of an uninterrupted run, made once per recipe."""
    place, made = tmp_path_factory.mktemp("whole"), {}

    def folder(recipe=RECIPE):
        key = json.dumps(recipe)
        if key not in made:
            made[key] = place / str(len(made))
            go(dense, made[key], recipe)
        return made[key]

    return folder


def go(dense, output, recipe=RECIPE, **more):
    return checkpoint_jobs.compress_checkpoint(dense, output, recipe, [dense / "text.txt"], num_samples=8, **more)


def in_memory(dense, recipe=RECIPE):
    model, tokenizer = api.load(dense, "cpu")
    text = api.read_calibration(model, tokenizer, [dense / "text.txt"], api.with_keep(recipe, None), 8)
    return api.compress(model, recipe, text=text)[0]


def check_same_weights(one, other, **tolerance):
    """Compare the weights of two folders: equal, or within a tolerance."""
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **({"rtol": 0, "atol": 0} | tolerance))


class Interrupted(Exception):
    pass


@contextmanager
def interrupted_at_block(number):
    """Interrupt the job inside before it saves block ``number``."""
    keep = ResumeState.save_block

    def stop(self, model, block, *rest):
        if block == number:
            raise Interrupted
        keep(self, model, block, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ResumeState, "save_block", stop)
        yield


@pytest.mark.parametrize("recipe", [RECIPE, LOW_RANK], ids=lambda r: r["name"])
def test_from_disk_as_in_memory(dense, tmp_path, recipe):
    report = go(dense, tmp_path / "out", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = in_memory(dense, recipe)
    assert report["parameters"]["total"] == sum(p.numel() for p in expected.parameters())
    assert torch.equal(
        model(input_ids=torch.arange(12)[None]).logits, expected(input_ids=torch.arange(12)[None]).logits
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tenfold.json", "README.md"} <= files
    assert not any(name.startswith(("model-", "unfinished")) for name in files)
    assert not (tmp_path / "out.partial").exists()


def test_half_precision_stays(tmp_path):
    dense = small.folder(tmp_path / "dense")
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(dense)
    go(dense, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(input_ids=torch.arange(12)[None]).logits).all()


def test_a_large_model_is_saved_in_shards(dense, whole, tmp_path):
    one = AutoModelForCausalLM.from_pretrained(whole()).state_dict()
    go(dense, tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)


STEPS = ["forward-0", "forward-1", "nats", "turn", "backward-1", "backward-0"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("when", "recipe"),
    [
        ("in it", RECIPE),
        ("behind it", RECIPE),
        ("behind it", RECIPE | {"calibrate": {"divergence": 64}}),
        ("behind it", LOW_RANK | {"budget": {"keep": 0.9}}),
    ],
    ids=["in it", "behind it", "measured", "folds"],
)
def test_an_interrupted_survey_resumes(dense, whole, tmp_path, monkeypatch, step, when, recipe):
    once, put, made = ResumeState.run_or_load, TensorStore.put, []
    recipe = recipe | {"replace": [{k: v for k, v in rule.items() if k != "keep"} for rule in recipe["replace"]]}
    expected = whole(recipe)

    def half(self, name, value):
        put(self, name, torch.zeros_like(value))
        raise Interrupted

    def stop(self, name, make):
        if name == step and when == "in it":
            patch.setattr(TensorStore, "put", half)
        value = once(self, name, make)
        if name == step:
            raise Interrupted
        return value

    with monkeypatch.context() as patch:
        patch.setattr(ResumeState, "run_or_load", stop)
        with pytest.raises(Interrupted):
            go(dense, tmp_path / "out", recipe)
    monkeypatch.setattr(
        ResumeState, "run_or_load", lambda self, name, make: once(self, name, lambda: made.append(name) or make())
    )
    go(dense, tmp_path / "out", recipe)
    behind = when == "behind it" or step == "nats"  # which stores no tensors
    steps = STEPS + ["together"] * ("divergence" in recipe.get("calibrate", {}))
    assert made == steps[steps.index(step) + behind :]
    check_same_weights(tmp_path / "out", expected)


def test_an_interrupted_run_resumes(dense, whole, tmp_path, monkeypatch):
    keep, done = ResumeState.save_block, []
    with interrupted_at_block(1):
        go(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()

    def note(self, model, number, *rest):
        done.append(number)
        keep(self, model, number, *rest)

    monkeypatch.setattr(ResumeState, "save_block", note)
    go(dense, tmp_path / "out")
    assert done == [1]  # the first block was not compressed again
    check_same_weights(tmp_path / "out", whole())


def test_a_full_disk_at_the_end_loses_no_block(dense, whole, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise SafetensorError("No space left on device")

    expected = whole()
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(OSError, match=r"can't be written .*make room"):
            go(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ResumeState, "save_block", lambda *rest: pytest.fail("a block was compressed again"))
    go(dense, tmp_path / "out")
    check_same_weights(tmp_path / "out", expected)
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_leaves_the_folder_as_it_was(dense, tmp_path, monkeypatch):
    model, tokenizer = api.load(dense, "cpu")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_text("before")
    save = type(model).save_pretrained

    def full(self, folder, **keywords):
        save(self, folder, **keywords)
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", full)
        for name in ("old", "new"):
            with pytest.raises(OSError, match=f"{name} can't be written .*make room"):
                api.save(model, tmp_path / name, tokenizer)
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "model.safetensors"]
    assert (tmp_path / "old" / "model.safetensors").read_text() == "before"
    api.save(model, tmp_path / "old", tokenizer)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "old").num_parameters() == model.num_parameters()
    assert not list(tmp_path.glob("*.new"))


def test_no_room_for_hidden_states(dense, tmp_path, monkeypatch):
    def full(file, value):
        raise OSError("8192 requested and 468 written")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match=r"\.npy can't be written .*make room for the hidden states"):
            go(dense, tmp_path / "out")
    go(dense, tmp_path / "out")


def test_keep_is_a_share_of_what_the_recipe_says():
    assert (
        api.with_keep("svd-llm", 0.7).budget.of == "blocks" and api.with_keep("recommended", 0.7).budget.of == "model"
    )
    assert api.with_keep("svd-llm", 0.7, "without_head").budget.of == "without_head"
    other = api.with_keep("svd-llm", None, "model").budget
    assert (other.of, other.keep) == ("model", api.load_recipe("svd-llm").budget.keep)


def test_compress_takes_the_size_like_the_command(dense):
    model, tokenizer = api.load(dense, "cpu", "float32")
    text = api.read_calibration(model, tokenizer, [dense / "text.txt"], num_samples=4)
    _, report = tenfold.compress(model, "recommended", text=text, keep=0.9, of="without_head")
    after = report["parameters"]
    assert report["recipe"]["budget"]["of"] == "without_head" and 0.88 < after["without_head"] / after["dense"] <= 0.9


def test_another_run_does_not_take_over(dense, tmp_path):
    with interrupted_at_block(0):
        go(dense, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"out\.partial holds what another run"):
        go(dense, tmp_path / "out", LOW_RANK)
    go(dense, tmp_path / "out", LOW_RANK, overwrite=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_full_disk_keeps_finished_blocks(dense, tmp_path, monkeypatch):
    from tenfold.compression import resume_state

    def full(*arguments, **keywords):
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(resume_state, "save_file", full)
        with pytest.raises(OSError, match=r"can't be written .*make room"):
            go(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.safetensors"))
    go(dense, tmp_path / "out")


def test_only_one_block_is_in_memory(dense, tmp_path, monkeypatch):
    most, load = [], lazy_checkpoint.LazyCheckpoint.load

    def watch(self, path, *rest):
        load(self, path, *rest)
        inside = [site for site in find_sites(self.model) if site.layer is not None]
        most.append(len({site.layer for site in inside if not self.model.get_submodule(site.path).weight.is_meta}))

    monkeypatch.setattr(lazy_checkpoint.LazyCheckpoint, "load", watch)
    go(
        dense,
        tmp_path / "out",
        LOW_RANK | {"replace": [{"role": "attn.out", "structure": {"kind": "low_rank"}, "keep": 0.5}]},
    )
    assert most and max(most) == 1


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt2-untied", "llama", "llama-tied", "qwen3", "bert", "opt", "phi", "gpt_neox"]
)
def test_lazy_reads_what_from_pretrained_reads(name, tmp_path):
    model = toys.build(name)
    model.save_pretrained(tmp_path)
    opened = lazy_checkpoint.open_lazy(tmp_path)
    opened.load_outside([])
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), opened.model.state_dict().values(), strict=True)
    )
    assert torch.equal(toys.logits(opened.model), toys.logits(model))


def test_a_compressed_checkpoint_is_compressed_again(dense, tmp_path):
    go(dense, tmp_path / "run_or_load")
    again = checkpoint_jobs.compress_checkpoint(
        tmp_path / "run_or_load", tmp_path / "twice", RECIPE, [dense / "text.txt"], num_samples=8
    )
    once = json.loads((tmp_path / "run_or_load" / "tenfold.json").read_text())
    assert again["parameters"]["total"] < 0.81 * once["parameters"]["total"]
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")(torch.arange(12)[None]).logits).all()


@pytest.mark.parametrize("how", ["compress", "stages", "weights", "heal", "memory"])
def test_models_quantised_by_other_tools_are_refused(dense, tmp_path, capsys, monkeypatch, how):
    """Refuse before reading tensors: FP8 matrices without their scales would look like the model's."""
    shutil.copytree(dense, tmp_path / "int")
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "int" / "config.json").write_text(json.dumps(config))
    name, out, text = tmp_path / "int", tmp_path / "out", [dense / "text.txt"]
    with pytest.raises((ValueError, SystemExit)) as refused:
        if how == "compress":
            go(name, out)
        elif how == "stages":
            checkpoint_jobs.compress_checkpoint(name, out, STAGES, text, heal_files=text)
        elif how == "heal":
            checkpoint_jobs.heal_checkpoint(name, dense, out, text, Heal(steps=1))
        elif how == "memory":
            model = AutoModelForCausalLM.from_pretrained(dense)
            model.config.quantization_config = {"quant_method": "fp8"}
            api.compress(model, LOW_RANK)
        else:
            given = ["compress", str(name), "-o", str(out), "--recipe", "low-rank"]
            monkeypatch.setattr(sys, "argv", ["tenfold", *given])
            monkeypatch.setattr(warnings, "showwarning", None)  # restore what the command sets
            tenfold_cli.main()
    said = capsys.readouterr().err if how == "weights" else str(refused.value)
    assert "is quantised (fp8); take the model that it was made of, and quantise the result" in said
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_a_checkpoint_without_safetensors_by_name_is_read_whole(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_jobs, "open_lazy", lambda *rest: None)
    go(dense, tmp_path / "out", LOW_RANK)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stored:
        assert any("left" in key for key in stored.keys())  # noqa: SIM118 - no mapping
    assert AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.filterwarnings("always:the calibration text has")
def test_too_little_text_warns(dense, tmp_path, monkeypatch, capsys):
    words = " ".join((dense / "text.txt").read_text().split()[:60])
    (tmp_path / "short.txt").write_text(words)
    arguments = ["compress", dense, "-o", tmp_path / "out", "--keep", "0.8", "--calibrate", tmp_path / "short.txt"]
    monkeypatch.setattr(sys, "argv", ["tenfold", *map(str, arguments)])
    monkeypatch.setattr(warnings, "showwarning", None)  # restore what the command sets
    with pytest.raises(SystemExit):
        tenfold_cli.main()
    said = capsys.readouterr().err
    assert "reads 128 values: 256 tokens are needed at least; damping of 0.01" in said
    assert said.index("tokens are needed") < said.index("foreseen"), "before the work"


HEAL = {"steps": 3, "learning_rate": 1e-3, "tokens_per_step": 64}
STAGES = {
    "name": "gradual",
    "stages": [
        {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 12}}], "heal": HEAL},
        {"replace": [{"role": "mlp.out", "structure": {"kind": "low_rank", "rank": 12}}], "heal": HEAL},
        {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 6}}], "calibrate": {}},
    ],
}


def in_stages(dense, output, recipe=STAGES, **more):
    return go(dense, output, recipe, heal_files=[dense / "text.txt"], **more)


def test_stages_compress_and_heal_one_after_another(dense, tmp_path):
    report = in_stages(dense, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    block = model.transformer.h[0].mlp
    assert (block.c_fc.structure.rank, block.c_proj.structure.rank) == (6, 12)
    assert ["heal" in stage for stage in report["stages"]] == [True, True, False]
    assert report["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert report["parameters_dense"]["total"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(dense).parameters()
    )
    first = api.price(api.load(dense)[0])["parameters"]["total"]
    assert first > report["stages"][0]["parameters"]["total"] > report["stages"][1]["parameters"]["total"]
    assert not (tmp_path / "out.partial").exists()


def test_compress_with_healing_is_compress_then_heal(dense, tmp_path):
    report = in_stages(dense, tmp_path / "both", RECIPE)
    go(dense, tmp_path / "compressed")
    checkpoint_jobs.heal_checkpoint(tmp_path / "compressed", dense, tmp_path / "healed", [dense / "text.txt"], Heal())
    healing = report["stages"][0]["heal"]
    assert healing["settings"] == Heal().model_dump(mode="json") and healing["steps"] == 1
    check_same_weights(tmp_path / "both", tmp_path / "healed", rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):  # one step changes the weights
        check_same_weights(tmp_path / "both", tmp_path / "compressed")


def test_healing_is_added_to_recipes_without_stages():
    assert api.with_healing(load_recipe(STAGES), calibrated=True) == load_recipe(STAGES)
    (stage,) = api.with_healing(load_recipe(LOW_RANK | {"heal": HEAL}), calibrated=False).stages
    assert stage.heal == Heal(**HEAL) and stage.calibrate is None and stage.replace == load_recipe(LOW_RANK).replace


def test_interrupted_stages_resume(dense, tmp_path, monkeypatch):
    in_stages(dense, tmp_path / "whole")
    compress, calls = checkpoint_jobs.compress, []

    def stop_at_the_third(*rest, **more):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return compress(*rest, **more)

    monkeypatch.setattr(checkpoint_jobs, "compress", stop_at_the_third)
    with pytest.raises(Interrupted):
        in_stages(dense, tmp_path / "out")
    assert len(list((tmp_path / "out.partial").glob("stage-?"))) == 2
    in_stages(dense, tmp_path / "out")
    assert len(calls) == 4  # only the third stage again
    check_same_weights(tmp_path / "whole", tmp_path / "out", rtol=1e-5, atol=1e-6)


def test_stages_name_the_text_they_lack(dense, tmp_path):
    with pytest.raises(ValueError, match=r"stage 0 of recipe gradual heals: give the text for it"):
        checkpoint_jobs.compress_checkpoint(dense, tmp_path / "out", STAGES, [dense / "text.txt"])
    with pytest.raises(ValueError, match=r"stage 2 of recipe gradual goes by activations"):
        checkpoint_jobs.compress_checkpoint(dense, tmp_path / "out", STAGES, heal_files=[dense / "text.txt"])
    assert not list(tmp_path.iterdir())


def test_stages_end_with_the_counts_of_the_whole():
    priced = [api.inspect("gpt2", load_recipe(name))["parameters"] for name in ("tqcompressor", "tqcompressor-staged")]
    assert priced[0] == priced[1]


def test_bonds_are_cut_and_healed_in_rounds(dense, tmp_path):
    train = {"role": "mlp.in", "structure": {"kind": "tensor_train", "parts": 3, "rank": "full"}, "freeze": ["core_1"]}
    stages = [{"replace": [train]}, {"squeeze": {"role": "mlp.in", "rank_ratio": 0.7}, "heal": HEAL, "rounds": 3}]
    report = in_stages(dense, tmp_path / "out", {"name": "squeezed", "stages": stages})
    totals = [stage["parameters"]["total"] for stage in report["stages"]]
    assert len(totals) == 4 and totals == sorted(totals, reverse=True) and len(set(totals)) == 4
    assert ["heal" in stage for stage in report["stages"]] == [False, True, True, True]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_cost_of_a_squeezed_model_is_not_known_before():
    with pytest.raises(ValueError, match="mpop-staged cuts the bonds that lose least: what it costs is known when"):
        api.inspect("gpt2", load_recipe("mpop-staged"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_from_disk_and_resumed(name, tmp_path):
    dense = small.folder(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    config = toys.config(name, vocab_size=len(tokenizer), max_position_embeddings=128)
    model = getattr(transformers, toys.EXPERTS[name][0])(config)
    (tmp_path / "moe").mkdir()
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    (tmp_path / "moe" / "text.txt").write_text((dense / "text.txt").read_text())
    assert lazy_checkpoint.open_lazy(tmp_path / "moe") is not None
    go(tmp_path / "moe", tmp_path / "out")
    expected, ids = in_memory(tmp_path / "moe"), torch.arange(12)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(whole(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=0)
    with interrupted_at_block(1):
        go(tmp_path / "moe", tmp_path / "again")
    go(tmp_path / "moe", tmp_path / "again")
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(resumed(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_squeezing_reads_the_whole_model(dense, tmp_path):
    train = {"kind": "tensor_train", "parts": 3, "rank": 4}
    go(dense, tmp_path / "trains", {"name": "trains", "replace": [{"role": "mlp.in", "structure": train}]})
    (tmp_path / "trains" / "text.txt").write_text((dense / "text.txt").read_text())
    report = go(tmp_path / "trains", tmp_path / "squeezed", {"name": "cut", "squeeze": {"role": "mlp.in", "bonds": 2}})
    assert report["parameters"]["total"] < report["parameters_dense"]["total"]
