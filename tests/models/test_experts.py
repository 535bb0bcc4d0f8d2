"""Mixtures of experts: every matrix of every expert is a site, and what was taken apart is put together again."""

import copy
import re

import pytest
import torch
import toys
import transformers
from folding import LOW_RANK, fold
from transformers import AutoModelForCausalLM

from tenfold.models.cost import count, price
from tenfold.models.densify import densify
from tenfold.models.experts import unpack
from tenfold.models.sites import find_sites
from tenfold.nn import Experts, FactorizedLinear

every = pytest.mark.parametrize("name", toys.EXPERTS)
MLP = {"role": ["mlp.in", "mlp.gate", "mlp.out"], "structure": LOW_RANK}


@every
def test_taken_apart_a_model_computes_the_same_and_costs_the_same(name):
    model = toys.build(name)
    before, sites, cost = toys.logits(model), find_sites(model), price(model)
    assert any(".each.3.down" in site.path for site in sites)
    unpack(model)
    assert any(isinstance(module, Experts) for module in model.modules())
    assert not any("gate_up_proj" in key for key in model.state_dict())
    torch.testing.assert_close(toys.logits(model), before, atol=1e-5, rtol=0)
    assert find_sites(model) == sites
    assert price(model) == cost


def test_a_token_pays_for_the_experts_it_is_sent_to():
    model = toys.build("mixtral")  # 4 experts, each token to 2
    embed, attention, mlp, head = 0, 2 * (32 * 32 + 16 * 32), 2 * 3 * 32 * 48, 97 * 32
    assert price(model)["flops_per_token"]["1024"] == 2 * (embed + 2 * (attention + mlp) + head)


@every
def test_every_expert_is_folded_saved_read_and_unfolded(name, tmp_path):
    model = toys.build(name)
    dense = copy.deepcopy(model)
    changes = fold(model, [MLP])
    assert sum(".each." in path for path in changes) == (12 if name == "qwen3_moe" else 24)
    folded = toys.logits(model)
    assert not torch.allclose(folded, toys.logits(dense), atol=1e-3)
    model.save_pretrained(tmp_path / "folded")
    for loader in (AutoModelForCausalLM, getattr(transformers, toys.EXPERTS[name][0])):
        again = loader.from_pretrained(tmp_path / "folded").eval()
        assert torch.equal(toys.logits(again), folded)
        assert any(isinstance(module, FactorizedLinear) for module in again.modules())
    densify(model)
    assert count(model)["total"] == count(dense)["total"]
    assert model.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(toys.logits(model), folded, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not any(isinstance(module, Experts) for module in plain.modules())
    torch.testing.assert_close(toys.logits(plain), folded, atol=1e-5, rtol=0)


@every
def test_experts_share_a_factor(name, tmp_path):
    model = toys.build(name)
    before = count(model)["total"]
    rule = {"role": "mlp.in", "path": None, "structure": {"kind": "low_rank", "rank": 5}}
    fold(model, [rule | {"share": {"factors": ["right"], "across": "experts"}}])
    keys = {key for key in model.state_dict() if "shared_factors" in key}
    layers = {int(re.findall(r"_(\d+)_right", key)[0]) for key in keys}
    assert len(layers) == 2
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    for module in experts:
        ups = [expert.up for expert in module.each]
        assert len({factor.factors()["right"].data_ptr() for factor in (up for up in ups)}) == 1
        assert all(set(dict(up.named_parameters())) == {"left"} for up in ups)
    assert count(model)["total"] < before
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(toys.logits(again), toys.logits(model))


def test_sharing_all_of_alike_experts_loses_nothing():
    """Experts that are copies of one another share both factors of full rank."""
    model = toys.build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            for tensor in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                tensor.copy_(tensor[:1].expand_as(tensor))
    before = toys.logits(model)
    rule = {"role": ["mlp.out", "mlp.gate", "mlp.in"], "structure": {"kind": "low_rank", "rank": 32}}
    fold(model, [rule | {"share": {"factors": ["left", "right"], "across": "experts"}}])
    torch.testing.assert_close(toys.logits(model), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("structure", [LOW_RANK, {"kind": "tensor_train", "parts": 3, "rank": 4}])
def test_gradients_reach_every_expert_and_are_zero_where_none_asked(structure):
    """Sums of gradients over processes (FSDP2) need all of them in every process."""
    model = toys.build("mixtral").train()
    fold(model, [MLP | {"structure": structure}])
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    states, index = torch.randn(5, 32, requires_grad=True), torch.tensor([[0, 2]] * 5)
    experts(states, index, torch.full((5, 2), 0.5)).square().sum().backward()
    for number, expert in enumerate(experts.each):
        zero = [not p.grad.any() for p in expert.parameters()]
        assert all(zero) if number in (1, 3) else not any(zero)
