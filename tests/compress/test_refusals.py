"""What goes wrong is one sentence that says what to do, and leaves the model as it was."""

import copy
import re
import sys

import pytest
import small
import torch
from models import toys
from plain import text
from transformers import AutoModelForCausalLM

import tenfold_cli
from tenfold.compress.compress import compress

WORDS = text(8)
NARROW = [{"narrow": "mlp"}, {"narrow": "attention"}]
LOW_RANK, FOUR = {"structure": {"kind": "low_rank"}}, {"structure": {"kind": "low_rank", "rank": 4}}
HALF = {"budget": {"keep": 0.5}}


def refused(model, recipe: dict, words=WORDS) -> str:
    """The sentence; the model is in training and stays as it was."""
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
    "no such layer": ({"replace": [{"narrow": "mlp", "layers": [9]}], **HALF}, WORDS, "matches"),
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
        """How many parameters stay, and of how many."""
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
    said = refused(model, {"replace": NARROW, "budget": {"keep": 0.8}, "calibrate": {"outputs": outputs}})
    assert "mlp.c_proj in block 1, batch 0 of the calibration text, hold NaN or Inf" in said


@pytest.mark.parametrize("allocate", ["sensitivity", "uniform", "influence"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_shares_keep_the_budget(name, allocate):
    """Also where some items can't be made smaller: queries and keys with norms."""
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
    broken = AutoModelForCausalLM.from_pretrained(folder)
    broken.transformer.h[1].mlp.c_fc.bias.data[3] = float("nan")
    broken.save_pretrained(folder / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "broken" / name).write_bytes((folder / name).read_bytes())
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run ``tenfold compress`` on a model; its exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tenfold", "compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            tenfold_cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def test_the_command_compresses_by_a_text(call, dense, tmp_path):
    given = (dense, "-o", tmp_path / "out", "--keep", 0.8, "--calibrate", dense / "text.txt", "--samples", 8)
    status, out, err = call(*given)
    assert status == 0 and "with the head" in out and "nats a token" in err
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (dense, tmp_path / "out")]
    before, after = (sum(p.numel() for p in model.parameters()) for model in models)
    assert 0.78 * before <= after <= 0.8 * before
    assert torch.isfinite(models[1](input_ids=torch.arange(12)[None]).logits).all()
    assert "--calibrate" in (tmp_path / "out" / "README.md").read_text()


TEXT = ("--calibrate", "{dense}/text.txt", "--samples", "4")
REFUSED = {
    "missing text": (("{dense}", "--keep", "0.8", "--calibrate", "{dense}/none.txt"), "there is no file"),
    "too little text": (("{dense}", "--keep", "0.8", "--calibrate", "{dense}/short.txt"), "fewer than one window"),
    "no text": (("{dense}", "--recipe", "recommended"), "--calibrate FILE"),
    "keep alone": (("{dense}", "--keep", "0.8"), "with --calibrate TEXT"),
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
    assert status == 2 and says in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "new").exists()
