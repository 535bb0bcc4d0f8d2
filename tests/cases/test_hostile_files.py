"""Files that were made to hurt: markup and escapes, names of other files, bombs, wrong types, code."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM

import tenfold
import tenfold.checkpoint_jobs
import tenfold_cli
from tenfold.models.auto import load_tokenizer
from tenfold.models.model_card import read_card, save_card
from tenfold.models.recipe import load_recipe
from tenfold_cli import output

GOLDEN = Path(__file__).parents[1] / "golden" / "version-1"


def said(err: str) -> str:
    last = err.strip().splitlines()[-1] if err.strip() else ""
    return last if last.startswith("tenfold: ") else ""


def run_limited(arguments, seconds=25, given=""):
    """Run a command in a process of its own, with 2 GB of memory beyond what torch maps, and return status and error."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)
        signal.alarm(seconds)

    command = [sys.executable, "-m", "tenfold", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit, input=given)
    return done.returncode, done.stderr


# recipes

BOMBS = {
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10)),
    "keys": "".join(f"k{k}: 1\n" for k in range(200_000)),
    "deep-flow": "name: " + "[" * 5000,
    "deep-map": "name: " + "{a: " * 5000,
    "deep-block": "".join(" " * k + f"k{k}:\n" for k in range(2000)),
    "wide": "replace: [" + "a, " * 20_000 + "a]",
    "unknown": "".join(f"{'k' * 60}{k}: 1\n" for k in range(2000)),
    "long-key": f"{'k' * 900}: 1",
    "long-value": f"name: [{'v' * 90_000}]",
    "not-utf8": b"name: \xff\xfe\n",
    "digits": "untie: " + "9" * 5000,
    "tags": "name: !!int ''",
    "date": "name: 2026-13-45",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_recipes_that_are_bombs_are_refused(tmp_path, kind):
    (tmp_path / "bomb.yaml").write_bytes(BOMBS[kind] if isinstance(BOMBS[kind], bytes) else BOMBS[kind].encode())
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"bomb\.yaml") as told:
        load_recipe(tmp_path / "bomb.yaml")
    assert len(str(told.value)) < 2000 and type(told.value) is ValueError and time.monotonic() - begun < 10


# checkpoints


@pytest.fixture
def folded(tmp_path):
    return shutil.copytree(GOLDEN / "low_rank", tmp_path / "folded")


SITE = "model.layers.0.mlp.up_proj"


def change_site(folder, change):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def structured(**fields):
    return lambda found: {**found, "sites": {SITE: {"bias": False, "structure": {"kind": "low_rank", **fields}}}}


WRONG = {
    "sites-list": lambda found: {**found, "sites": [1]},
    "sites-text": lambda found: {**found, "sites": "x"},
    "site-text": lambda found: {**found, "sites": {SITE: "x"}},
    "no-bias": lambda found: {**found, "sites": {SITE: {"structure": found["sites"][SITE]["structure"]}}},
    "bias-text": lambda found: {**found, "sites": {SITE: {**found["sites"][SITE], "bias": "no"}}},
    "frozen-number": lambda found: {**found, "sites": {SITE: {**found["sites"][SITE], "frozen": 3}}},
    "shared-list": lambda found: {**found, "sites": {SITE: {**found["sites"][SITE], "shared": ["left"]}}},
    "version-text": lambda found: {**found, "format_version": "1"},
    "version-none": lambda found: {**found, "format_version": None},
    "untied-text": lambda found: {**found, "untied": "no"},
    "recipe-list": lambda found: {**found, "recipe": [1]},
    "huge": structured(out_features=2**63, in_features=8, rank=2),
    "petabytes": structured(out_features=2**40, in_features=2**40, rank=2**20),
    "cores": lambda found: {
        **found,
        "sites": {
            SITE: {
                "bias": False,
                "structure": {
                    "kind": "tensor_train",
                    "outs": [12] + [1] * 24,
                    "ins": [8] + [1] * 24,
                    "ranks": [1] * 24,
                },
            }
        },
    },
    "list": lambda found: [found],
    "text": lambda found: "tenfold",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_configuration_of_wrong_types_is_refused(call, folded, tmp_path, kind):
    change_site(folded, WRONG[kind])
    status, _, err = call("export", folded, "--to", "dense", "-o", tmp_path / "dense")
    assert status == 2 and "folded" in said(err) and not (tmp_path / "dense").exists(), (status, err[-300:])


@pytest.mark.parametrize("value", [[], 3, ["Nothing"], ["Path"], [None], "x", {}], ids=str)
def test_architectures_that_name_no_model_are_refused(call, folded, tmp_path, value):
    config = json.loads((folded / "config.json").read_text())
    (folded / "config.json").write_text(json.dumps(config | {"architectures": value}))
    status, _, err = call("export", folded, "--to", "dense", "-o", tmp_path / "dense")
    assert status == 0 if value == [] else (status == 2 and "folded" in said(err)), (status, err[-300:])


INDEXES = ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}', "", "[" * 5000]
OUTSIDE = ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", ".", ""]


