"""What a budget is a share of."""

import copy

import pytest
from models import toys
from plain import text

from tenfold.compress.compress import compress
from tenfold.models.cost import price

RULES = {
    "narrow": [{"narrow": "mlp"}, {"narrow": "attention"}],
    "low rank": [{"role": ["mlp.in", "mlp.out", "attn.q", "attn.qkv", "attn.out"], "structure": {"kind": "low_rank"}}],
}


@pytest.mark.parametrize("keep", [0.9, 0.7])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama"])
@pytest.mark.parametrize("of", ["model", "without_head", "flops"])
def test_a_budget_is_kept_and_used(name, rules, of, keep):
    def size(model) -> int:
        found = price(model)
        counts = {"model": found["parameters"]["total"], "without_head": found["parameters"]["without_head"]}
        return counts.get(of, found["flops_per_token"]["1024"])

    model = toys.build(name)
    recipe = {"replace": RULES[rules], "budget": {"keep": keep, "of": of}}
    after = compress(copy.deepcopy(model), recipe, text=text())[0]
    assert (keep - 0.02) * size(model) < size(after) <= keep * size(model)


def test_flops_need_activations():
    recipe = {"replace": RULES["low rank"], "budget": {"keep": 0.7, "of": "flops"}}
    with pytest.raises(ValueError, match="a budget of flops needs a calibration text"):
        compress(toys.build("gpt2"), recipe)
