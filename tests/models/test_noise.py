"""Matrices from noise: how large they are, and how their parts are."""

import numpy as np
import pytest
import torch
from models import toys

import tenfold
from tenfold.models.initializers import DRAWS
from tenfold.models.plan import make_plan
from tenfold.models.recipe import load_recipe
from tenfold.models.sites import find_sites
from tenfold.models.surgery import replace
from tenfold.structure import BlockTensorTrain, LowRank, TensorTrain


def test_balanced_cores_are_orthonormal_and_the_last_one_has_the_norm():
    train = TensorTrain(outs=(4, 3, 5), ins=(3, 4, 2), ranks=(6, 10))
    factors = DRAWS["balanced"](train, 0.02, torch.Generator().manual_seed(0))
    for core in ("core_0", "core_1"):
        columns = factors[core].reshape(-1, factors[core].shape[-1])
        torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5, rtol=0)
    assert float(train.dense(factors).norm()) == pytest.approx(0.02 * np.sqrt(60 * 24), rel=1e-4)


def test_balanced_cores_have_no_more_columns_than_rows():
    """A bond of 12 behind 4 x 3 entries is the most."""
    DRAWS["balanced"](TensorTrain(outs=(4, 3, 5), ins=(3, 4, 2), ranks=(12, 10)), 0.02, None)
    for structure, message in (
        (
            TensorTrain(outs=(4, 3, 5), ins=(3, 4, 2), ranks=(13, 10)),
            "takes a bond of 12 behind core_0 at most, not 13",
        ),
        (LowRank(out_features=4, in_features=4, rank=2), "balanced is for tensor trains; low_rank takes noise or fans"),
    ):
        with pytest.raises(ValueError, match=message):
            DRAWS["balanced"](structure, 0.02, None)


def test_every_factor_by_its_own_fans():
    """``right (c b d r)`` makes ``b r`` of ``d`` numbers, ``left (b a c r)`` makes ``a`` of ``c r``."""
    structure = BlockTensorTrain(outs=(96, 16), ins=(24, 32), rank=4)
    factors = DRAWS["fans"](structure, 99.0, torch.Generator().manual_seed(0))
    assert float(factors["right"].std()) == pytest.approx(np.sqrt(1 / 32) * min(1, np.sqrt(16 * 4 / 32)), rel=0.05)
    assert float(factors["left"].std()) == pytest.approx(np.sqrt(1 / 96) * min(1, np.sqrt(96 / 96)), rel=0.05)


def drawn(name: str, start) -> torch.nn.Module:
    torch.manual_seed(0)
    model = toys.build(name)
    rule = {"role": ["mlp.in", "mlp.out", "attn.out"], "structure": {"kind": "low_rank", "rank": 8}, "start": start}
    replace(model, make_plan(model, load_recipe({"replace": [rule]})), source="noise")
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_entries_are_as_large_as_those_that_were_there(name):
    before = toys.build(name)
    after = drawn(name, "noise")
    for site in find_sites(after):
        if site.role in ("mlp.in", "mlp.out", "attn.out"):
            std = float(before.get_submodule(site.path).weight.detach().std())
            assert float(after.get_submodule(site.path).dense().detach().std()) == pytest.approx(std, rel=0.25)


def test_what_ends_a_branch_is_scaled_by_fans_too():
    """``sqrt(1 / in) min(1, sqrt(out / in)) / sqrt(2 layers)`` of the factor that is applied last, the other one as ever."""
    plain, scaled = (drawn("llama", {"fit": "fans", "options": options}) for options in ({}, {"branch": "scaled"}))
    for site in find_sites(scaled):
        if site.role in ("mlp.in", "mlp.out", "attn.out"):
            one, other = (model.get_submodule(site.path) for model in (plain, scaled))
            share = 1 if site.role == "mlp.in" else 1 / np.sqrt(2 * 2)
            torch.testing.assert_close(other.left, one.left * share)
            assert torch.equal(other.right, one.right)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"brnch": "zero"}, "the start fans of a new model has no option 'brnch'; there is branch"),
        ({"branch": "none"}, "branch of the start fans of a new model is 'none'; choose one of zero, scaled"),
    ],
)
def test_unknown_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        drawn("llama", {"fit": "fans", "options": options})


def test_a_start_that_is_none_is_not_drawn_as_noise():
    with pytest.raises(ValueError, match="there is no start 'fanz'; did you mean 'fans'"):
        drawn("llama", "fanz")


ALLOCATORS = {
    "role": "mlp.in",
    "structure": {"kind": "tensor_train", "parts": 3, "rank": "full"},
    "share": {"factors": ["core_1"]},
}
ALONE = {"role": "mlp.in", "structure": {"kind": "kronecker", "inner": [2, 2], "terms": 2}}


@pytest.mark.parametrize(
    ("rule", "start", "sentence"),
    [
        (ALONE, {"options": {"sweep": 3}}, "start nearest in the place of a matrix has no option 'sweep'; there is sweeps, tol"),
        (ALONE, {"options": {"tolerance": "1e-5"}}, "tolerance of the start nearest .* is '1e-5'; give one of type float"),
        (ALONE, {"options": {"sweeps": True}}, "sweeps of the start nearest .* is True; give one of type int"),
        (ALONE, {"fit": "van-loan", "options": {"sweeps": 3}}, "van-loan .* has no option 'sweeps'; there is none"),
        (ALONE, {"fit": "noise", "options": {"branch": "zero"}}, "noise .* has no option 'branch'; there is seed"),
        (ALLOCATORS, {"options": {"sweep": 3}}, "a fit to several matrices or to activations has no option 'sweep'"),
    ],
)  # fmt: skip
def test_unknown_options_in_the_place_of_a_matrix(rule, start, sentence):
    with pytest.raises(ValueError, match=sentence):
        tenfold.compress(toys.build("llama"), {"replace": [rule | {"start": start}]})


def test_a_tolerance_may_be_whole():
    tenfold.compress(toys.build("llama"), {"replace": [ALONE | {"start": {"options": {"tolerance": 1}}}]})


@pytest.mark.parametrize("branch", ["scaled", "zero"])
def test_what_ends_a_branch(branch):
    model = drawn("llama", {"fit": "noise", "options": {"branch": branch}})
    least = model.config.initializer_range / np.sqrt(2 * model.config.num_hidden_layers)
    for site in find_sites(model):
        if site.role in ("mlp.out", "attn.out"):
            matrix = model.get_submodule(site.path).dense()
            assert (
                not matrix.any() if branch == "zero" else float(matrix.detach().std()) == pytest.approx(least, rel=0.25)
            )
    if branch == "zero":
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        ends = [m for path, m in model.named_modules() if path.endswith(("o_proj", "down_proj"))]
        assert all(end.left.grad.any() for end in ends)
