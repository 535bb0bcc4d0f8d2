"""Truncation of the ranks of tensor trains, one bond at a time."""

import copy

import numpy as np
import pytest
import torch
from models import toys

from tenfold.compression.compress import compress
from tenfold.models.recipe import Squeeze
from tenfold.structure import TensorTrain

FULL = {"kind": "tensor_train", "parts": 3, "rank": "full"}
ROLES = ["attn.qkv", "mlp.in", "mlp.out"]


def folded(roles=ROLES, **more):
    model = toys.build("gpt2")
    return compress(model, {"replace": [{"role": roles, "structure": FULL, **more}]})[0]


def squeezed(model, **how):
    return compress(copy.deepcopy(model), {"squeeze": {"role": ROLES} | how})


def unfolded(weight: np.ndarray, structure: TensorTrain, bond: int) -> np.ndarray:
    """Return ``W`` as a matrix between the cores up to ``bond`` and those behind it, by index arithmetic."""
    d = len(structure.outs)
    tensor = weight.reshape(*structure.outs, *structure.ins)
    pairs = [axis for k in range(d) for axis in (k, d + k)]
    rows = int(np.prod([structure.outs[k] * structure.ins[k] for k in range(bond + 1)]))
    return tensor.transpose(pairs).reshape(rows, -1)


@pytest.fixture(params=[(4, 6, 2), (2, 3, 2, 4)])
def train(request):
    outs = request.param
    ins = outs[::-1]
    structure = TensorTrain(outs=outs, ins=ins, ranks=tuple(5 + k for k in range(len(outs) - 1)))
    return structure, structure.init(1.0, torch.Generator().manual_seed(0), torch.float64)


def test_the_spectrum_of_a_bond_is_that_of_the_unfolded_matrix(train):
    structure, factors = train
    weight = structure.dense(factors).numpy()
    for bond, rank in enumerate(structure.ranks):
        expected = np.linalg.svd(unfolded(weight, structure, bond), compute_uv=False)[:rank]
        found = structure.spectrum(factors, bond).numpy()
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-9)


def test_a_cut_is_the_nearest_and_changes_two_cores(train):
    structure, factors = train
    before = structure.dense(factors).numpy()
    for bond in range(len(structure.ranks)):
        shorter, cut = structure.truncate_bond(factors, bond, 3)
        assert shorter.ranks[bond] == 3
        assert shorter.ranks[:bond] + shorter.ranks[bond + 1 :] == structure.ranks[:bond] + structure.ranks[bond + 1 :]
        u, s, v = np.linalg.svd(unfolded(before, structure, bond), full_matrices=False)
        nearest = (u[:, :3] * s[:3]) @ v[:3]
        np.testing.assert_allclose(unfolded(shorter.dense(cut).numpy(), structure, bond), nearest, atol=1e-9)
        same = {name for name in factors if torch.equal(factors[name], cut[name])} if shorter != structure else set()
        assert same == set(factors) - {f"core_{bond}", f"core_{bond + 1}"}


def test_bonds_that_are_not_full_may_be_cut():
    """Cores with bonds wider than their sides do not divide by zero."""
    structure = TensorTrain(outs=(2, 2), ins=(1, 2), ranks=(7,))
    factors = structure.init(1.0, torch.Generator().manual_seed(0), torch.float64)
    shorter, cut = structure.truncate_bond(factors, 0, 2)
    torch.testing.assert_close(shorter.dense(cut), structure.dense(factors), atol=1e-9, rtol=0)


def test_every_cut_is_at_the_bond_of_the_least_error():
    model = folded()
    dense = {path: module.dense().detach().double().numpy() for path, module in trains(model)}
    errors = {}
    for path, module in trains(model):
        for bond, rank in enumerate(module.structure.ranks):
            values = np.linalg.svd(unfolded(dense[path], module.structure, bond), compute_uv=False) ** 2
            errors[path, bond] = np.sqrt(values[rank // 2 :].sum() / values.sum())
    after, report = squeezed(model)
    (path, bond) = min(errors, key=errors.get)
    (changed,) = [
        p for (p, now), (_, was) in zip(trains(after), trains(model), strict=True) if now.structure != was.structure
    ]
    assert changed == path
    was, now = (m.get_submodule(path).structure.ranks for m in (model, after))
    assert [k for k in range(len(was)) if was[k] != now[k]] == [bond]
    (site,) = [site for site in report["sites"] if site["path"] == path]
    assert site["error"] == pytest.approx(errors[path, bond], rel=1e-4)
    assert site["after"] < site["before"]


def trains(model):
    return [(p, m) for p, m in model.named_modules() if isinstance(getattr(m, "structure", None), TensorTrain)]


def test_many_cuts_are_as_many_calls():
    model = folded()
    at_once = squeezed(model, bonds=4, rank_ratio=0.7)[0]
    for _ in range(4):
        model = squeezed(model, rank_ratio=0.7)[0]
    assert [m.structure for _, m in trains(at_once)] == [m.structure for _, m in trains(model)]
    torch.testing.assert_close(toys.logits(at_once), toys.logits(model))


def test_what_is_frozen_and_biases_stay(tmp_path):
    model = folded(freeze=["core_1"])
    after = squeezed(model, bonds=6)[0]
    for path, module in trains(after):
        assert module.frozen == ("core_1",)
        assert not module.core_1.requires_grad and module.core_0.requires_grad
        assert torch.equal(module.bias, model.get_submodule(path).bias)
    after.save_pretrained(tmp_path)
    again = type(after).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(toys.logits(again), toys.logits(after))


def test_what_can_not_be_squeezed_is_said():
    with pytest.raises(
        ValueError, match=r"no tensor train of role .* has a bond that can be cut; factorise these roles first"
    ):
        compress(toys.build("gpt2"), {"squeeze": {"role": "mlp.in"}})
    shared = folded(roles=["mlp.in"], share={"factors": ["core_1"]})
    with pytest.raises(ValueError, match="shares core_1 with others"):
        compress(shared, {"squeeze": {"role": "mlp.in"}})
    with pytest.raises(ValueError):
        Squeeze(role="mlp.in", rank_ratio=1.0)


def test_when_all_bonds_are_one_it_stops(tmp_path):
    model = compress(toys.build("gpt2"), {"replace": [{"role": "mlp.in", "structure": FULL | {"rank": 2}}]})[0]
    after = squeezed(model, bonds=50)[0]
    assert all(set(module.structure.ranks) == {1} for _, module in trains(after))
    after.save_pretrained(tmp_path)
    assert torch.equal(toys.logits(type(after).from_pretrained(tmp_path).eval()), toys.logits(after))


def test_a_bias_is_trained_as_before():
    after = squeezed(folded(freeze=["core_0"]), bonds=6)[0]
    assert all(module.bias.requires_grad and not module.core_0.requires_grad for _, module in trains(after))
