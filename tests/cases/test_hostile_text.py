"""Text as it comes: marks and surrogates, names that lie, empty rows, and files that are large or made to be large."""

import gzip
import json
import lzma
import subprocess
import sys

import pytest
import small

from tenfold.evaluation import text_files
from tenfold.evaluation.text_files import documents, token_stream
from tenfold.train.tokenizer import train_tokenizer

ROWS = [{"text": small.text(12, seed)} for seed in range(5)]
TEXTS = [row["text"] for row in ROWS]
CHAT = {"messages": [{"role": "user", "content": "who lived there?"}]}


def write(path, rows, encoding="utf-8"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    return path


@pytest.fixture
def tokenizer():
    found = train_tokenizer([small.text()], 300, 32)
    found.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    file = write(tmp_path / name, ROWS, "utf-8-sig")
    assert list(documents([file])) == list(documents([write(tmp_path / f"plain-{name}", ROWS)]))


@pytest.mark.parametrize("row", [{"text": "cut \ud83d here"}, {"messages": [{"role": "user", "content": "\ud83d"}]}])
def test_half_a_character_is_replaced_or_the_line_is_named(tmp_path, tokenizer, row):
    file = write(tmp_path / "a.jsonl", [*ROWS, row])
    try:
        assert all(text.encode() for text in documents([file], tokenizer))
    except ValueError as reason:
        assert "a.jsonl, line 6" in str(reason) and not isinstance(reason, UnicodeError)


@pytest.mark.parametrize("name", ["a.jsonl.GZ", "a.JSONL", "a.ndjson", "a.json"])
def test_json_under_other_names_is_read_or_refused(tmp_path, name):
    raw = json.dumps(ROWS) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / name).write_bytes(gzip.compress(raw.encode()) if name.endswith("GZ") else raw.encode())
    try:
        assert list(documents([tmp_path / name])) == TEXTS
    except ValueError as reason:
        assert name in str(reason) and not isinstance(reason, UnicodeError)


def test_empty_rows_are_no_documents(tmp_path):
    assert list(documents([write(tmp_path / "a.jsonl", [{"text": ""}, {"text": " \n"}, *ROWS])])) == TEXTS


REFUSED = {
    "no-messages": {"messages": []},
    "messages-of-lists": {"messages": [CHAT["messages"]]},
    "no-object": ["text"],
    "no-content": {"messages": [{"role": "user"}]},
    "numbers": {"text": 7},
    "a-picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_a_row_that_is_refused_is_named_with_its_line(tmp_path, tokenizer, row):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        assert all(isinstance(text, str) for text in documents([write(tmp_path / "a.jsonl", [CHAT, row])], tokenizer))


TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "divides": "{{ 1 // 0 }}",
    "calls": "{{ messages[0].nothing() }}",
    "indexes": "{{ messages[7]['content']['x'] }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "broken": "{% for m in %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_raises_is_one_sentence(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1"):
        list(documents([write(tmp_path / "a.jsonl", [CHAT])], tokenizer))


@pytest.mark.parametrize(
    "raw", ["[" * 5000, '{"text": ' * 5000, '{"text": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"]
)
def test_deep_json_lines_are_refused(tmp_path, raw):
    (tmp_path / "a.jsonl").write_text(raw + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1"):
        list(documents([tmp_path / "a.jsonl"]))


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LIMITED = """
import json, resource, signal, sys, torch
from tenfold.evaluation.text_files import documents, token_stream
from tenfold.train.tokenizer import train_tokenizer
torch.set_num_threads(1)
tokenizer = train_tokenizer([open(sys.argv[1]).read()], 300, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
signal.alarm(60)
for file, template in json.loads(sys.argv[2]):
    tokenizer.chat_template = template
    try:
        print(len(token_stream(documents([file], tokenizer), tokenizer, 4 * 32)))
    except ValueError as reason:
        print(reason)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_reading_goes_as_far_as_is_needed_and_templates_are_stopped(tmp_path):
    """128 tokens of megabytes take the memory of a few documents: of a plain file, of one line, and compressed a thousandfold."""
    raw, files = b"the old house " * 300_000, {}
    files["a.txt"], files["a.jsonl"] = raw, b'{"text": "' + raw + b'"}\n'
    files["a.txt.xz"], files["a.txt.gz"] = lzma.compress(raw * 10, preset=0), gzip.compress(raw * 10, 1)
    for name, value in files.items():
        (tmp_path / name).write_bytes(value)
    jobs = [(str(tmp_path / name), "") for name in files]
    chat = write(tmp_path / "chat.jsonl", [CHAT])
    jobs += [(str(chat), template) for template in (NESTED, "{{ 'x' * 3000000000 }}", "{{ 'x' * 90000000 }}")]
    (tmp_path / "train").write_text(small.text())
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "train"), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-300:])
    *said, peak = done.stdout.strip().splitlines()
    assert said[:4] == ["128"] * 4
    assert all("chat.jsonl, line 1" in line for line in said[4:]) and len(said) == len(jobs)
    assert int(peak) < 700


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl"])
def test_a_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, tokenizer, monkeypatch, name):
    text = "\n".join(small.text(40, seed) for seed in range(30)) + "  x\n\n" + small.text(900)
    raw = json.dumps({"text": text}) if name.endswith("l") else text
    (tmp_path / name).write_bytes(lzma.compress(raw.encode()) if name.endswith("xz") else raw.encode())
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    monkeypatch.setattr(text_files, "PIECE", 64)
    pieces = list(documents([tmp_path / name] * 2))
    assert len(pieces) > 50 and max(map(len, pieces)) <= 128 and "".join(pieces) == text * 2
    assert token_stream(pieces, tokenizer).tolist() == whole * 2


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_bomb_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files, "SMALL", 2**16)
    (tmp_path / name).write_bytes(gzip.compress(b" \n" * 2**20))
    with pytest.raises(ValueError, match=rf"{name} expands to more than 200 times its size"):
        list(documents([tmp_path / name]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_line_is_bounded(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files, "LINE", 200)
    with pytest.raises(ValueError, match=rf"{name}.* 200 characters and more"):
        list(documents([write(tmp_path / name, [{"text": "a"}, {"text": "long " * 99}])]))


def test_a_byte_that_is_no_text_is_named_with_its_line(tmp_path):
    for name, end in (("a.txt", b""), ("a.jsonl", b'"}')):
        (tmp_path / name).write_bytes(b'{"text": "a"}\n' * 3 + b'{"text": "\xff' + end)
        with pytest.raises(ValueError, match=rf"{name}, line 4, is not UTF-8"):
            list(documents([tmp_path / name]))


def test_parts_of_a_message_are_joined(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "who "}, {"type": "text", "text": "lived there?"}]
    file = write(tmp_path / "a.jsonl", [CHAT, {"messages": [{"role": "user", "content": parts}]}])
    first, second = documents([file], tokenizer)
    assert first == second == "who lived there?"
