"""Reading text, packed and not, and what is said about files that are none."""

import gzip
import json
import lzma

import pytest

from tenfold.evaluate.text import documents

DOCS = ["one\ntwo", "drei Äpfel"]
LINES = "".join(json.dumps({"text": doc}) + "\n" for doc in DOCS)


@pytest.mark.parametrize(("name", "opener"), [("a.jsonl", open), ("a.jsonl.xz", lzma.open), ("a.jsonl.gz", gzip.open)])
def test_json_lines(tmp_path, name, opener):
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(LINES)
    assert list(documents([tmp_path / name])) == DOCS


def test_a_plain_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert list(documents([tmp_path / "a.txt"])) == ["one\n\ntwo"]


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.txt"):
        list(documents([tmp_path / "gone.txt"]))


def test_a_line_without_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"title": "no text"}\n')
    with pytest.raises(ValueError, match="line 2, is not a JSON object with a"):
        list(documents([tmp_path / "a.jsonl"]))


def test_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(documents([tmp_path / "a.txt"]))
