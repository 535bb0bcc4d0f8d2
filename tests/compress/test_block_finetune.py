"""Finetuning of a block: never worse on the calibration text, and better where possible, in the given metric."""

import copy

import pytest
import torch
from models import toys
from plain import text

from tenfold.compression.activations import Activations
from tenfold.compression.block_finetune import finetune_block
from tenfold.compression.compress import compress
from tenfold.models.config import Calibrate
from tenfold.models.sites import find_sites, group_by_block


def steps(count: int, rate: float) -> Calibrate:
    return Calibrate(block_finetune_steps=count, block_finetune_rate=rate)


def given(name: str, noise: float):
    """Return the activations in front of the last block, that block with noise, and as it was."""
    model = toys.build(name)
    paths = list(group_by_block(find_sites(model)))
    activations = Activations(model, paths, text(8, 16).batches)
    for number in range(len(paths) - 1):
        activations.advance(number)
    block = model.get_submodule(paths[-1])
    original = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return activations, len(paths) - 1, block, original


@torch.no_grad()
def error(activations, number, block, original, metric) -> float:
    """Return the error, summed token by token."""
    total, tokens = 0.0, 0
    for k in range(len(activations.batches)):
        x, z = activations.states(k)
        rows = (
            (activations.run_block(number, block, z, k) - activations.run_block(number, original, x, k))
            .flatten(0, -2)
            .double()
        )
        total += sum(float(row @ metric @ row) / 2 for row in rows)
        tokens += len(rows)
    return total / tokens


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_the_error_is_that_of_the_metric_and_falls(name):
    activations, number, block, original = given(name, 0.02)
    root = torch.randn(32, 32, dtype=torch.float64)
    metric = root @ root.T
    first = error(activations, number, block, original, metric)
    before, after = finetune_block(activations, number, original, metric, steps(60, 3e-3))
    assert before == pytest.approx(first, rel=1e-3)
    assert after == pytest.approx(error(activations, number, block, original, metric), rel=1e-3)
    assert after < 0.8 * before
    assert all(p.requires_grad and p.grad is None for p in block.parameters())


def test_what_is_no_better_is_not_kept():
    activations, number, block, original = given("gpt2", 0.0)
    before, after = finetune_block(activations, number, original, None, steps(5, 0.1))
    assert before == after == 0.0
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), original.parameters(), strict=True))


def test_a_recipe_asks_for_it():
    def made(**more):
        recipe = {
            "name": "x",
            "replace": [{"role": ["mlp.in", "mlp.out"], "structure": {"kind": "low_rank"}}],
            "budget": {"keep": 0.6, "of": "sites"},
            "calibrate": more,
        }
        return compress(toys.build("gpt2"), recipe, text=text(8, 16))[0]

    plain, refined = made(), made(block_finetune_steps=20, block_finetune_rate=1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), refined.parameters(), strict=True))