@pytest.mark.parametrize("command", ["export", "compress"])
@pytest.mark.parametrize(
    "raw", [*INDEXES, *(json.dumps({"weight_map": {"a": name}}) for name in OUTSIDE)], ids=lambda raw: raw[:40]
)
def test_index_files_of_other_types_and_names_outside_are_refused(call, kept, llama, tmp_path, raw, command):
    shutil.move(llama / "model.safetensors", tmp_path / "secret.safetensors")
    (llama / "model.safetensors.index.json").write_text(raw)
    more = ("--keep", 0.8, "--calibrate", llama / "text.txt") if command == "compress" else ("--to", "dense")
    status, _, err = call(command, llama, "-o", tmp_path / "out", *more)
    assert status == 2 and "model.safetensors.index.json" in said(err), (status, err[-300:])


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_a_model_larger_than_its_files_is_refused_before_its_memory_is_asked_for(call, llama, monkeypatch, key):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {key: 10**12}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("was loaded"))
    status, _, err = call("generate", llama, "the old", "--max-new-tokens", 2)
    assert status == 2 and "config.json describes a model of" in said(err), (status, err[-300:])


@pytest.mark.parametrize("raw", ["", "{}", "[]", "3", '{"model": {"type": "BPE"}}', "[" * 5000])
def test_a_damaged_tokenizer_is_named(call, llama, raw):
    (llama / "tokenizer.json").write_text(raw)
    status, _, err = call("generate", llama, "the old", "--max-new-tokens", 2)
    assert status == 2 and "tokenizer.json" in said(err), (status, err[-300:])


