"""Cached teachers: their losses are those of live ones, and unfinished or other caches are not used."""

import copy

import numpy as np
import pytest
import small
import torch
from runs import Killed
from transformers import AutoModelForCausalLM

from tenfold.api import compress
from tenfold.models.distillation_config import Heal
from tenfold.train.chunked_head import ChunkedHead
from tenfold.train.distillation import Distillation
from tenfold.train.heal import heal
from tenfold.train.teacher import weights_digest
from tenfold.train.teacher_cache import TeacherCache, make_manifest
from tenfold.train.tokenizer import train_tokenizer

LOW = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]}


def windows_of(number=7, length=8, vocabulary=300):
    ids = torch.randint(0, vocabulary, (number, length))
    return [{"input_ids": row, "labels": row} for row in ids]


def stored_in(path, teacher, windows, k, temperature=1.0, **more):
    made_from = {"top_k": k, "vocabulary": 300, "window": 8, "temperature": temperature}
    cache = TeacherCache(path, made_from, windows)
    cache.fill(ChunkedHead(teacher), 2, 5, **more)
    return cache


def losses_of(student, teacher, data, name, temperature):
    batch = {key: torch.stack([data[k][key] for k in range(len(data))]) for key in data[0]}
    settings = Heal(losses={name: 1.0}, temperature=temperature, chunk=6)
    return float(Distillation(student, teacher, settings)(**batch)["loss"].detach())


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("cross_entropy", 1.0), *((name, heat) for name in ("kl", "reverse_kl", "jensen_shannon") for heat in (1.0, 2.0))],
)
def test_a_stored_teacher_of_all_tokens_is_the_live_one(tmp_path, name, temperature):
    student, teacher, windows = small.model(seed=1), small.model(), windows_of()
    data = stored_in(tmp_path / "store", teacher, windows, 300, temperature)
    live = losses_of(student, teacher, windows, name, temperature)
    assert losses_of(student, None, data, name, temperature) == pytest.approx(live, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_stored_teacher_of_some_tokens_has_one_class_for_the_rest(tmp_path, temperature):
    student, teacher, windows = small.model(seed=1), small.model(), windows_of(3)
    data = stored_in(tmp_path / "store", teacher, windows, 5, temperature)
    total = 0.0
    for row in windows:
        ids = row["input_ids"][None]
        with torch.no_grad():
            q, p = (np.float64(m(input_ids=ids).logits[0].double().numpy()) / temperature for m in (student, teacher))
        for t in range(7):
            a, b = np.exp(p[t]) / np.exp(p[t]).sum(), np.exp(q[t]) / np.exp(q[t]).sum()
            top = np.argsort(-a)[:5]
            a, b = ([*x[top], 1 - x[top].sum()] for x in (a, b))
            total += temperature**2 * sum(x * np.log(x / y) for x, y in zip(a, b, strict=True)) / 21
    assert losses_of(student, None, data, "kl", temperature) == pytest.approx(total, rel=1e-3)
    assert data.log_probabilities.dtype == np.float16


def test_an_interrupted_store_goes_on_and_is_never_taken_for_a_finished_one(tmp_path):
    teacher, windows, seen = small.model(), windows_of(), []

    def interrupted(items):
        for number, item in enumerate(items):
            if number == 2:
                raise Killed
            yield item

    with pytest.raises(Killed):
        stored_in(tmp_path / "store", teacher, windows, 5, progress=interrupted)
    with pytest.raises(ValueError, match="was made from something else \\(top_k is 5 there and 6 here\\); give"):
        stored_in(tmp_path / "store", teacher, windows, 6)
    made_from = {"top_k": 5, "vocabulary": 300, "window": 8, "temperature": 1.0}
    assert not TeacherCache(tmp_path / "store", made_from, windows).finished
    one = stored_in(tmp_path / "store", teacher, windows, 5, progress=lambda items: seen.extend(items) or seen)
    assert one.finished and seen == [4, 6], "the first two batches of two were there"
    other = stored_in(tmp_path / "once", teacher, windows, 5)
    for key in ("ids", "log_probabilities"):
        assert np.array_equal(getattr(one, key), getattr(other, key))


def test_a_store_without_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match=r"the store needs 0\.0 GB .* lower top_k from 5"):
        stored_in(tmp_path / "store", small.model(), windows_of(), 5)
    assert not list((tmp_path / "store").iterdir())


def test_a_store_of_something_else_is_refused(tmp_path, tokenizer):
    tokens, windows = np.arange(40), windows_of()
    given = {
        "teacher": "abc",
        "tokenizer": tokenizer,
        "tokens": tokens,
        "window": 8,
        "temperature": 1.0,
        "k": 5,
        "vocabulary": 300,
    }
    (tmp_path / "store").mkdir()  # an empty folder may be there
    TeacherCache(tmp_path / "store", make_manifest(**given), windows)
    for other, word in [
        ({"teacher": "abd"}, "teacher is abc there and abd here"),
        ({"tokenizer": train_tokenizer(["entirely different words"], 270, 32)}, "tokenizer is "),
        ({"tokens": tokens + 1}, "text is "),
        ({"window": 16}, "window is 8 there and 16 here"),
        ({"temperature": 2.0, "k": 6}, "temperature is 1.0 there and 2.0 here; top_k is 5 there"),
        ({"k": 301}, "the 301 likeliest tokens can't be stored: take from 1 to the vocabulary's 300"),
    ]:
        with pytest.raises(ValueError, match=word):
            TeacherCache(tmp_path / "store", make_manifest(**given | other), windows)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no store"):
        TeacherCache(tmp_path / "mine", make_manifest(**given), windows)


def test_the_second_healing_reads_the_store_and_no_teacher(folder, tokenizer, tmp_path, monkeypatch):
    student, settings = AutoModelForCausalLM.from_pretrained(folder), Heal(steps=2, tokens_per_step=64)
    compress(student, LOW)
    again = copy.deepcopy(student)
    given = {"store": tmp_path / "store", "top_k": 10}
    first = heal(student, folder, tokenizer, [folder / "text.txt"], settings, **given)
    monkeypatch.setattr("tenfold.train.heal.load_teacher", None)
    second = heal(again, folder, tokenizer, [folder / "text.txt"], settings, **given)
    assert first["curve"] == second["curve"]
    with pytest.raises(ValueError, match=r"made from something else \(window is 32 there and 16 here.*another folder"):
        heal(again, folder, tokenizer, [folder / "text.txt"], settings, window=16, **given)
    for name in ("hidden", "attention", "embedding"):
        with pytest.raises(
            ValueError, match=f"not the hidden states and attention that {name} compare: leave the store out"
        ):
            heal(again, folder, tokenizer, [folder / "text.txt"], Heal(losses={name: 1.0}), **given)


def test_weights_have_one_fingerprint_in_memory_and_on_disk(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert weights_digest(model) == weights_digest(folder)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert weights_digest(model) != weights_digest(folder)
