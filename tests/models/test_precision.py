"""In which numbers products are computed: not in those for which the machine has no instructions."""

import pytest
import small
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers.pytorch_utils import Conv1D

from tenfold.models import precision
from tenfold.train.optimizer import orthogonalize
from tenfold.train.pretrain import pretrain

RECIPE = {
    "name": "toy",
    "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32},
    "tokenizer": {"vocab_size": 300},
}


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("fast", [True, False])
def test_products_are_in_bfloat16_where_that_is_fast_or_asked_for(asked, fast, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: fast)
    (tmp_path / "text.txt").write_text(small.text())
    seen = set()

    def see(module, x, y):
        if isinstance(module, Conv1D) and not y.is_meta:  # what is only tried computes nothing
            seen.add(y.dtype)

    hook = register_module_forward_hook(see)
    train = {"batch_size": 4, "tokens": 256, "precision": asked}
    try:
        report = pretrain(RECIPE | {"train": train}, [tmp_path / "text.txt"], tmp_path / "run", device="cpu")
    finally:
        hook.remove()
    expected = "bfloat16" if fast and asked == "auto" else "float32" if asked == "auto" else asked
    assert report["precision"] == expected and seen == {getattr(torch, expected)}


@pytest.mark.parametrize("fast", [True, False])
def test_steps_of_muon_are_in_bfloat16_where_that_is_fast(fast, monkeypatch):
    monkeypatch.setattr("tenfold.train.optimizer.multiplies_bfloat16", lambda device: fast)
    assert orthogonalize(torch.randn(1, 4, 8)).dtype == (torch.bfloat16 if fast else torch.float32)
