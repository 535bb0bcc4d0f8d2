"""Every test: offline, seeded, on one thread."""

import os
import sys
from importlib import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that reads it: no test may need the network

import jaxtyping
import pytest
import shapes
import torch

import tenfold_cli

jaxtyping.jaxtyped = shapes.where_said  # before the package is imported

torch.set_num_threads(1)  # tiny tensors: a second thread only costs, and spins where the machine is busy


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def calibration_in_float32():
    """Laws are held to more digits than bfloat16 has; a test that is about it says so."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tenfold.compression.activations", "tenfold.baselines.minitron"):
            patch.setattr(import_module(name), "in_bfloat16", lambda precision, device: precision == "bfloat16")
        yield


@pytest.fixture
def call(monkeypatch, capsys):
    """Return the function that runs a command and returns exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tenfold", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            tenfold_cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run
