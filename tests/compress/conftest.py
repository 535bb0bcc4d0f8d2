"""What the tests of compression have in common."""

import pytest
import torch

from tenfold.compress import fisher


@pytest.fixture
def known_draws(monkeypatch):
    """The least likely token where a model draws one, few tokens at once, and one direction where it draws a random one."""
    monkeypatch.setattr(fisher, "AT_ONCE", 5)
    monkeypatch.setattr(torch, "multinomial", lambda chances, *more, **given: chances.argmin(-1, keepdim=True))
    monkeypatch.setattr(torch, "randn", lambda shape, **given: torch.linspace(-1, 1, shape[-1]).expand(shape))
