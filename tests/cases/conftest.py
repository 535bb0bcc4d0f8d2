"""A small Llama with its tokenizer and a text, and the commands, run in this process."""

import json

import pytest
import small
import toy_tasks
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="package")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model, tokenizer = toy_tasks.llama()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(small.text(1500, seed=1))
    return folder


@pytest.fixture
def llama(kept, tmp_path):
    """A copy that a test may change."""
    import shutil

    return shutil.copytree(kept, tmp_path / "llama")


class Folder:
    """Changes of the files of a model folder."""

    @staticmethod
    def configure(folder, remove=(), **values):
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))

    @staticmethod
    def tensors(folder, change):
        """Replace the tensors by what ``change`` makes of them."""
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.fixture
def files():
    return Folder
