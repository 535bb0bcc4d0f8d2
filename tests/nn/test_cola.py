"""CoLA layers: what they compute, what they cost, what keeps them, and what refuses them."""

import copy

import numpy as np
import pytest
import torch
import toys
from folding import fold
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import tenfold
from tenfold.models.cost import inspect, price
from tenfold.models.deepen import deepen
from tenfold.models.recipe import load_recipe
from tenfold.nn import FactorizedLinear
from tenfold.structure import Cola

OUT, IN, RANK = 12, 8, 3
BLOCK = ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.gate", "mlp.out"]
RULE = {"role": BLOCK, "structure": {"kind": "cola", "rank": 5}}
BETWEEN = {
    "silu": lambda h: h / (1 + np.exp(-h)),
    "relu": lambda h: np.maximum(h, 0),
    "tanh": np.tanh,
}


def layer(activation="silu", bias=True):
    made = FactorizedLinear(Cola(out_features=OUT, in_features=IN, rank=RANK, activation=activation), bias).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def slow(made, x: np.ndarray, between) -> np.ndarray:
    """One row, one hidden unit, one output at a time."""
    up, down = made.up.detach().numpy(), made.down.detach().numpy()
    y = np.zeros((len(x), OUT))
    for n in range(len(x)):
        hidden = [between(sum(down[r, i] * x[n, i] for i in range(IN))) for r in range(RANK)]
        for o in range(OUT):
            y[n, o] = sum(up[o, r] * hidden[r] for r in range(RANK))
    return y + (0 if made.bias is None else made.bias.detach().numpy())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", BETWEEN)
def test_it_computes_what_the_loops_do(activation, bias):
    made, x = layer(activation, bias), torch.randn(4, 5, IN, dtype=torch.float64)
    expected = slow(made, x.reshape(20, IN).numpy(), BETWEEN[activation]).reshape(4, 5, OUT)
    np.testing.assert_allclose(made(x).detach().numpy(), expected, atol=1e-12)


def test_fans_are_what_is_summed_and_what_is_made():
    structure = layer().structure
    assert structure.fans() == {"up": (RANK, OUT), "down": (IN, RANK)}
    assert structure.axes() == {"up": ((), (0,), (1,)), "down": ((), (0,), (1,))}


def test_the_start_is_the_authors():
    """Both factors: standard deviation ``(in + out)^(-1/4) rank^(-1/4)``, so that ``up down`` has ``1 / (in + out)``."""
    factors = Cola(out_features=300, in_features=200, rank=64).init(0.02, torch.Generator().manual_seed(0))
    for factor in factors.values():
        assert float(factor.std()) == pytest.approx(500**-0.25 * 64**-0.25, rel=0.02)
    assert float((factors["up"] @ factors["down"]).var()) == pytest.approx(1 / 500, rel=0.1)


def folded(name="llama"):
    model = toys.build(name)
    fold(model, [RULE], "noise")
    return model


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_a_model_trains_is_saved_and_read_by_the_plain_loader(name, tmp_path):
    model = folded(name)
    found = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    assert len(found) >= 12
    before = model(**toys.inputs(model))[0].square().mean()
    before.backward()
    assert all(layer.up.grad is not None for layer in found if name != "mixtral")
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert model(**toys.inputs(model))[0].square().mean() < before
    model.save_pretrained(tmp_path)
    for kind in (type(model), AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path).eval()
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
        torch.testing.assert_close(toys.logits(copy.deepcopy(again)), toys.logits(model), atol=1e-5, rtol=0)


def test_a_factor_can_be_shared(tmp_path):
    """Query, key and value read the same few numbers of the stream."""
    model = toys.build("bert")
    fold(model, [{"role": ["attn.q", "attn.k", "attn.v"], "structure": {"kind": "cola", "rank": 5},
                  "share": {"factors": ["down"], "across": "roles"}}], "noise")  # fmt: skip
    own = model.bert.encoder.layer[1].attention.self
    assert own.query.factors()["down"] is own.value.factors()["down"]
    model.save_pretrained(tmp_path)
    assert torch.equal(toys.logits(type(model).from_pretrained(tmp_path).eval()), toys.logits(model))


def test_it_is_counted():
    result = inspect("llama-60m", load_recipe("cola"))
    attention, mlp = 4 * 128 * (512 + 512), 3 * 128 * (512 + 1376)
    norms, tables = (2 * 8 + 1) * 512, 2 * 32000 * 512
    assert result["parameters"]["total"] == 8 * (attention + mlp) + norms + tables == 42_770_944
    assert result["parameters"]["dense"] == 8 * (4 * 512**2 + 3 * 512 * 1376) + norms + tables
    assert result["flops_per_token"]["1"] == 2 * (8 * (attention + mlp) + 32000 * 512)
    site = next(site for site in price(folded())["sites"] if site["role"] == "mlp.in")
    assert site["structure"] == {"kind": "cola", "out_features": 48, "in_features": 32, "rank": 5, "activation": "silu"}


def test_without_a_rank_it_is_a_quarter_of_the_smaller_side():
    assert Cola.for_shape(1376, 512, {"kind": "cola"}).rank == 128


def compressed(rule, **more):
    tenfold.compress(toys.build("llama"), {"name": "mine", "replace": [rule]}, **more)


def planned(**changes):
    tenfold.plan(toys.build("llama"), {"name": "mine", "replace": [RULE | changes]})


def calibrated():
    from tenfold.compression.calibration import Calibration

    compressed(RULE, text=Calibration([{"input_ids": torch.arange(16)[None]}], {}, 16))


FROM_WEIGHTS = "can't take the place of a trained matrix; train it from noise"
REFUSED = {
    "weights": (lambda: compressed(RULE), FROM_WEIGHTS),
    "surgery": (lambda: fold(toys.build("llama"), [RULE]), FROM_WEIGHTS),
    "densify": (lambda: tenfold.densify(folded()), "can't be densified: cola has a non-linearity"),
    "deepen": (lambda: deepen(folded(), 4), "is a cola layer"),
    "its matrix": (lambda: layer().dense(), "no matrix stands for it"),
    "adapter": (lambda: planned(adapter_rank=2), "cola is no structure and takes no adapter"),
    "split": (lambda: planned(split=2), "takes no split"),
    "keep": (lambda: planned(keep=0.5), "takes no keep"),
    "embedding": (lambda: planned(role="embed"), "takes the place of linear layers"),
    "rank": (lambda: planned(structure={"kind": "cola", "rank": 40}), "rank 40 of a .* must be from 1 to"),
    "activation": (
        lambda: planned(structure={"kind": "cola", "activation": "sine"}),
        "no activation 'sine'; choose one of",
    ),
    "field": (lambda: planned(structure={"kind": "cola", "terms": 4}), "cola has no field 'terms'"),
}


@pytest.mark.parametrize(("call", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_needs_a_matrix_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_refused_model_is_as_it_was():
    model = folded()
    before = toys.logits(model)
    with pytest.raises(ValueError, match="can't be densified"):
        tenfold.densify(model)
    assert torch.equal(toys.logits(model), before)
    assert model.config.quantization_config.sites
