"""Factors that layers share: the laws of their gradients, of a step, of a checkpoint, against dense twins in float64."""

import copy

import numpy as np
import pytest
import torch
import toys
from folding import fold, reference
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.densify import densify
from tenfold.nn import FactorizedLinear

TRAIN = {"kind": "tensor_train", "parts": 3, "rank": 4}
SHARE = {"factors": ["core_1"]}
BLOCK = ["attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "mlp.in", "mlp.gate", "mlp.out"]
each = pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])


def shared(name, source="noise", **more):
    """The toy with all matrices of its blocks folded, the central core of a role shared by its layers."""
    model = toys.build(name).double()
    present = {role for role in BLOCK if role in roles(model)}
    rules = [{"role": role, "structure": TRAIN, "share": SHARE, **more} for role in sorted(present)]
    fold(model, rules, source)
    spread(model)
    return model


def roles(model):
    from tenfold.models.sites import find_sites

    return {site.role for site in find_sites(model)}


@torch.no_grad()
def spread(model):
    """Factors that matter: adapters start at zero, and matrices of noise are small."""
    for _, layer in layers(model):
        for factor in layer.factors().values():
            factor.add_(0.2 * torch.randn_like(factor))


def layers(model):
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, FactorizedLinear)]


def loss(model):
    return model(**toys.inputs(model))[0].square().mean()


def matrix_gradient(dense, path):
    """``dL/dW (out, in)`` of the dense twin."""
    module = dense.get_submodule(path)
    gradient = module.weight.grad.numpy()
    return gradient.T if isinstance(module, Conv1D) else gradient


def core_gradients(layer, gradient):
    """The chain rule from ``dL/dW`` to the three cores of one site, in NumPy."""
    cores = [layer.factors()[f"core_{k}"].detach().numpy() for k in range(3)]
    letters = ["xacr", "rbds", "sefy"]
    outs, ins = layer.structure.outs, layer.structure.ins
    unfolded = gradient.reshape(*outs, *ins)
    return {
        f"core_{k}": np.einsum(
            f"abecdf,{','.join(letters[:k] + letters[k + 1 :])}->{letters[k].strip('xy')}",
            unfolded,
            *(core for j, core in enumerate(cores) if j != k),
        ).reshape(cores[k].shape)
        for k in range(3)
    }


@each
def test_gradients_of_shared_centres_are_the_sums_over_the_sites_of_the_dense_twin(name):
    assert sums_over_sites(shared(name), name) == len(layers(shared(name))) // 2  # two layers in every toy


@pytest.mark.parametrize(
    ("name", "roles"), [("bert", ["attn.q", "attn.k", "attn.v"]), ("llama", ["mlp.in", "mlp.gate"])]
)
@pytest.mark.parametrize("group", [None, 1])
def test_all_sites_of_a_rule_may_share_one_centre(name, roles, group):
    """Of several roles in several layers, or in groups of layers."""
    model = toys.build(name).double()
    share = SHARE | {"across": "all"} | ({"group": group} if group else {})
    fold(model, [{"role": roles, "structure": TRAIN, "share": share}], "noise")
    spread(model)
    assert sums_over_sites(model, name) == (2 if group else 1)


def sums_over_sites(model, name) -> int:
    """How many centres there are, whose gradients are the sums over the sites of the dense twin."""
    plain = copy.deepcopy(model)
    twin = reference(toys.build(name).double(), plain)
    loss(model).backward()
    loss(twin).backward()
    sums: dict[str, np.ndarray] = {}
    for path, layer in layers(model):
        expected = core_gradients(layer, matrix_gradient(twin, path))
        for side in ("core_0", "core_2"):
            np.testing.assert_allclose(getattr(layer, side).grad.numpy(), expected[side], atol=1e-10, rtol=0)
        key = layer.shared["core_1"]
        sums[key] = sums.get(key, 0) + expected["core_1"]
    container = layers(model)[0][1]._container[0]
    assert sums.keys() == dict(container.named_parameters()).keys()
    for key, expected in sums.items():
        assert np.abs(expected).max() > 1e-8
        np.testing.assert_allclose(container.get_parameter(key).grad.numpy(), expected, atol=1e-10, rtol=0)
    return len(sums)


@each
def test_a_checkpoint_holds_one_copy_and_training_goes_on_alike(name, tmp_path):
    from safetensors import safe_open

    model = shared(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = list(file.keys())
    assert sum("core_1" in key for key in stored) == len(layers(model)) // 2  # two layers in every toy
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    # the last bit depends on where in memory a matrix begins
    torch.testing.assert_close(toys.logits(again), toys.logits(model), rtol=0, atol=1e-13)
    for side in (model, again):
        optimizer = torch.optim.SGD(side.parameters(), lr=0.1)
        loss(side).backward()
        optimizer.step()
    torch.testing.assert_close(toys.logits(again), toys.logits(model), atol=1e-10, rtol=0)
    base = AutoModel.from_pretrained(tmp_path)
    assert len({layer.factors()["core_1"].data_ptr() for _, layer in layers(base)}) == len(layers(model)) // 2


@each
def test_unfolded_each_layer_gets_a_matrix_of_its_own(name):
    model = shared(name)
    before = toys.logits(model)
    densify(model)
    assert not any("shared" in key for key in model.state_dict())
    torch.testing.assert_close(toys.logits(model), before, atol=1e-10, rtol=0)


@pytest.mark.parametrize("source", ["weights", "noise"])
def test_adapters_start_at_zero_and_can_learn(source):
    """Both factors zero, or nearly, would never leave that place."""
    model = toys.build("gpt2")
    full = {"kind": "tensor_train", "parts": 5, "rank": "full"}
    fold(model, [{"role": "mlp.in", "structure": full, "share": {"factors": ["core_2"]}, "adapter_rank": 4}], source)
    loss(model).backward()
    for _, layer in layers(model):
        assert not layer.part_1_left.any() and layer.part_1_right.std() > 0.1 * 32**-0.5
        assert layer.part_1_left.grad.abs().max() > 1e-6
