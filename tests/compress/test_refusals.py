"""Every error is one sentence that says what to do, and leaves the model as it was."""

import copy
import lzma
import re
import shutil
import sys

import pytest
import small
import torch
from models import toys
from plain import text
from transformers import AutoModelForCausalLM, AutoTokenizer

import tenfold_cli
from tenfold.compression.compress import compress
from tenfold.models.recipe import load_recipe
from tenfold.train.tokens import write_tokens

WORDS = text(8)
NARROW = [{"prune": "mlp"}, {"prune": "attention"}]
LOW_RANK, FOUR = {"structure": {"kind": "low_rank"}}, {"structure": {"kind": "low_rank", "rank": 4}}
HALF = {"budget": {"keep": 0.5}}


def refused(model, recipe: dict, words=WORDS) -> str:
    """Return the error message, and check that the model, in training mode, stays as it was."""
    before = copy.deepcopy(model.train()).state_dict()
    with pytest.raises(ValueError) as caught:
        compress(model, recipe, text=words)
    assert model.training and all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0, equal_nan=True)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    return said


WRONG = {
    "narrowing without text": ({"replace": NARROW, "budget": {"keep": 0.5}}, None, "--calibrate FILE"),
    "activations without text": (
        {"replace": [{"role": "mlp.in", **LOW_RANK}], "calibrate": {}},
        None,
        "--calibrate FILE",
    ),
    "no such role": ({"replace": [{"role": "mlp.gate", **LOW_RANK}]}, WORDS, "gpt2 matches role mlp.gate"),
    "no budget": ({"replace": [{"role": "mlp.in", **LOW_RANK}]}, WORDS, "mlp.c_fc to keep; give the recipe a budget"),
    "no budget for units": ({"replace": NARROW}, WORDS, "to keep; give the recipe a budget"),
    "no such layer": ({"replace": [{"prune": "mlp", "layers": [9]}], **HALF}, WORDS, "matches"),
    "half an MLP": ({"replace": [{"role": "mlp.out", **FOUR}, NARROW[0]], **HALF}, WORDS, "mlp.out"),
    "no such structure": (
        {
            "replace": [
                {"role": "mlp.in", "structure": [{"kind": "low_rank"}, {"kind": "kronecker", "outs": [2], "ins": [2]}]}
            ],
            **HALF,
        },
        WORDS,
        "mlp.c_fc (128x32): outs (2,) and ins (2,)",
    ),
    "a budget that changes nothing": (
        {"name": "x", "replace": [{"role": "mlp.in", **FOUR}], **HALF},
        WORDS,
        "every rule of recipe x has a size of its own, so that keep 0.5 changes nothing",
    ),
    "FLOPs of a whole change": (
        {"transform": "drop-layers", "budget": {"keep": 0.5, "of": "flops"}},
        WORDS,
        "take model, without_head or blocks",
    ),
    "too little to rotate towards": (
        {"transform": "rotate", "replace": [{"role": "mlp.in", **LOW_RANK}], "budget": {"keep": 0.1, "of": "model"}},
        WORDS,
        "asks to drop 27,562 at the sites of rules",
    ),
    "half an attention": ({"replace": [{"role": "attn.qkv", **FOUR}, NARROW[1]], **HALF}, WORDS, "attn"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_goes_wrong_is_one_sentence(name):
    recipe, words, says = WRONG[name]
    assert says in refused(toys.build("gpt2"), recipe, words)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize("of", ["model", "sites"])
def test_a_budget_that_cant_be_met_names_the_smallest_one_that_can(name, of):
    model = toys.build(name)
    said = refused(model, {"replace": NARROW, "budget": {"keep": 0.001, "of": of}})
    least = int(re.search(r"([\d,]+) parameters", said)[1].replace(",", ""))

    def kept(keep: float) -> tuple[int, int]:
        """Return how many parameters stay, and of how many."""
        choices: list[dict] = []
        after = copy.deepcopy(model)
        compress(after, {"replace": NARROW, "budget": {"keep": keep, "of": of}}, text=WORDS, announce=choices.extend)
        if of == "sites":
            return sum(choice["parameters"] for choice in choices), sum(choice["of"] for choice in choices)
        return sum(p.numel() for p in after.parameters()), sum(p.numel() for p in model.parameters())

    _, whole = kept(0.9)
    assert kept((least + 0.5) / whole) == (least, whole)
    with pytest.raises(ValueError, match=f"reach is {least:,} parameters"):
        kept((least - 0.5) / whole)


@pytest.mark.parametrize("outputs", ["none", "full"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_name_their_place(outputs, value):
    model = toys.build("gpt2")
    model.transformer.h[1].mlp.c_fc.bias.data[3] = value
    said = refused(model, {"replace": NARROW, "budget": {"keep": 0.8}, "calibrate": {"output_metric": outputs}})
    assert "mlp.c_proj in block 1, batch 0 of the calibration text, hold NaN or Inf" in said


@pytest.mark.parametrize("refit", [True, False])
def test_a_batch_that_the_survey_does_not_read_is_named_too(refit):
    model, words = toys.build("llama"), copy.deepcopy(WORDS)
    words.batches[2]["input_ids"][0, 0] = 95
    model.model.embed_tokens.weight.data[95] = float("inf")
    recipe = {"replace": NARROW, "budget": {"keep": 0.8}, "calibrate": {"fisher_tokens": 32, "refit": refit}}
    assert re.search(r"in block 0, batch 2 of the calibration text, hold NaN or Inf", refused(model, recipe, words))


def test_logits_that_are_no_numbers():
    model = toys.build("llama")
    model.lm_head.weight.data[9] = float("nan")
    assert "the logits of the original model hold NaN or Inf" in refused(model, {"replace": NARROW, **HALF})


@pytest.mark.parametrize("recipe", ["drop-layers", "slicegpt"])
def test_weights_that_are_no_numbers_are_named_before_the_model_is_changed(recipe):
    model = toys.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    assert "model.layers.1.mlp.up_proj.weight holds NaN or Inf" in refused(model, load_recipe(recipe))


def test_no_token_is_left():
    recipe = {"replace": NARROW, "budget": {"keep": 0.8}, "calibrate": {"skip_first": 50}}
    assert "skip_first 50 leaves no token" in refused(toys.build("gpt2"), recipe)


def test_losses_have_a_unit_and_what_a_rule_settles_has_none():
    def told(model, *rules, **calibrate):
        choices: list[dict] = []
        budget = {} if rules == (SETTLED,) else HALF
        recipe = {"replace": list(rules), "calibrate": calibrate} | budget
        compress(model, recipe, text=WORDS, announce=choices.extend)
        return {(choice["unit"], choice["loss"] is None) for choice in choices}

    open_rule = {"role": "mlp.out", **LOW_RANK}
    SETTLED = {"role": "mlp.in", **FOUR}
    nats, squares = "nats a token", "weighted squared error"
    assert told(toys.build("gpt2"), SETTLED, open_rule) == {(nats, True), (nats, False)}
    assert told(toys.build("gpt2"), SETTLED) == {(nats, True)}
    assert told(toys.build("gpt2"), open_rule, output_metric="none") == {(squares, False)}
    assert told(toys.build("gpt2").transformer, open_rule) == {(squares, False)}


def test_it_is_told_how_fits_ended():
    rule = {"role": "mlp.in", "structure": {"kind": "kronecker", "inner": [4, 4], "terms": 2}}
    for options, ended in (({"sweeps": 2, "tolerance": 0.0}, ("sweeps", 2)), ({"tolerance": 1.0}, ("tolerance", 1))):
        recipe = {"replace": [rule | {"start": {"options": options}}], "calibrate": {"output_metric": "none"}}
        _, report = compress(toys.build("gpt2"), recipe, text=WORDS)
        fits = report["fits"]
        assert len(fits) == 2 and all((fit["stopped_by"], fit["sweeps"]) == ended for fit in fits.values())
    _, report = compress(toys.build("gpt2"), {"replace": [{"role": "mlp.in", **FOUR}]}, text=WORDS)
    assert {fit["stopped_by"] for fit in report["fits"].values()} == {"exact"}


@pytest.mark.parametrize("allocate", ["sensitivity", "uniform", "influence"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_shares_keep_the_budget(name, allocate):
    """Also where some items have a fixed size: queries and keys with norms."""
    model = toys.build(name)
    before = sum(p.numel() for p in model.parameters())
    recipe = {"replace": NARROW, "budget": {"keep": 0.8, "of": "model"}, "calibrate": {"allocate": allocate}}
    after = compress(model, recipe, text=WORDS)[0]
    assert 0.78 * before <= sum(p.numel() for p in after.parameters()) <= 0.8 * before


@pytest.mark.parametrize("allocate", ["sensitivity", "uniform", "influence"])
def test_shares_keep_the_budget_where_the_last_item_is_fixed(allocate):
    choices: list[dict] = []
    recipe = {"replace": NARROW[1:], "budget": {"keep": 0.7}, "calibrate": {"allocate": allocate}}
    compress(toys.build("qwen3"), recipe, text=WORDS, announce=choices.extend)
    assert sum(choice["parameters"] for choice in choices) <= 0.7 * sum(choice["of"] for choice in choices)


# the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = small.folder(tmp_path_factory.mktemp("dense"))
    (folder / "short.txt").write_text("the old house")
    (folder / "cut.txt.xz").write_bytes(lzma.compress(b"the old house " * 999)[:-20])
    write_tokens(folder / "tokens", [folder / "text.txt"], AutoTokenizer.from_pretrained(folder))
    shutil.copytree(folder, folder / "cut", ignore=shutil.ignore_patterns("cut", "tokens"))
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    broken = AutoModelForCausalLM.from_pretrained(folder)
    broken.transformer.h[1].mlp.c_fc.bias.data[3] = float("nan")
    broken.save_pretrained(folder / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "broken" / name).write_bytes((folder / name).read_bytes())
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run ``tenfold compress``; return its exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tenfold", "compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            tenfold_cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def test_the_command_compresses_by_a_text(call, dense, tmp_path):
    given = (dense, "-o", tmp_path / "out", "--keep", 0.8, "--calibrate", dense / "text.txt", "--num-samples", 8)
    status, out, err = call(*given)
    assert status == 0 and "with the head" in out and "nats a token" in err
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (dense, tmp_path / "out")]
    before, after = (sum(p.numel() for p in model.parameters()) for model in models)
    assert 0.78 * before <= after <= 0.8 * before
    assert torch.isfinite(models[1](input_ids=torch.arange(12)[None]).logits).all()
    assert "--calibrate" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_heals_what_it_has_compressed(call, dense, tmp_path):
    given = (dense, "-o", tmp_path / "out", "--keep", 0.8, "--calibrate", dense / "text.txt", "--num-samples", 8)
    status, out, err = call(*given, "--heal", dense / "text.txt")
    assert status == 0 and "with the head" in out
    assert err.index("compressing: fits") < err.index("healing: step 1 of ")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


TEXT = ("--calibrate", "{dense}/text.txt", "--num-samples", "4")
REFUSED = {
    "missing text": (("{dense}", "--keep", "0.8", "--calibrate", "{dense}/none.txt"), "there is no file"),
    "too little text": (("{dense}", "--keep", "0.8", "--calibrate", "{dense}/short.txt"), "fewer than one window"),
    "no text": (("{dense}", "--recipe", "recommended"), "--calibrate FILE"),
    "keep alone": (("{dense}", "--keep", "0.8"), "with --calibrate TEXT"),
    "no samples": (("{dense}", "--keep", "0.8", *TEXT[:2], "--num-samples", "0"), "0 samples in batches of None"),
    "no such share": (("{dense}", "--keep", "0.8", "--of", "head", *TEXT), "budget.of: Input should be 'model'"),
    "tokens": (
        ("{dense}", "--keep", "0.8", "--calibrate", "{dense}/tokens"),
        "is a folder and no text; give files of text",
    ),
    "cut text": (("{dense}", "--keep", "0.8", "--calibrate", "{dense}/cut.txt.xz"), "is cut off, or not what .xz says"),
    "cut weights": (("{dense}/cut", "--keep", "0.8", *TEXT), "is no whole file of safetensors"),
    "no model": (("{dense}/none/there", "--keep", "0.8", *TEXT), "there is no model"),
    "roles of nothing": (("{dense}", "--keep", "0.8", "--roles", "mlp.in", *TEXT), "--roles changes nothing here"),
    "healing by nothing": (("{dense}", "--keep", "0.8", "--heal", "x", *TEXT), "there is no file x"),
    "too small": (("{dense}", "--keep", "0.01", *TEXT), "the smallest that these rules reach is"),
    "broken weights": (
        ("{dense}/broken", "--keep", "0.8", *TEXT),
        "mlp.c_proj in block 1, batch 0 of the calibration text, hold NaN",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_the_command_refuses_in_one_sentence(call, dense, tmp_path, name):
    arguments, says = REFUSED[name]
    status, _, err = call(*(part.format(dense=dense) for part in arguments), "-o", tmp_path / "new")
    lines = [line for line in err.splitlines() if not line.startswith("compressing: ") and "the right text" not in line]
    assert status == 2 and says in err and "Traceback" not in err and len(lines) == 1, err
    assert not (tmp_path / "new").exists()
