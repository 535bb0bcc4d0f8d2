"""A loss computed in chunks has the value and gradients of the loss of all rows at once."""

import pytest
import torch

from tenfold.train.chunked_loss import sum_chunks


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_the_sum_and_its_gradients(size, again):
    torch.manual_seed(0)
    states, kept = torch.randn(7, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    one, other, third = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    unused = torch.ones(3, requires_grad=True)

    def run(part, rows):
        used = one + other if rows.start == 0 else one + other + third  # one gradient for two; one that comes later
        return (kept[rows] * (part @ used).tanh()).sum()

    parameters = [one, other, third, unused]
    expected = sum(run(states[k : k + size], slice(k, k + size)) for k in range(0, 7, size))
    wanted = torch.autograd.grad(2 * expected, [states, *parameters], allow_unused=True)
    found = sum_chunks(run, states, parameters, size, again)
    torch.testing.assert_close(found, expected)
    got = torch.autograd.grad(2 * found, [states, *parameters], allow_unused=True)
    for value, known in zip(got, wanted, strict=True):
        assert (value is None) == (known is None) and (value is None or torch.allclose(value, known))
    with torch.no_grad():
        torch.testing.assert_close(sum_chunks(run, states, parameters, size), expected)


def test_no_rows_are_a_loss_of_nothing():
    states, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    found = sum_chunks(lambda part, rows: (part @ weight).sum(), states, [weight], 3)
    found.backward()
    assert found == 0 and states.grad.shape == (0, 4) and weight.grad.abs().sum() == 0


def test_what_is_frozen_gets_no_gradient():
    states, weight = torch.ones(5, 4), torch.ones(4)
    assert not sum_chunks(lambda part, rows: (part @ weight).sum(), states, [weight], 3).requires_grad
