"""Original and compressed activations against plain runs of the whole model with hooks."""

import copy
from itertools import cycle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from models import toys
from plain import seen, text, watched

from tenfold.compression.activations import Activations, freeze_copy
from tenfold.compression.compress import compress
from tenfold.compression.moments import Moments
from tenfold.models.sites import find_sites, group_by_block

CHAINS = ["gpt2", "llama", "qwen3", "gemma3_text", "phi", "gpt_neox", "opt", "opt-projected", "bert", "roberta"]
each = pytest.mark.parametrize("name", CHAINS)


DEEP = {name: {"num_hidden_layers": 3} for name in CHAINS}
DEEP["gemma3_text"] |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def deep(name: str):
    """Return the toy with three blocks."""
    kind, architecture, settings = toys.TOYS[name]
    with patch.dict(toys.TOYS, {name: (kind, architecture, settings | DEEP[name])}):
        return toys.build(name)


def given(name: str):
    """Return a model, its text, its activations, and ``{path of a block: its sites}``; an encoder reads padded text."""
    model = deep(name)
    words = text(6, 24, padded=name in ("bert", "roberta"))
    blocks = group_by_block(find_sites(model))
    return model, words, Activations(model, list(blocks), words.batches), blocks


def change(model, site) -> None:
    with torch.no_grad():
        model.get_submodule(site.path).weight.mul_(1.5).add_(0.05)


def moments_of(activations, number, block, path, *mixture):
    (sums,) = activations.sum_moments(number, block, [path], *mixture)
    return sums.reduce(path)


def mean(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    return sum(np.outer(a, b) for a, b in zip(x, z, strict=True)) / len(x)


def same(found: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@each
def test_moments_are_those_of_a_plain_run(name):
    """Compare moments of the changed model, and cross moments with the original model and the original block, in any mixture."""
    model, words, activations, blocks = given(name)
    before = copy.deepcopy(model)
    for number, (path, sites) in enumerate(blocks.items()):
        block, original = model.get_submodule(path), freeze_copy(model.get_submodule(path))
        change(model, sites[number])
        mixed = copy.deepcopy(model)
        mixed.set_submodule(path, copy.deepcopy(original))
        runs = [watched(one, words, [site.path for site in sites]) for one in (before, mixed, model)]
        for site, share, local in zip(sites, cycle([0.0, 0.3, 1.0]), cycle([None, original]), strict=False):
            x, y, z = (run[site.path][0] for run in runs)
            x = share * x + (1 - share) * (z if local is None else y)
            found = moments_of(activations, number, block, site.path.removeprefix(f"{path}."), local, original, share)
            same(found.second, mean(z, z))
            same(found.cross, mean(x, z))
            same(found.mean, z.mean(0))
            same(found.mean_original, x.mean(0))
            assert found.tokens == len(x) == words.tokens
        activations.advance(number, original)
    assert len(blocks) == 3


@each
@pytest.mark.parametrize("changed", [False, True])
def test_one_stream_goes_through_the_blocks_as_they_are_or_through_the_original_ones(name, changed):
    model, words, activations, blocks = given(name)
    before = copy.deepcopy(model)
    for number, (path, sites) in enumerate(blocks.items()):
        original = freeze_copy(model.get_submodule(path))
        if changed:
            change(model, sites[0])
        x, _ = seen(before, words, sites[-1].path)
        found = moments_of(activations, number, original, sites[-1].path.removeprefix(f"{path}."))
        same(found.second, mean(x, x))
        same(found.cross, mean(x, x))
        activations.advance(number, compressed=original if changed else None)


def test_bfloat16_is_near(name="llama"):
    model, words, _, blocks = given(name)
    path, sites = next(iter(blocks.items()))
    inner = sites[-1].path.removeprefix(f"{path}.")
    found = []
    for kind in ("float32", "bfloat16"):
        activations = Activations(model, list(blocks), words.batches, precision=kind)
        found.append(moments_of(activations, 0, model.get_submodule(path), inner).second)
    apart = float((found[0] - found[1]).norm() / found[0].norm())
    assert 0 < apart < 0.02


def test_sums_are_in_float32_while_blocks_run_in_bfloat16():
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) + 30
    plain, inside = Moments(16, True), Moments(16, True)
    plain.add(rows, rows)
    with torch.autocast("cpu", torch.bfloat16):
        inside.add(rows, rows)
    assert torch.equal(plain.second, inside.second)


FUSED = [["attn.qkv"], ["attn.out"], ["mlp.in"], ["mlp.out"]]
SPLIT = [["attn.q", "attn.k", "attn.v"], ["attn.out"], ["mlp.in"], ["mlp.out"]]
GATED = [*SPLIT[:2], ["mlp.gate", "mlp.in"], ["mlp.out"]]
INPUT_GROUPS = {"gpt2": FUSED, "gpt_neox": FUSED, "bert": SPLIT, "opt": SPLIT, "llama": GATED, "qwen3": GATED}
INPUT_GROUPS |= {"phi": [["attn.q", "attn.k", "attn.v", "mlp.in"], ["attn.out"], ["mlp.out"]]}  # side by side


@pytest.mark.parametrize("name", INPUT_GROUPS)
def test_input_groups_are_what_reads_the_same_input_in_the_order_of_the_run(name):
    _, _, activations, blocks = given(name)
    for number, sites in enumerate(blocks.values()):
        roles = {site.path: site.role for site in sites}
        groups = activations.find_input_groups(number, sites)
        assert [[roles[path] for path in group] for group in groups] == INPUT_GROUPS[name]
        activations.advance(number)


def refused(model) -> str:
    with pytest.raises(ValueError) as caught:
        compress(model, {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 3}}]}, text=text())
    return str(caught.value)


@pytest.mark.parametrize("name", ["albert", "albert-groups", "t5", "t5-gated"])
def test_blocks_that_are_no_chain_are_refused(name):
    said = refused(toys.build(name))
    assert "--calibrate" in said and "\n" not in said


def test_something_between_two_blocks_is_refused():
    model = toys.build("gpt2")
    model.transformer.h[1].register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1, *arguments[1:]))
    assert "--calibrate" in refused(model)
