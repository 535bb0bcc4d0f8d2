"""Factors that are one tensor, or whose gradients would lie in one memory: each has a gradient of its own."""

import pytest
import torch

from tenfold.structure import CustomEinsum, LowRank, Scattered, Sum

SQUARE = LowRank(out_features=16, in_features=16, rank=16)
ALIASED = {
    "low_rank": SQUARE,
    "placed": Scattered(base=SQUARE, out_features=16, in_features=16),
    "sum": Sum(parts=(SQUARE, SQUARE)),
}


@pytest.mark.parametrize("rows", [3, 300, 1100])
@pytest.mark.parametrize("name", ALIASED)
def test_one_tensor_in_two_places_is_differentiated_again(name, rows):
    """Second derivatives of ``x @ W(a).T`` with every factor the same ``a``, against torch's through a plain matrix."""
    structure = ALIASED[name]
    a = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    x = torch.randn(rows, 16, dtype=torch.float64)
    order = {key: torch.randperm(16) for key in structure.index_shapes()}
    factors = dict.fromkeys(structure.factor_shapes(), a) | order

    def plain():
        w = a @ a if name != "sum" else 2 * a @ a
        if order:
            rows, columns = order.values()
            w = torch.zeros_like(w).index_put((rows[:, None], columns[None, :]), w)
        return x @ w.T

    found, expected = structure.apply(factors, x), plain()
    torch.testing.assert_close(found, expected)
    for y, store in ((found, got := []), (expected, wanted := [])):
        (first,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), a)
        store.extend((first, second))
    torch.testing.assert_close(got, wanted)


def test_a_label_of_one_factor_alone_between_maps_has_a_gradient():
    """Its gradient is the same number many times; parts of the rows add to it."""
    sizes = (("a", 256), ("c", 256), ("k", 8), ("j", 2))
    written = CustomEinsum(factors=(("f", ("a", "k", "j")), ("g", ("k", "c"))), outs=("a",), ins=("c",), sizes=sizes)
    structure = Scattered(base=written, out_features=256, in_features=256)
    factors = {k: v.requires_grad_(v.is_floating_point()) for k, v in structure.init(0.1, dtype=torch.float64).items()}
    x, learnt = torch.randn(1100, 256, dtype=torch.float64), [factors[k] for k in structure.factor_shapes()]
    found = torch.autograd.grad(structure.apply(factors, x).square().sum(), learnt)
    expected = torch.autograd.grad((x @ structure.dense(factors).T).square().sum(), learnt)
    torch.testing.assert_close(found, expected)
