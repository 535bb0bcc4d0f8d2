"""The commands, run in this process: what they print and write, and one sentence for every error."""

import copy
import json
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import small
import torch
import toy_tasks
from transformers import AutoConfig, AutoModelForCausalLM

import tenfold
import tenfold.api
import tenfold_cli
from tenfold.models.auto import load_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("dense"))


def test_help_needs_no_torch():
    code = "import sys, tenfold_cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("compress", ["5GB", "recommended"]),
        ("generate", ["40", "0.0"]),
        ("bench", ["5", "dense-cache"]),
        ("heal", ["0.0003", "4096", "64"]),
        ("finetune", ["full", "float32", "32", "8"]),
        ("pretrain", ["float16"]),
    ],
)
def test_help_shows_the_defaults_of_the_functions(call, monkeypatch, command, defaults):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = call(command, "--help")
    assert status == 0 and all(f"[default: {value}]" in out for value in defaults)


def test_only_training_imports_the_trainer():
    """Trainer and peft take a second or two to import."""
    code = (
        "import sys, tenfold; tenfold.plan, tenfold.inspect; assert not {'transformers.trainer', 'peft'} & {*sys.modules}; "
        "from tenfold import api; assert api.finetune.__module__ == 'tenfold.train.finetune'; api.nothing"
    )
    told = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "AttributeError: module 'tenfold.api' has no attribute 'nothing'" in told.stderr


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_is_silent():
    code = "import tenfold_cli; tenfold_cli.silence_libraries(); import torchao"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("reused", [True, False])
def test_freed_memory_is_reused(reused):
    """Few page faults occur when 64 megabytes are allocated and freed repeatedly."""
    code = (
        "import resource, torch; from tenfold_cli.memory import reuse_freed_memory; "
        "pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        f"if {reused}: reuse_freed_memory()\n"
        "for k in range(40):\n"
        "    before = pages() if k == 20 else before if k else 0\n"
        "    torch.ones(2**24)\n"
        "print(pages() - before)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (int(told.stdout) < 1000) == reused


def test_inspect_prices_a_recipe(call):
    status, out, _ = call("inspect", "gpt2", "--recipe", "krony-81m", "--json")
    result = json.loads(out)
    assert status == 0 and result["parameters"]["total"] == 81_972_576 and result["parameters"]["dense"] == 124_439_808
    status, out, _ = call("inspect", "gpt2", "--recipe", "krony-81m")
    assert status == 0 and "81,972,576" in out and "mlp.in" in out


def test_inspect_takes_names_files_and_models(dense):
    by_name = tenfold.inspect("gpt2", "krony-81m")
    assert by_name["parameters"]["total"] == 81_972_576 and by_name["recipe"] == "krony-81m"
    model = AutoModelForCausalLM.from_pretrained(dense)
    rule = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]}
    by_model = tenfold.inspect(model, rule)
    assert by_model["parameters"] == tenfold.inspect(dense, rule)["parameters"]
    assert by_model["parameters"]["total"] < by_model["parameters"]["dense"] == model.num_parameters()
    compressed, _ = tenfold.compress(model, rule)
    assert tenfold.inspect(compressed)["parameters"]["total"] == by_model["parameters"]["total"]


def test_a_name_that_is_not_here_is_one_sentence(call):
    """The tests are offline."""
    status, _, err = call("inspect", "somebody/some-model")
    assert status == 2 and "there is no model 'somebody/some-model': no folder, not one of" in err, err
    assert len(err.splitlines()) == 1 and "Traceback" not in err


