"""Every test: offline, seeded, on one thread."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that reads it: no test may need the network

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only costs, and spins where the machine is busy


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test, whichever tests ran before it."""
    torch.manual_seed(0)
