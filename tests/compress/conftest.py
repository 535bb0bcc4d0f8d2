"""Fixtures of the tests of compression."""

import pytest
import torch

from tenfold.compression import fisher


@pytest.fixture
def known_draws(monkeypatch):
    """Draw the least likely token, few tokens at once, and a fixed direction where a random one is drawn."""
    monkeypatch.setattr(fisher, "DRAWN_TOKENS", 5)
    monkeypatch.setattr(torch, "multinomial", lambda chances, *more, **given: chances.argmin(-1, keepdim=True))
    monkeypatch.setattr(torch, "randn", lambda shape, **given: torch.linspace(-1, 1, shape[-1]).expand(shape))
