"""Deepening: what is copied, what is shared, what is made smaller, counted and computed by hand."""

import copy
import functools
from math import prod

import numpy as np
import pytest
import torch
import toys
from transformers import AutoModelForCausalLM

import tenfold
from tenfold.models.auto import meta_model
from tenfold.models.deepen import deepen
from tenfold.models.plan import make_plan
from tenfold.models.recipe import load_recipe
from tenfold.models.sites import find_sites

FULL = {"kind": "tensor_train", "parts": 3, "mirror": True, "rank": "full"}
BLOCK = ["attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "mlp.in", "mlp.gate", "mlp.out"]
ROUGH = {"options": {"sweeps": 2}}  # no test here is about how near a shared centre is fitted
ALLOCATORS = {
    "replace": [{"role": BLOCK, "structure": FULL, "share": {"factors": ["core_1"]}, "adapter_rank": 2, "start": ROUGH}]
}
OWN = {"replace": [{"role": BLOCK, "structure": FULL}]}
several = pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "opt", "gpt_neox", "albert", "mixtral"])


def block_of(path: str) -> int:
    return next(int(part) for part in path.split(".") if part.isdigit())


def at(path: str, block: int) -> str:
    parts = path.split(".")
    parts[parts.index(str(block_of(path)))] = str(block)
    return ".".join(parts)


def matrix(layer) -> np.ndarray:
    """``W`` of the train alone, by loops over its two bonds."""
    cores = [layer.factors()[f"part_0_core_{k}"].detach().double().numpy() for k in range(3)]
    (_, a, c, r), (_, b, d, s), (_, e, f, _) = (core.shape for core in cores)
    w = np.zeros((a, b, e, c, d, f))
    for x in range(r):
        for y in range(s):
            parts = cores[0][0, :, :, x], cores[1][x, :, :, y], cores[2][y, :, :, 0]
            w += np.einsum("ac,bd,ef->abecdf", *parts)
    return w.reshape(a * b * e, c * d * f)


@functools.cache
def deepened(name: str):
    """Five layers that share; and what the two were. Not to be changed."""
    model = toys.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    return *deepen(model, 5, ALLOCATORS), before


def inside(model):
    return [site.path for site in find_sites(model) if site.layer is not None]


@several
def test_as_many_layers_with_full_bonds_and_nothing_shared_are_the_model(name):
    model = toys.build(name)
    before = toys.logits(model)
    same, report = deepen(model, 2, OWN)
    torch.testing.assert_close(toys.logits(same), before, atol=1e-4, rtol=0)
    assert report["layers"] == [2, 2] and max(report["errors"].values()) < 1e-5


@several
def test_added_layers_are_smaller_copies_beside_the_same_centres(name):
    deep, report, _ = deepened(name)
    assert report["scale"] == pytest.approx(10**-0.25)
    assert torch.isfinite(toys.logits(deep)).all()
    for path in inside(deep):
        layer, source = deep.get_submodule(path), deep.get_submodule(at(path, block_of(path) % 2))
        scale = 10**-0.25 if block_of(path) >= 2 else 1.0
        np.testing.assert_allclose(matrix(layer), scale * matrix(source), atol=1e-5)
        assert layer.factors()["part_0_core_1"].data_ptr() == source.factors()["part_0_core_1"].data_ptr()
        assert not layer.part_1_left.any() and layer.part_1_right.any()
        if layer.bias is not None:
            assert torch.equal(layer.bias, source.bias)


@several
def test_everything_else_is_copied(name):
    deep, _, before = deepened(name)
    folded = tuple(f"{path}." for path in inside(deep))
    blocks = 2 if name != "albert" else 1
    seen = 0
    for key, value in deep.state_dict().items():
        if key.startswith(folded) and not key.endswith(".bias"):
            continue
        if "shared_factors" not in key:
            same = at(key, block_of(key) % blocks) if key.startswith(blocks_of(deep)) else key
            assert torch.equal(value, before[same]), key
            seen += 1
    assert seen > 5


def blocks_of(model) -> tuple[str, ...]:
    return tuple({path[: path.index(f".{block_of(path)}.") + 1] for path in inside(model)})


def test_a_matrix_that_is_not_folded_is_made_smaller_too():
    model = toys.build("llama")
    q = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    deep, _ = deepen(model, 4, {"replace": [{"role": "mlp.in", "structure": FULL}]})
    torch.testing.assert_close(deep.model.layers[3].self_attn.q_proj.weight, 8**-0.25 * q)
    assert torch.equal(deep.model.layers[1].self_attn.q_proj.weight, q)


def train(*cores) -> tuple[int, int]:
    """``(central core, the other ones)`` of ``(bond, out, in, bond)``."""
    return prod(cores[1]), prod(cores[0]) + prod(cores[2])


