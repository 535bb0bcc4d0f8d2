"""Text as it comes: marks and surrogates, names that lie, empty rows, and files that are large or made to be large."""

import gzip
import json
import lzma
import resource
import subprocess
import sys
import time

import pytest
import small

from tenfold.evaluation.text_files import documents
from tenfold.train.tokenizer import train_tokenizer

ROWS = [{"text": small.text(12, seed)} for seed in range(5)]
TEXTS = [row["text"] for row in ROWS]
CHAT = {"messages": [{"role": "user", "content": "who lived there?"}]}


def open_point(reason):
    return pytest.mark.xfail(strict=True, reason=f"issue 29: {reason}")


def write(path, rows, encoding="utf-8"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    return path


@pytest.fixture
def tokenizer():
    found = train_tokenizer([small.text()], 300, 32)
    found.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return found


@open_point("the mark at the beginning makes the first line no JSON")
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    file = write(tmp_path / name, ROWS, "utf-8-sig")
    assert list(documents([file])) == list(documents([write(tmp_path / f"plain-{name}", ROWS)]))


@open_point("half a character reaches the tokenizer, which raises UnicodeEncodeError")
@pytest.mark.parametrize("row", [{"text": "cut \ud83d here"}, {"messages": [{"role": "user", "content": "\ud83d"}]}])
def test_half_a_character_is_replaced_or_the_line_is_named(tmp_path, tokenizer, row):
    file = write(tmp_path / "a.jsonl", [*ROWS, row])
    try:
        assert all(text.encode() for text in documents([file], tokenizer))
    except ValueError as reason:
        assert "a.jsonl, line 6" in str(reason) and not isinstance(reason, UnicodeError)


PROSE = open_point("read as prose: braces and quotes")
NAMES = ["a.jsonl.GZ", *(pytest.param(name, marks=[PROSE]) for name in ("a.JSONL", "a.ndjson", "a.json"))]


@pytest.mark.parametrize("name", NAMES)
def test_json_under_other_names_is_read_or_refused(tmp_path, name):
    raw = json.dumps(ROWS) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / name).write_bytes(gzip.compress(raw.encode()) if name.endswith("GZ") else raw.encode())
    try:
        assert list(documents([tmp_path / name])) == TEXTS
    except ValueError as reason:
        assert name in str(reason) and not isinstance(reason, UnicodeError)


@open_point("every empty row is a document, and its end-of-text token is scored")
def test_empty_rows_are_no_documents(tmp_path):
    assert list(documents([write(tmp_path / "a.jsonl", [{"text": ""}, {"text": " \n"}, *ROWS])])) == TEXTS


REFUSED = {
    "no-messages": ({"messages": []}, "no file and line"),
    "messages-of-lists": ({"messages": [CHAT["messages"]]}, "a list of texts is taken for a text"),
    "no-object": (["text"], None),
    "no-content": ({"messages": [{"role": "user"}]}, None),
    "numbers": ({"text": 7}, None),
}


def each(cases):
    return [
        pytest.param(value, marks=[open_point(wrong)] if wrong else [], id=kind)
        for kind, (value, wrong) in cases.items()
    ]


@pytest.mark.parametrize("row", each(REFUSED))
def test_a_row_that_is_refused_is_named_with_its_line(tmp_path, tokenizer, row):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        assert all(isinstance(text, str) for text in documents([write(tmp_path / "a.jsonl", [CHAT, row])], tokenizer))


TEMPLATES = {
    "raises": ("{{ raise_exception('no') }}", None),
    "divides": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "calls": ("{{ messages[0].nothing() }}", None),
    "indexes": ("{{ messages[7]['content']['x'] }}", None),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "broken": ("{% for m in %}", None),
}


@pytest.mark.parametrize("template", each(TEMPLATES))
def test_a_chat_template_that_raises_is_one_sentence(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1"):
        list(documents([write(tmp_path / "a.jsonl", [CHAT])], tokenizer))


@open_point("RecursionError")
@pytest.mark.parametrize(
    "raw", ["[" * 5000, '{"text": ' * 5000, '{"text": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"]
)
def test_deep_json_lines_are_refused(tmp_path, raw):
    (tmp_path / "a.jsonl").write_text(raw + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1"):
        list(documents([tmp_path / "a.jsonl"]))


LIMITED = """
import resource, signal, sys, torch
from tenfold.evaluation.text_files import documents, token_stream
from tenfold.train.tokenizer import train_tokenizer
torch.set_num_threads(1)
tokenizer = train_tokenizer([open(sys.argv[2]).read()], 300, 32)
tokenizer.chat_template = "{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}{hostile}"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
signal.alarm(10)
try:
    print(len(token_stream(documents([sys.argv[1]], tokenizer), tokenizer, 4 * 32)))
except (ValueError, OSError) as reason:
    print(reason)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def read_limited(file, tmp_path, hostile=""):
    """Return what is said, and the peak of memory in MiB, where 128 tokens of ``file`` are asked for in a process of its own."""
    (tmp_path / "train.txt").write_text(small.text())
    command = [sys.executable, "-c", LIMITED.format(hostile=hostile), str(file), str(tmp_path / "train.txt")]

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)

    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 0, (done.returncode, done.stderr[-300:])
    *said, peak = done.stdout.strip().splitlines()
    return " ".join(said), int(peak)


@open_point("all of a document is tokenised, whatever is asked for")
@pytest.mark.parametrize("kind", ["plain", "json", "xz", "gz"])
def test_reading_goes_as_far_as_is_needed(tmp_path, kind):
    """128 tokens of megabytes: the memory of a few documents, in a plain file, one line, and compressed a thousandfold."""
    size = 4_000_000 if kind in ("plain", "json") else 40_000_000
    file, text = (
        tmp_path / {"plain": "a.txt", "json": "a.jsonl", "xz": "a.txt.xz", "gz": "a.txt.gz"}[kind],
        b"the old house ",
    )
    raw = text * (size // len(text))
    if kind == "json":
        raw = b'{"text": "' + raw + b'"}\n'
    file.write_bytes(
        {"xz": lambda: lzma.compress(raw, preset=0), "gz": lambda: gzip.compress(raw, 1)}.get(kind, lambda: raw)()
    )
    begun = time.monotonic()
    said, peak = read_limited(file, tmp_path)
    assert (said == "128" or file.name in said) and peak < 400, (said, peak)
    assert time.monotonic() - begun < 60


@open_point("a template may take all time and memory")
@pytest.mark.parametrize(
    "hostile",
    ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 3000000000 }}"],
)
def test_hostile_chat_templates_are_stopped(tmp_path, hostile):
    said, peak = read_limited(write(tmp_path / "a.jsonl", [CHAT]), tmp_path, hostile.replace("\n", ""))
    assert "a.jsonl" in said and peak < 2000