def test_public_functions_take_a_model_or_its_folder(dense, tmp_path):
    model, tokenizer = tenfold.load(dense, dtype=torch.float32)
    rule, text = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]}, [dense / "text.txt"]
    calls = {
        "bench": lambda one: tenfold.bench(one, against=one, new_tokens=1, repeats=1)["rows"],
        "compress": lambda one: tenfold.compress(one, rule)[1]["parameters"],
        "deepen": lambda one: tenfold.deepen(one, 3)[1]["parameters"],
        "densify": lambda one: tenfold.densify(one).num_parameters(),
        "evaluate": lambda one: tenfold.evaluate(one, tokenizer, text, limit=64)["nats"],
        "generate": lambda one: tenfold.generate(one, prompt="the old", tokenizer=None if one == dense else tokenizer),
        "inspect": lambda one: tenfold.inspect(one)["parameters"],
        "plan": lambda one: str(tenfold.plan(one, rule)),
        "read_calibration": lambda one: tenfold.read_calibration(one, tokenizer, text, num_samples=2).tokens,
        "save": lambda one: tenfold.save(one, tmp_path / "saved", tokenizer),
    }
    for name, run in calls.items():
        assert run(str(dense)) == run(copy.deepcopy(model)) == run(dense), name
    other = {"evaluate_task", "finetune", "heal"}  # below; the others take no model, or a block of code
    assert {*tenfold.__all__} - {*calls} - other == {
        "Recipe", "dense_cache", "from_pretrained", "load", "load_recipe", "pretrain"
    }  # fmt: skip
    place = toy_tasks.write_summaries(toy_tasks.write_sst2(tmp_path, 16, 8))
    scores = [tenfold.evaluate_task(one, tokenizer, "samsum", place, limit=2) for one in (model, dense)]
    assert scores[0] == scores[1]
    given = {"data": place, "epochs": 1, "device": "cpu", "dtype": torch.bfloat16}
    runs = [
        tenfold.finetune(one, "sst2", output=tmp_path / f"tuned-{k}", tokenizer=tokenizer, **given)
        for k, one in enumerate((model, dense))
    ]
    assert runs[0]["runs"][0]["curve"] == runs[1]["runs"][0]["curve"] and runs[0]["weights"] == runs[1]["weights"]
    with pytest.raises(ValueError, match="give output, a folder"):
        tenfold.heal(dense, dense, files=text)
    settings = tenfold.api.heal_settings(steps=1, tokens_per_step=64)
    report = tenfold.heal(dense, dense, files=text, settings=settings, output=tmp_path / "healed")
    assert report["steps"] == 1 and (tmp_path / "healed" / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_a_name_or_a_torch_dtype(dense, dtype):
    assert (
        tenfold.load(dense, "cpu", dtype)[0].dtype
        == tenfold.from_pretrained(dense, dtype=dtype).dtype
        == torch.bfloat16
    )


def test_compress_evaluate_generate_bench_export(call, dense, tmp_path, monkeypatch):
    folded, plain = tmp_path / "folded", tmp_path / "plain"
    status, out, _ = call("compress", dense, "-o", folded, "--structure", "low_rank", "--keep", "0.8")
    assert status == 0 and "with the head" in out and "without" in out
    status, out, _ = call("evaluate", dense, folded, "--text", dense / "text.txt", "--limit", "300")
    assert status == 0 and "protocol" in out
    cached, cache = [], tenfold.api.dense_cache
    monkeypatch.setattr(tenfold.api, "dense_cache", lambda model: cached.append(model) or cache(model))
    status, out, _ = call("generate", folded, "the old house", "--max-new-tokens", "4")
    assert len(cached) == 1
    assert status == 0 and out.startswith("the old house")
    status, out, _ = call("bench", folded, "--repeats", "1", "--new-tokens", "2", "--json")
    assert status == 0 and json.loads(out)["decode"]["ratio"] > 0
    status, out, _ = call(
        "bench", folded, "--against", dense, "--training", "--batch-size", 1, "--batch-size", 2, "--repeats", "1"
    )
    assert status == 0 and out.count("training") == 2 and "other tokens/s" in out
    status, out, _ = call("bench", folded, "--layers", "--repeats", "1")
    assert status == 0 and "low_rank" in out and "forward + backward" in out and "4,096" in out
    status, _, err = call("bench", dense, "--layers")
    assert status == 2 and "compress it first" in err
    status, out, _ = call("bench", folded, "--no-dense-cache", "--repeats", "1", "--new-tokens", "2", "--json")
    assert status == 0 and json.loads(out)["cached"] == 0
    status, _, _ = call("export", folded, "--to", "dense", "-o", plain)
    ids = torch.arange(12)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits for path in (folded, plain)]
    assert status == 0 and torch.allclose(*logits, atol=1e-5)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())


