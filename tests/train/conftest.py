"""A small model's folder, its tokenizer, and a text."""

from pathlib import Path

import pytest
import small

from tenfold.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def tokenizer():
    return train_tokenizer([small.text()], 300, 32)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(small.text())
    return tmp_path / "text.txt"
