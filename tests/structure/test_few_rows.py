"""A few rows times a large matrix go by parts of it; everything else as torch does it."""

import pytest
import torch

from tenfold.structure import few_rows


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (3,), (2, 2), (5,)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_of_torch(lead, bias, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, weight, added = torch.randn(*lead, 300), torch.randn(400, 300), torch.randn(400) if bias else None
    before, called = (None if added is None else added.clone()), []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: called.append(1) or bmm(*given))
    with torch.no_grad():
        found = few_rows.linear(x, weight, added)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, added), rtol=1e-4, atol=1e-4)
    assert len(called) == (lead != (5,)) and (added is None or torch.equal(added, before))


@pytest.mark.parametrize("change", ["gradients", "double", "odd", "small", "transposed"])
def test_what_it_is_not_for_is_left_to_torch(change, monkeypatch):
    monkeypatch.setattr(torch, "bmm", None)
    out = 401 if change == "odd" else 40 if change == "small" else 400
    x, weight = torch.randn(1, 300), torch.randn(out, 300)
    if change == "double":
        x, weight = x.double(), weight.double()
    if change == "transposed":
        weight = torch.randn(300, out).T
    with torch.set_grad_enabled(change == "gradients"):
        assert few_rows.linear(x, weight).shape == (1, out)