def test_the_card_has_command_import_figures(call, dense, tmp_path):
    recipe = ("--structure", "kronecker", "--keep", "0.8", "--roles", "mlp.in,mlp.out")
    call("compress", dense, "-o", tmp_path / "x", *recipe)
    card = (tmp_path / "x" / "README.md").read_text()
    assert all(part in card for part in ("tenfold compress", "--keep 0.8", "import tenfold", "without the head"))


def test_heal(call, dense, tmp_path):
    folded, healed = tmp_path / "folded", tmp_path / "healed"
    call("compress", dense, "-o", folded, "--structure", "low_rank", "--keep", "0.7")
    text = ("--text", dense / "text.txt", "--steps", "2", "--tokens-per-step", "64")
    status, out, err = call("heal", folded, "--teacher", dense, *text, "-o", healed)
    assert status == 0, err
    assert "2 steps" in out and "tenfold heal" in (healed / "README.md").read_text()
    stored = ("--store", tmp_path / "store", "--top-k", "16", "--loss", "kl=1.0", "--loss", "cross_entropy=0.1")
    for name in ("first", "second"):
        status, out, err = call("heal", folded, "--teacher", dense, *text, *stored, "-o", tmp_path / name)
        assert status == 0, err
    assert json.loads((tmp_path / "second" / "tenfold.json").read_text())["heal"]["losses"]["cross_entropy"] == 0.1
    before = {path.name: path.read_bytes() for path in healed.rglob("*") if path.is_file()}
    overwrite = ("-o", healed, "--overwrite")
    for more, sentence in (
        (("--learning-rate", "1e30", "--steps", "3"), "there is no checkpoint yet; lower the learning rate"),
        (("--store", tmp_path / "store"), "top_k is 16 there and 64 here"),
        (
            ("--store", tmp_path / "store", "--loss", "hidden=1"),
            "not the hidden states and attention that hidden compare",
        ),
        (("--loss", "kl"), "write kl=1.0"),
    ):
        status, _, err = call("heal", folded, "--teacher", dense, *text, *more, *overwrite)
        assert (
            status == 2 and sentence in err and len([line for line in err.splitlines() if ": step " not in line]) == 1
        ), err
    status, _, err = call("heal", folded, *text, *overwrite)
    assert status == 2 and "the loss kl needs a teacher" in err
    assert before == {path.name: path.read_bytes() for path in healed.rglob("*") if path.is_file()}, (
        "what was there is still there"
    )


def test_heal_by_a_recipe(call, dense, tmp_path):
    """The command line overrides the recipe; --data is another name of --text."""
    (tmp_path / "heal.yaml").write_text(
        "heal: {steps: 9, tokens_per_step: 64, chunk: 50, schedule: constant, losses: {cross_entropy: 1.0}}\n"
    )
    given = ("--recipe", tmp_path / "heal.yaml", "--data", dense / "text.txt", "--steps", "2", "--batch-size", 1)
    status, out, err = call("heal", dense, *given, "-o", tmp_path / "healed")
    assert status == 0 and "2 steps, 128 tokens" in out and "tokens/s" in err, err
    assert json.loads((tmp_path / "healed" / "tenfold.json").read_text())["heal"]["losses"] == {"cross_entropy": 1.0}


