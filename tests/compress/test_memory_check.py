"""Warnings where memory is short."""

import copy
import re
import warnings
from types import SimpleNamespace

import plain
import psutil
import yaml
from models import toys

from tenfold.compression import memory_check
from tenfold.compression.compress import compress

RECIPE = {"replace": [{"prune": "mlp"}, {"prune": "attention"}], "budget": {"keep": 0.8, "of": "sites"}}


def said(monkeypatch, model, free: float, calibrate: dict | None = None) -> list[str]:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        compress(copy.deepcopy(model), RECIPE | {"calibrate": calibrate or {}}, text=plain.text(40))
    return [str(one.message) for one in found if "of memory are needed" in str(one.message)]


def test_what_is_advised_fits(monkeypatch):
    monkeypatch.setattr(memory_check, "STATES", 0)
    monkeypatch.setattr(memory_check, "LOGITS", 0)
    model = toys.build("llama")
    assert said(monkeypatch, model, 1e12) == []
    (told,) = said(monkeypatch, model, 1e3)
    assert told.endswith("and 1e-06 GB are free; close other programs")
    needed = float(re.search(r"about (\S+) GB", told)[1]) * 1e9
    (told,) = said(monkeypatch, model, 0.9 * needed)
    advised = yaml.safe_load(re.search(r"write (calibrate: {.*?}) into the recipe", told)[1])["calibrate"]
    assert 0 < sum(advised.values()) < plain.text(40).tokens
    assert said(monkeypatch, model, 0.9 * needed, advised) == []
