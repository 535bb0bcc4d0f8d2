"""Reading text, compressed or not, and errors for other files."""

import gzip
import json
import lzma
import sys
from types import SimpleNamespace

import pytest

from tenfold.evaluation.text_files import documents

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


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.jsonl.gz"])
@pytest.mark.parametrize("cut", [slice(-9), slice(40, None)])
def test_a_damaged_file(tmp_path, name, cut):
    pack = lzma.compress if name.endswith("xz") else gzip.compress
    (tmp_path / name).write_bytes(pack(b'{"text": "one two"}\n' * 99)[cut])
    with pytest.raises(ValueError, match=f"{name} is cut off, or not what"):
        list(documents([tmp_path / name]))


def test_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(documents([tmp_path / "a.txt"]))


class Chatty:
    """A tokenizer with a chat template."""

    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def test_messages_go_through_the_template(tmp_path):
    line = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"text": "plain"}) + "\n")
    assert list(documents([tmp_path / "a.jsonl"], Chatty())) == ["<user>hello<assistant>hi", "plain"]


@pytest.mark.parametrize("tokenizer", [None, object()])
def test_messages_need_a_template(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="line 1, holds messages, but there is no tokenizer with a chat template"):
        list(documents([tmp_path / "a.jsonl"], tokenizer))


def test_messages_without_roles(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"who": "me"}]}\n')
    with pytest.raises(
        ValueError, match=r"line 1, .* that the chat template of the tokenizer refuses \(KeyError: 'role'\)"
    ):
        list(documents([tmp_path / "a.jsonl"], Chatty()))


def test_a_data_set_of_a_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(documents(["hf://datasets/owner/name/small"])) == ["one", "two"]
    assert asked == [(("owner/name", "small"), {"split": "train", "streaming": True})]


def test_a_data_set_needs_a_name_and_the_library(monkeypatch):
    with pytest.raises(ValueError, match="names no data set"):
        list(documents(["hf://datasets/name"]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'tenfold\[hub\]'"):
        list(documents(["hf://datasets/owner/name"]))


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(
        ValueError, match=r"is a folder and no text; give files of text, for tokens those that they were made of"
    ):
        list(documents([tmp_path]))