@pytest.mark.parametrize("command", [("recipes",), ("inspect", "./nothing")])
def test_the_process_group_is_destroyed(call, tmp_path, command):
    """Also after an error."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    call(*command)
    assert not distributed.is_initialized()


def test_pretrain(call, tmp_path):
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        "model: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 1, n_positions: 16}\n"
        "tokenizer: {vocab_size: 300}\ntrain: {tokens: 640, batch_size: 4}\n"
    )
    (tmp_path / "text.txt").write_text(small.text(1000))
    status, out, err = call("pretrain", recipe, "--data", tmp_path / "text.txt", "-o", tmp_path / "model")
    assert status == 0, err
    assert "640 tokens" in out and (tmp_path / "model" / "training.json").exists()
    recipe.write_text(recipe.read_text().replace("tokens: 640", "tokens: 320"))
    (tmp_path / "model" / "notes.txt").write_text("mine")
    again = ("pretrain", recipe, "--data", tmp_path / "text.txt", "-o", tmp_path / "model")
    status, _, err = call(*again)
    assert status == 2 and "is a run of another recipe (train.tokens is " in err
    status, out, err = call(*again, "--overwrite")
    assert status == 0 and "320 tokens" in out and (tmp_path / "model" / "notes.txt").exists(), err
    steps = [json.loads(line)["step"] for line in (tmp_path / "model" / "log.jsonl").open()]
    assert max(steps) == 5 and [path.name for path in (tmp_path / "model" / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-5"
    ]
    inside = ("pretrain", recipe, "--data", tmp_path / "model" / "tokens", "-o", tmp_path / "model", "--overwrite")
    status, _, err = call(*inside)
    assert status == 2 and "which is to be overwritten; move it" in err and (tmp_path / "model" / "tokens").is_dir()


def test_finetune_and_evaluate_on_a_task(call, dense, tmp_path):
    place, tuned = toy_tasks.write_sst2(tmp_path, 32, 16), tmp_path / "tuned"
    task = ("--task", "sst2", "--data", place)
    given = ("--seed", 1, "--seed", 2, "--epochs", 2, "--learning-rate", 3e-3, "--batch-size", 8, "--device", "cpu")
    status, out, err = call("finetune", dense, *task, *given, "-o", tuned)
    assert status == 0, err
    assert "over 2 seeds" in out and "(100.0%); seed" in out and (tuned / "finetune.json").exists()
    status, out, err = call("evaluate", tuned, *task, "--limit", 8)
    assert status == 0 and "task sst2, dev.tsv, 8 examples" in out, err
    toy_tasks.write_summaries(tmp_path)
    status, out, err = call("evaluate", dense, "--task", "samsum", "--data", place, "--limit", 2, "--json")
    assert status == 0 and set(json.loads(out)[0]) >= {"rouge1", "rouge2", "rougeL", "score"}, err


KRONY = ("--recipe", "krony-81m")
WRONG = {
    "no such model": (("inspect", "./nothing"), "nothing"),
    "no such recipe": (("inspect", "gpt2", "--recipe", "krony-81"), "did you mean krony-"),
    "keep of one": (
        ("compress", "{dense}", "-o", "{new}", "--structure", "low_rank", "--keep", "1.0"),
        "between 0 and 1",
    ),
    "no structure": (("compress", "{dense}", "-o", "{new}"), "give either --keep SHARE"),
    "unknown structure": (
        ("compress", "{dense}", "-o", "{new}", "--structure", "lowrank", "--keep", "0.5"),
        "low_rank",
    ),
    "sizes that don't fit": (("compress", "{dense}", "-o", "{new}", *KRONY), "transformer.h.0.mlp.c_fc"),
    "folder in use": (
        ("compress", "{dense}", "-o", "{dense}", "--structure", "low_rank", "--keep", "0.5"),
        "--overwrite",
    ),
    "missing text": (("evaluate", "{dense}", "--text", "{new}.txt"), "there is no file"),
    "tokens as text": (
        ("heal", "{dense}", "--text", "{dense}/tokens", "--loss", "cross_entropy=1", "-o", "{new}"),
        "tokens is a folder and no text; give files of text",
    ),
    "unknown dtype": (("generate", "{dense}", "the", "--dtype", "float99"), "float99"),
    "unknown device": (("generate", "{dense}", "the", "--device", "abacus"), "abacus"),
    "text and task": (("evaluate", "{dense}"), "give either --text FILE"),
    "a task without data": (("evaluate", "{dense}", "--task", "cola"), "--data FOLDER"),
    "unknown task": (
        ("finetune", "{dense}", "--task", "colla", "--data", "{dense}", "-o", "{new}"),
        "did you mean 'cola'",
    ),
    "no file of a task": (
        ("finetune", "{dense}", "--task", "cola", "--data", "{dense}", "-o", "{new}"),
        "has no train.tsv",
    ),
    "no head for a task": (
        ("evaluate", "{dense}", "--task", "cola", "--data", "{dense}"),
        "fine-tune it first: tenfold finetune MODEL --task cola",
    ),
    "bench: too long": (("bench", "{dense}", "--length", 99), "length 99 and 16 new tokens need 99 positions"),
    "window too long": (("evaluate", "{dense}", "--text", "{dense}/text.txt", "--window", "64"), "context of 32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_one_sentence(call, dense, tmp_path, name):
    arguments, wanted = WRONG[name]
    (dense / "tokens").mkdir(exist_ok=True)
    (dense / "tokens" / "tokens.json").touch()
    before = sorted(path.name for path in dense.iterdir())
    status, _, err = call(*(str(part).format(dense=dense, new=tmp_path / "new") for part in arguments))
    assert (
        status == 2
        and wanted in err
        and "Traceback" not in err
        and len([line for line in err.splitlines() if ": step " not in line]) == 1
    ), err
    assert sorted(path.name for path in dense.iterdir()) == before and not (tmp_path / "new").exists()


def test_generate_stays_in_the_context(call, dense):
    """Warn if fewer tokens fit; refuse a prompt that fills the context."""
    status, out, err = call("generate", dense, "the old house")
    assert status == 0 and out.startswith("the old house"), err
    assert "and the model's context is 32: " in err and "more fit instead of 40" in err and len(err.splitlines()) == 1
    status, out, err = call("generate", dense, "the old house", "--max-new-tokens", 2)
    assert status == 0 and not err
    status, _, err = call("generate", dense, "the old house " * 30)
    assert status == 2 and "and the model's context is 32; give a shorter one" in err, err


def test_a_masked_model_writes_no_text_and_has_no_perplexity(call, dense, tmp_path):
    model, tokenizer = toy_tasks.bert()
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    status, _, err = call("generate", tmp_path, "the")
    assert status == 2 and "a BertForMaskedLM writes no text; take a causal language model" in err, err
    status, _, err = call("evaluate", tmp_path, "--text", dense / "text.txt", "--limit", 100)
    assert status == 2 and "a BertForMaskedLM predicts hidden tokens, not next ones" in err, err


TASK = ("--task", "samsum", "--data", "{tasks}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{bare}", "the"),
        ("evaluate", "{bare}", "--text", "{dense}/text.txt"),
        ("evaluate", "{bare}", *TASK),
        ("heal", "{bare}", "--teacher", "{dense}", "--text", "{dense}/text.txt", "-o", "{new}"),
        ("compress", "{bare}", "--keep", 0.8, "--calibrate", "{dense}/text.txt", "-o", "{new}"),
        ("finetune", "{bare}", *TASK, "-o", "{new}"),
    ],
)
def test_a_model_without_a_tokenizer_is_told_so(call, dense, tmp_path, arguments):
    """Refuse, instead of reading text with the empty tokenizer that transformers makes of a configuration."""
    shutil.copytree(dense, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    toy_tasks.write_summaries(tmp_path)
    places = {"dense": dense, "bare": tmp_path / "bare", "tasks": tmp_path, "new": tmp_path / "new"}
    status, _, err = call(*(str(part).format(**places) for part in arguments))
    assert status == 2 and "no tokenizer" in err and "copy tokenizer.json" in err, err
    assert not (tmp_path / "new").exists() and len(err.splitlines()) == 1


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "llama"])
def test_the_tokenizer_of_a_configuration_alone_is_none(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("command", [("generate", "x", "the"), ("heal", "x", "--text", "y", "-o", "z")])
def test_seeds_have_bounds(call, command):
    status, _, err = call(*command, "--seed", 2**70)
    assert status == 2 and "4294967295" in err and "--seed" in err, err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tenfold", "inspect", "./nothing", "--debug"])
    with pytest.raises(FileNotFoundError):
        tenfold_cli.main()


def test_deepen(call, dense, tmp_path):
    deep = tmp_path / "deep"
    status, out, err = call("deepen", dense, "-o", deep, "--layers", 3)
    assert status == 0 and "2 to 3 layers, parameters" in out, err
    assert json.loads((deep / "config.json").read_text())["n_layer"] == 3
    assert len(AutoModelForCausalLM.from_pretrained(deep).transformer.h) == 3
    status, _, err = call("deepen", deep, "-o", tmp_path / "less", "--layers", 2)
    assert status == 2 and "deepening only adds" in err
