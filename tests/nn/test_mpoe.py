"""Experts that share their central cores (MPOE): the mask on its gradient, one expert a token, the balancing loss."""

import copy

import numpy as np
import pytest
import torch
import toys
from folding import fold
from transformers import AutoModelForCausalLM

import tenfold
from tenfold.models.cost import inspect
from tenfold.models.recipe import load_recipe, parse_recipe
from tenfold.nn import Experts, FactorizedLinear, SharedFactors
from tenfold.structure import TensorTrain

TRAIN = {"kind": "tensor_train", "parts": 3, "mirror": True, "rank": "full"}
mixtures = pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])


def rules(mask=0.0):
    share = {"factors": ["core_1"], "across": "experts"} | ({"grad_dropout": mask} if mask else {})
    return [{"path": "experts.each.*", "structure": TRAIN, "share": share}]


def mixture(name="olmoe", source="noise", mask=0.0, **changes):
    """The toy ``name`` with one expert a token and the balancing loss in its loss, the experts' centres shared."""
    torch.manual_seed(0)
    config = toys.config(name, num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=0.1, **changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    fold(model, rules(mask), source)
    return model


def step(model, ids=None):
    ids = toys.inputs(model)["input_ids"] if ids is None else ids
    return model(input_ids=ids, labels=ids)


def centres(model) -> dict[str, torch.nn.Parameter]:
    return dict(model.model.shared_factors.named_parameters())


@mixtures
@pytest.mark.parametrize("source", ["noise", "weights"])
def test_the_experts_of_a_layer_share_one_centre_a_matrix(name, source, tmp_path):
    model = mixture(name, source)
    assert len(centres(model)) == 2 * 3  # layers, and gate, up and down
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        for part in ("gate", "up", "down"):
            layers = [getattr(expert, part) for expert in experts.each]
            assert len({layer.factors()["core_1"].data_ptr() for layer in layers}) == 1
            assert all(set(dict(layer.named_parameters())) == {"core_0", "core_2"} for layer in layers)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(toys.logits(again), toys.logits(model.eval()), atol=1e-5, rtol=0)


def test_experts_that_are_alike_lose_nothing():
    model = toys.build("olmoe")
    with torch.no_grad():
        for layer in model.model.layers:
            for tensor in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                tensor.copy_(tensor[:1].expand_as(tensor))
    before = toys.logits(model)
    changes = fold(model, rules())
    assert max(changes.values()) < 1e-4
    torch.testing.assert_close(toys.logits(model), before, atol=1e-3, rtol=0)


@mixtures
def test_the_balancing_loss_is_in_the_loss_and_it_trains(name):
    model = mixture(name, mask=0.3).train()
    out = step(model)
    ids = toys.inputs(model)["input_ids"]
    rows = out.logits[:, :-1].reshape(-1, 97).double().log_softmax(-1)
    entropy = -rows[torch.arange(len(rows)), ids[:, 1:].flatten()].mean()
    logits = torch.cat([layer.reshape(-1, 4) for layer in out.router_logits]).detach().double().numpy()
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.bincount(chances.argmax(1), minlength=4) / len(chances)
    balance = 4 * sum(chosen[e] * chances[:, e].mean() for e in range(4))
    assert out.loss.item() == pytest.approx(entropy.item() + 0.1 * balance, rel=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss = step(model).loss
        loss.backward()
        assert all(p.grad.any() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight"))
        optimizer.step()
    assert loss < out.loss - 0.3
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_one_expert_a_token_is_asked():
    model = mixture().eval()
    with torch.no_grad():
        step(model)
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        assert sorted(torch.cat([expert.rows for expert in experts.each]).tolist()) == list(range(24))


@mixtures
def test_an_exported_mixture_computes_what_the_model_does(name):
    """Which tokens go where is no branch of the program: it is that of another text and another length, too."""
    model = mixture(name).eval()
    model.config.use_cache = False
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=60)}}
    given = {"input_ids": torch.arange(12)[None] % 7}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
    ids = torch.randint(0, 90, (1, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(program(input_ids=ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


# the mask --------------------------------------------------------------------------------------------------------------


def four(mask=0.5):
    """Four layers that share the centre ``c``, in training."""
    structure = TensorTrain(outs=(2, 2, 2), ins=(2, 2, 2), ranks=(4, 4))
    container = SharedFactors({"c": (4, 2, 2, 4)}, {"c": mask} if mask else None, dtype=torch.float64)
    layers = [FactorizedLinear(structure, shared={"core_1": "c"}, dtype=torch.float64) for _ in range(4)]
    model = torch.nn.ModuleDict({"container": container, "layers": torch.nn.ModuleList(layers)})
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for layer in layers:
        layer.attach(container)
    return model.train()


def run(model, seed=0):
    """The sum of what the layers make of one input, and all gradients."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8)
    total = sum(layer(x).square().sum() for layer in model["layers"])
    total.backward()
    return float(total), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_dropped_gradient_is_that_of_one_layer_and_nothing_else_changes():
    masked, plain = four(), four(0)
    alone = []
    for k in range(4):
        twin = four(0)
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8)
        twin["layers"][k](x).square().sum().backward()
        alone.append(twin["container"].c.grad)
    value, expected = run(plain)
    seen = set()
    for seed in range(40):
        got, gradients = run(masked, seed)
        assert got == value
        for name in expected:
            if name != "container.c":
                assert torch.equal(gradients[name], expected[name])
        torch.manual_seed(seed)
        kept = [float(torch.rand(())) >= 0.5 for _ in range(4)]
        sums = sum((part for part, keep in zip(alone, kept, strict=True) if keep), torch.zeros(4, 2, 2, 4).double())
        torch.testing.assert_close(gradients["container.c"], sums, atol=1e-12, rtol=0)
        seen.add(sum(kept))
    assert {1, 2, 3} <= seen


def test_the_mask_is_the_same_under_a_seed_and_has_its_probability():
    model, (_, plain) = four(0.25), run(four(0))
    assert torch.equal(run(model, 3)[1]["container.c"], run(model, 3)[1]["container.c"])
    draws = torch.stack([run(model, seed)[1]["container.c"] for seed in range(400)]).mean(0)
    torch.testing.assert_close(draws, 0.75 * plain["container.c"], rtol=0.15, atol=0.05 * float(draws.abs().max()))


def test_there_is_no_mask_in_evaluation():
    value, plain = run(four(0))
    state = torch.random.get_rng_state()
    got, gradients = run(four(0.9).eval())
    assert got == value
    assert torch.equal(gradients["container.c"], plain["container.c"])
    torch.random.set_rng_state(state)


def test_the_mask_is_saved_and_copied(tmp_path):
    model = mixture(mask=0.4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (again, copy.deepcopy(model), tenfold.deepen(mixture(mask=0.4), 3)[0]):
        assert set(one.model.shared_factors.masks.values()) == {0.4}
        assert one.model.shared_factors.masks.keys() == centres(one).keys()
    fold(again, [{"role": "attn.q", "structure": {"kind": "low_rank", "rank": 2}}])  # a fold beside it keeps it
    assert set(again.model.shared_factors.masks.values()) == {0.4}


@pytest.mark.traced
def test_the_mask_is_compiled():
    made = torch.compile(four(0.5)["layers"][0], backend="eager", fullgraph=True)
    assert made(torch.randn(2, 8, dtype=torch.float64)).shape == (2, 8)


@pytest.mark.parametrize("mask", [1.0, -0.1])
def test_a_mask_is_a_probability(mask):
    with pytest.raises(ValueError, match=r"replace.0.share.grad_dropout: Input should be"):
        parse_recipe({"name": "mine", "replace": rules(mask)}, "mine")


# the recipe ------------------------------------------------------------------------------------------------------------


def test_the_recipe_is_counted():
    result = inspect("moe-small", load_recipe("mpoe"))["parameters"]
    centre = 192 * 4 * 8 * 384
    outer = 1 * 3 * 4 * 12 + 12 * 4 * 4 * 192 + 384 * 4 * 6 * 16 + 16 * 4 * 4 * 1
    attention, norms, router = 4 * 768 * 768, 4 * 768, 8 * 768
    block = attention + norms + router + 3 * centre + 8 * 3 * outer
    assert result["total"] == 50257 * 768 + 12 * block + 768 == 205_154_304
    assert result["dense"] == 50257 * 768 + 12 * (attention + norms + router + 8 * 3 * 768 * 3072) + 768