def test_a_damaged_checkpoint_is_not_resumed(call, llama, tmp_path, monkeypatch):
    from tenfold.train.trainer import DivergenceGuardTrainer

    given = ("heal", llama, "--text", llama / "text.txt", "--loss", "cross_entropy=1", "--steps", 4)
    given += ("--tokens-per-step", 64, "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            "tenfold.models.model_card.save_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("room"))
        )
        patch.setattr(
            "tenfold.checkpoint_jobs.save_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("room"))
        )
        assert call(*given)[0] == 2 and DivergenceGuardTrainer
    weights = next((tmp_path / "out.partial" / "checkpoints").glob("checkpoint-*/model.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)
    weights.write_bytes(raw)
    status, _, err = call(*given)
    assert status == 2 and "model.safetensors" in said(err), (status, err[-300:])


@pytest.mark.parametrize(
    "raw", ["[1]", "3", '{"command": 3}', '{"parameters": 7, "parameters_dense": 8}', '{"flops_per_token": []}', "{"]
)
def test_heal_reads_the_students_report_before_it_trains(call, llama, tmp_path, raw):
    (llama / "tenfold.json").write_text(raw)
    given = ("--loss", "cross_entropy=1", "--steps", 1, "--tokens-per-step", 64, "-o", tmp_path / "out")
    status, _, err = call("heal", llama, "--text", llama / "text.txt", *given)
    assert status == 2 and "tenfold.json" in said(err) and "step 1" not in err, (status, err[-300:])


# what others read: the model card, the terminal


MARKUP = [
    "<script>alert(1)</script>",
    "a\n\n# Heading",
    "[x](https://a.b)",
    "a | b",
    "```\n<b>\n",
    "![x](y)",
    "a\n---\nb: 1",
]


@pytest.mark.parametrize("evil", MARKUP)
def test_markup_does_not_reach_the_model_card(llama, tmp_path, evil):
    """A renderer of Markdown makes of a card with hostile words what it makes of one with harmless ones."""
    shapes, model = [], AutoModelForCausalLM.from_pretrained(llama)
    (llama / "README.md").write_text(
        f"---\ntags: [tenfold]\nbase_model: {json.dumps(evil)}\nlicense: {json.dumps(evil)}\n---\n"
    )
    for word in ("word", evil):
        scores = {"perplexity": 2.0, "bits_per_byte": 1.0, "tokens": 3, "text": {"files": [word], "sha256": word}}
        scores["protocol"] = {"text": word, "window": 8, "stride": 8, "normaliser": word}
        report = {"evaluation": scores, "counted": {"note": word, "bytes": 1, "dense_bytes": 2}}
        shutil.copyfile(llama / "config.json", tmp_path / "config.json")
        save_card(tmp_path, None, report, word, f"folder {word}", model.name_or_path)
        header, body = read_card(tmp_path / "README.md")
        assert header["license"] == header["base_model"] == evil and header["library_name"] == "transformers"
        assert header["model-index"][0]["results"][0]["dataset"]["name"] == word
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
        shapes.append([(x.type, [y.type for y in x.children or ()]) for x in tokens])
    assert shapes[0] == shapes[1]


EVIL = "\x1b]0;owned\x07\x1b[31m\u202e\x9b[/b]"


@pytest.mark.parametrize("where", ["recipe", "structure", "folder", "name", "text"])
def test_escapes_do_not_reach_the_terminal(call, folded, tmp_path, where):
    if where == "recipe":
        (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", EVIL: 1}))
        told = call("inspect", "gpt2-small", "--recipe", tmp_path / "r.yaml")
    elif where == "structure":
        change_site(folded, structured(kind=EVIL))
        told = call("inspect", folded)
    elif where == "text":
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + EVIL)
        told = call("evaluate", folded, "--text", tmp_path / "a.jsonl")
    else:
        told = call("inspect", tmp_path / EVIL if where == "folder" else EVIL)
    assert told[0] == 2 and not set(EVIL) & set(told[1] + told[2]) & set("\x1b\x07\u202e\x9b")


def test_tables_and_progress_write_escapes_out(capsys):
    output.show_table(["a"], [[EVIL], ["fine [bold]"]])
    list(output.Progress(EVIL)([1], EVIL))
    output.show_choices([{"item": EVIL, "chosen": EVIL, "parameters": 1, "of": 2, "loss": 1.0, "unit": EVIL}])
    told = "".join(capsys.readouterr())
    assert not set("\x1b\x07\u202e\x9b") & set(told) and "\\x1b]0;owned" in told and "[bold]" in told


def test_no_command_prints_by_itself():
    files = Path(tenfold_cli.__file__).parent.glob("*.py")
    assert sum(path.read_text().count("print(") for path in files) == 2  # of say and of the table


def test_code_of_a_model_never_runs(folded, tmp_path):
    config = json.loads((folded / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folded / "config.json").write_text(json.dumps(config))
    (folded / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Evil: pass\n"
    )
    status, err = run_limited(["inspect", folded], given="y\n" * 20)
    assert not (tmp_path / "ran").exists() and status == 2, (status, err[-300:])
    assert f"{folded} is of an architecture" in said(err) and "runs no such code" in said(err)


def test_code_of_a_model_runs_where_the_caller_trusts_it(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config |= {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (llama / "config.json").write_text(json.dumps(config))
    code = (
        f"import pathlib\nfrom transformers import LlamaForCausalLM\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    (llama / "mine.py").write_text(code + "class Mine(LlamaForCausalLM): pass\n")
    model = tenfold.from_pretrained(llama, trust_remote_code=True)
    assert type(model).__name__ == "Mine" and (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_never_runs(folded, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folded / "tokenizer_config.json").write_text(json.dumps(settings))
    (folded / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with suppress(ValueError):
        load_tokenizer(folded)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_with_more_than_tensors_is_refused(call, llama, tmp_path):
    (llama / "model.safetensors").unlink()
    torch.save({"a": Path("x")}, llama / "pytorch_model.bin")
    status, _, err = call("evaluate", llama, "--text", llama / "text.txt", "--window", 32)
    assert status == 2 and "pytorch_model.bin" in said(err), (status, err[-300:])


NOTES = ["", "[]", '{"recipe": 3}', "[" * 5000]


@pytest.mark.parametrize("raw", NOTES, ids=["empty", "list", "number", "deep"])
@pytest.mark.parametrize("command", ["compress", "heal", "finetune", "pretrain"])
def test_notes_of_other_types_are_refused(call, llama, tmp_path, raw, command):
    import toy_tasks

    out, text = tmp_path / "out", llama / "text.txt"
    if command == "compress":
        note, given = (
            tmp_path / "out.partial/unfinished/run.json",
            ("compress", llama, "--keep", 0.8, "--calibrate", text),
        )
    elif command == "heal":
        note = tmp_path / "out.partial/unfinished/run.json"
        given = ("heal", llama, "--text", text, "--loss", "cross_entropy=1", "--steps", 1)
    elif command == "finetune":
        toy_tasks.write_sst2(tmp_path, 8, 8)
        note, given = out / "finetune.json", ("finetune", llama, "--task", "sst2", "--data", tmp_path)
    else:
        sizes = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 16}
        recipe = {"name": "toy", "model": sizes, "tokenizer": {"vocab_size": 300}}
        recipe["train"] = {"tokens": 128, "batch_size": 4}
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        note, given = out / "run.json", ("pretrain", tmp_path / "r.yaml", "--data", text)
    note.parent.mkdir(parents=True)
    note.write_text(raw)
    status, _, err = call(*given, "-o", out)
    assert status == 2 and note.name in said(err), (status, err[-300:])
