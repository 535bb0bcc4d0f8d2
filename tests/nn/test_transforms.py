"""Layers under torch.func and forward-mode derivatives, against the matrix of the definition, which is linear in each factor."""

import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from tenfold.nn import FactorizedLinear
from tenfold.nn.dense_cache import dense_cache

sys.path.append(str(Path(__file__).parents[1] / "structure"))
from cases import ALL, each, factors_of
from oracle import matrix

F64 = torch.float64


def layer_of(structure):
    one = FactorizedLinear(structure, dtype=F64)
    one.set_factors(factors_of(structure))
    torch.nn.init.normal_(one.bias)
    return one.eval()


def given(structure, rows):
    """A layer, its parameters, an input, directions of both, and what the definition says of the derivative along them."""
    torch.manual_seed(0)
    one = layer_of(structure)
    parameters = {name: value.detach() for name, value in one.named_parameters()}
    along = {name: torch.randn_like(value) for name, value in parameters.items()}
    x, dx = torch.randn(2, rows, structure.shape[1], dtype=F64)
    factors = factors_of(structure)
    w = torch.from_numpy(matrix(structure, factors))
    expected = dx @ w.T + along["bias"]
    for name in structure.factor_shapes():  # W is affine in every factor
        one_way, nothing = (matrix(structure, factors | {name: f}) for f in (along[name], 0 * along[name]))
        expected = expected + x @ torch.from_numpy(one_way - nothing).T
    return one, parameters, x, along, dx, w, expected


@pytest.mark.parametrize("rows", [1, 300])
@each(ALL)
def test_derivatives_along_a_direction(structure, rows):
    one, parameters, x, along, dx, w, expected = given(structure, rows)

    def call(p, x):
        return functional_call(one, p, (x,))

    y, forward = jvp(call, (parameters, x), (along, dx))
    torch.testing.assert_close(y, x @ w.T + parameters["bias"])
    torch.testing.assert_close(forward, expected)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(value, along[name]) for name, value in parameters.items()}
            made = forward_ad.unpack_dual(call(duals, forward_ad.make_dual(x, dx)))
            torch.testing.assert_close(made.tangent, expected)
    upstream = torch.randn_like(y)
    back, back_x = grad(lambda p, x: (call(p, x) * upstream).sum(), (0, 1))(parameters, x)
    torch.testing.assert_close(back_x, upstream @ w)
    along_back = sum((back[name] * along[name]).sum() for name in along) + (back_x * dx).sum()
    torch.testing.assert_close(along_back, (upstream * expected).sum())


@pytest.mark.parametrize("limit", [0, 2**40])
@each(ALL)
def test_many_at_once(structure, limit):
    one, parameters, x, along, _, w, _ = given(structure, 5)
    several = torch.stack((x, 2 * x, x - 1))
    with torch.no_grad(), dense_cache(one, limit):
        torch.testing.assert_close(vmap(one)(several), several @ w.T + parameters["bias"])
        models = {name: torch.stack((value, along[name])) for name, value in parameters.items()}
        made = vmap(lambda p: functional_call(one, p, (x,)))(models)
    torch.testing.assert_close(made[0], x @ w.T + parameters["bias"])
    with torch.no_grad():
        torch.testing.assert_close(made[1], functional_call(one, along, (x,)))
