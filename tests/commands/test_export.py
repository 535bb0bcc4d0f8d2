"""The command export: from a compressed folder to one that loads without tenfold."""

import sys

import pytest
import small
import torch
from transformers import AutoModelForCausalLM

import tenfold
import tenfold_cli


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["tenfold", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        tenfold_cli.main()
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out, printed.err


def test_export_writes_a_folder_and_says_where(tmp_path, monkeypatch, capsys):
    small.folder(tmp_path / "dense")
    compress = ("compress", tmp_path / "dense", "-o", tmp_path / "small", "--structure", "low_rank", "--keep", "0.8")
    assert call(monkeypatch, capsys, *compress)[0] == 0
    status, out, _ = call(monkeypatch, capsys, "export", tmp_path / "small", "--to", "dense", "-o", tmp_path / "out")
    assert (status, "README.md there says how to load it" in out) == (0, True)
    plain, model = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tenfold.load(str(tmp_path / "small"))[0]
    ids = torch.arange(12).reshape(1, 12)
    torch.testing.assert_close(plain(ids).logits, model.cpu()(ids).logits, atol=1e-4, rtol=1e-4)
    status, _, error = call(monkeypatch, capsys, "export", tmp_path / "small", "--to", "pdf", "-o", tmp_path / "more")
    assert (status, "there is no format 'pdf'" in error) == (2, True)
