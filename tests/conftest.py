"""Every test: offline, seeded, two threads at most."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that reads it: no test may need the network

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))  # tiny tensors: more threads only cost


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test, whichever tests ran before it."""
    torch.manual_seed(0)
