"""Order of hidden units: permutations leave the logits as they were, and the search never makes a fit worse."""

import pytest
import torch
import toys
from folding import LOW_RANK, fold
from transformers import AutoConfig, AutoModelForCausalLM

from tenfold.models.architectures import ARCHITECTURES, Architecture
from tenfold.models.invariances.hidden_units import hidden_weights, mlp_sites, order_hidden, permute_hidden
from tenfold.models.sites import find_sites
from tenfold.structure import BlockTensorTrain, Kronecker, LowRank


def build(name):
    return toys.shake(toys.build(name))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", toys.TOYS)
def test_hidden_units_in_any_order(name):
    model = build(name)
    before, logits = toys.snapshot(model), toys.logits(model)
    orders = {path: torch.randperm(sites[-1].shape[1]) for path, sites in mlp_sites(model).items()}
    assert permute_hidden(model, orders) is model
    close(toys.logits(model), logits)
    for site in find_sites(model):
        if site.role.startswith("mlp."):
            assert not torch.equal(model.state_dict()[f"{site.path}.weight"], before[f"{site.path}.weight"])
            if site.bias and site.role != "mlp.out":
                assert not torch.equal(model.state_dict()[f"{site.path}.bias"], before[f"{site.path}.bias"])


def test_only_the_named_mlp_is_permuted():
    model = build("llama")
    before, order = toys.snapshot(model), list(reversed(range(48)))
    permute_hidden(model, {"model.layers.1": order})
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], before[name][order])


def test_fused_matrices_are_permuted_half_by_half(monkeypatch):
    paths = {"mlp.in_gate": "layers.*.mlp.gate_up_proj", "mlp.out": "layers.*.mlp.down_proj"}
    monkeypatch.setitem(ARCHITECTURES, "phi3", Architecture(paths))
    torch.manual_seed(0)
    phi3 = toys.shake(AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **toys.GROUPED)))
    logits = toys.logits(phi3)
    permute_hidden(phi3, {path: torch.randperm(48) for path in mlp_sites(phi3)})
    close(toys.logits(phi3), logits)
    first, second, out = hidden_weights(phi3, "model.layers.1")
    assert torch.equal(torch.cat([first, second]).float(), phi3.model.layers[1].mlp.gate_up_proj.weight)
    assert torch.equal(out.T.float(), phi3.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (range(47), r"units of model.layers.1.* has shape \(47,\), but must hold each of 0 to 47"),
        ([0] * 48, r"^the order of the hidden units of model.layers.1.mlp.down_proj has shape"),
    ],
)
def test_orders_that_are_refused(order, message):
    model = build("llama")
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=message):
        permute_hidden(model, {"model.layers.0": list(reversed(range(48))), "model.layers.1": list(order)})
    assert toys.is_untouched(model, before)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            {"mlp.in": "layers.*.mlp.up_proj"},
            r"^model.layers.0.mlp.up_proj has no role mlp.out beside it; add it to the table",
        ),
        (
            {"mlp.in": "layers.*.self_attn.k_proj", "mlp.out": "layers.*.mlp.down_proj"},
            r"^the rows of model.layers.0.self_attn.k_proj alternate or are none of 48 units; leave their order$",
        ),
    ],
)
def test_tables_that_do_not_say_enough(monkeypatch, paths, message):
    monkeypatch.setitem(ARCHITECTURES, "llama", Architecture(paths))
    with pytest.raises(ValueError, match=message):
        permute_hidden(build("llama"), {"model.layers.0": list(range(48))})


def test_factorised_models_are_refused():
    model = build("llama")
    fold(model, [{"role": "mlp.in", "structure": LOW_RANK}])
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj is factorised: change the basis before compression"):
        permute_hidden(model, {"model.layers.0": list(range(48))})


@pytest.mark.parametrize(
    "structure", [Kronecker(outs=(6, 2), ins=(5, 2)), BlockTensorTrain(outs=(6, 2), ins=(5, 2), rank=1)]
)
def test_hidden_units_in_a_better_order(structure):
    factors = [structure.init(1.0, dtype=torch.float64) for _ in range(2)]
    if isinstance(structure, Kronecker):
        factors[1]["inner"] = factors[0]["inner"]
    exact = [structure.dense(each) for each in factors]
    mixed = torch.randperm(12)
    weights = [weight[mixed] + 0.01 * torch.randn(12, 10) for weight in exact]

    def loss(order):
        return sum(
            float((w[order] - structure.dense(structure.fit(w[order]))).square().sum())
            for w in (w.double() for w in weights)
        )

    order = order_hidden(weights, structure, rounds=10, starts=8)
    assert loss(order) < (0.05 if isinstance(structure, Kronecker) else 0.9) * loss(torch.arange(12))
    again = order_hidden([weight[order] for weight in weights], structure, rounds=1)
    assert sorted(again.tolist()) == list(range(12))
    assert loss(order[again]) <= loss(order)


def test_an_order_that_is_the_best_one_stays():
    """The search shares the inner factor, and so does not see that two of them fit exactly as they are."""
    structure = Kronecker(outs=(6, 2), ins=(5, 2))
    for _ in range(3):
        weights = [structure.dense(structure.init(1.0, dtype=torch.float64)) for _ in range(2)]
        order = order_hidden(weights, structure)
        assert all(float((structure.dense(structure.fit(w[order])) - w[order]).norm()) < 1e-6 for w in weights)


def test_orders_that_can_not_be_searched():
    with pytest.raises(ValueError, match=r"has no outs and ins, so that the order of its rows can't be searched"):
        order_hidden([torch.randn(12, 10)], LowRank(out_features=12, in_features=10, rank=2))
    with pytest.raises(ValueError, match=r"^a weight has shape \(10, 12\) but Kronecker.* is \(12, 10\)"):
        order_hidden([torch.randn(10, 12)], Kronecker(outs=(6, 2), ins=(5, 2)))
