"""Every test: offline, seeded, on one thread."""

import os
from importlib import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that reads it: no test may need the network

import jaxtyping
import pytest
import shapes
import torch

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
