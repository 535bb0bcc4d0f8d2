"""A small model's folder and its tokenizer."""

import pytest
import small

from tenfold.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def tokenizer():
    return train_tokenizer([small.text()], 300, 32)