def test_parameters_are_the_formula():
    """layers * (auxiliary + adapters + biases + norms) + centres + what is outside of the blocks."""
    square = train((1, 4, 2, 8), (8, 4, 4, 8), (8, 2, 4, 1))  # 32 = 4 4 2, its mirror 2 4 4
    fused = train((1, 4, 2, 8), (8, 6, 4, 16), (16, 4, 4, 1))  # 96 = 4 6 4
    wide = train((1, 4, 2, 8), (8, 8, 4, 16), (16, 4, 4, 1))  # 128 = 4 8 4
    back = train((1, 4, 4, 16), (16, 4, 8, 8), (8, 2, 4, 1))
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)]
    centres = sum(part[0] for part in (fused, square, wide, back))
    own = sum(part[1] for part in (fused, square, wide, back)) + sum(2 * (m + n) for m, n in shapes)
    block = own + (96 + 32 + 128 + 32) + 4 * 32
    outside = 97 * 32 + 64 * 32 + 2 * 32
    for layers in (2, 4, 7):
        deep, report = deepen(toys.build("gpt2"), layers, ALLOCATORS)
        assert sum(p.numel() for p in deep.parameters()) == outside + centres + layers * block
        assert report["parameters"]["total"] == outside + centres + layers * block


def test_a_deepened_model_is_deepened_again():
    first, _ = deepen(toys.build("llama"), 4, ALLOCATORS)
    with torch.no_grad():  # trained in between
        for parameter in first.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    kept = copy.deepcopy(first)
    second, report = deepen(first, 8)
    assert report["layers"] == [4, 8] and not report["errors"]
    for path in inside(second):
        layer, number = second.get_submodule(path), block_of(path)
        source = kept.get_submodule(at(path, number % 4))
        scale = 16**-0.25 if number >= 4 else 1.0
        np.testing.assert_allclose(matrix(layer), scale * matrix(source), atol=1e-5)
        assert torch.equal(layer.part_1_left, source.part_1_left * (number < 4))
    assert len(dict(second.model.shared_factors.named_parameters())) == 7


def test_groups_of_layers_keep_their_own_centres():
    groups = {"replace": [ALLOCATORS["replace"][0] | {"share": {"factors": ["core_1"], "group": 1}}]}
    deep, _ = deepen(toys.build("llama"), 4, groups)
    at_0, at_1, at_2, at_3 = (layer.mlp.up_proj.factors()["part_0_core_1"].data_ptr() for layer in deep.model.layers)
    assert at_0 == at_2 != at_1 == at_3


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "qwen3", "mixtral"])
def test_it_is_an_ordinary_checkpoint_that_writes_and_trains(name, tmp_path):
    deep, _, _ = deepened(name)
    deep.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 5
    assert len(getattr(again.config, "layer_types", None) or range(5)) == 5
    torch.testing.assert_close(toys.logits(again), toys.logits(deep))
    ids = toys.inputs(again)["input_ids"][:1]
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **given), again.generate(ids, use_cache=False, **given))
    loss = again(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for n, p in again.named_parameters() if "experts" not in n)
    torch.optim.SGD(again.parameters(), lr=0.01).step()
    assert again(input_ids=ids, labels=ids).loss < loss


def test_layers_of_two_kinds_begin_again_behind_the_last():
    model = toys.build("gemma3_text")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    deep, _ = deepen(type(model)(model.config), 5, OWN)
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    assert deep.config.layer_types == kinds
    assert len(model.config.layer_types) == 2


def test_the_shipped_recipe_is_that_of_the_paper_at_its_width():
    paper, ours = (make_plan(meta_model("mpobert-12"), load_recipe(name)).entries for name in ("mpobert-12", "deepen"))
    assert paper.keys() == ours.keys()
    for path, entry in paper.items():
        own = [prod(shape) for name, shape in entry.structure.factor_shapes().items() if "core_2" not in name]
        less = [prod(shape) for name, shape in ours[path].structure.factor_shapes().items() if "core_2" not in name]
        assert sum(less) < sum(own) if "ffn" in path else ours[path].structure == entry.structure


REFUSED = {
    "fewer layers": ("gpt2", 1, ALLOCATORS, "has 2 layers and deepening only adds: ask for more than 2, not 1"),
    "two stacks": ("t5", 4, ALLOCATORS, "has an encoder and a decoder"),
}


@pytest.mark.parametrize(("name", "layers", "recipe", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_deepened_is_refused(name, layers, recipe, sentence):
    with pytest.raises(ValueError, match=sentence):
        tenfold.deepen(toys.build(name), layers, recipe)


def test_an_unknown_architecture_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="no role table for model_type 'bloom'"):
        tenfold.deepen(model, 4)


def test_a_folded_model_takes_no_recipe():
    deep, _ = deepen(toys.build("gpt2"), 3, ALLOCATORS)
    with pytest.raises(ValueError, match="factorised already and keeps its structures"):
        tenfold.deepen(deep, 4, ALLOCATORS)


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_what_is_folded_outside_of_the_blocks_stays(name, untie, tmp_path):
    low = {"kind": "low_rank", "rank": 5}
    recipe = {"replace": [{"role": "embed", "structure": low}, *OWN["replace"]], "untie": untie}
    deep, _ = deepen(toys.build(name), 2, recipe)
    twice, _ = deepen(copy.deepcopy(deep), 4)
    assert torch.equal(twice.get_input_embeddings().left, deep.get_input_embeddings().left)
    twice.save_pretrained(tmp_path)
    again = type(twice).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(toys.logits(again), toys.logits(twice))
    assert twice.config.quantization_config.untied == untie
