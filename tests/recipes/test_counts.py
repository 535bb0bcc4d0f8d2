"""What the recipes cost: every count also by plain arithmetic from the published shapes, without the package."""

from __future__ import annotations

import json
import re
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tenfold.models.auto import meta_model
from tenfold.models.cost import inspect
from tenfold.models.initializers import STARTS
from tenfold.models.plan import make_plan
from tenfold.models.recipe import load_recipe, recipe_names
from tenfold.models.sites import count_parameters
from tenfold.models.surgery import install_empty

# ---------------------------------------------------------------------------------------------- arithmetic
# Below, matrices are (out, in); a Conv1D of GPT-2 has its bias of `out` numbers.

GPT2_TABLES = 50257 * 768 + 1024 * 768
GPT2_BIASES = 2304 + 768 + 3072 + 768 + 4 * 768  # of a block: four biases, two norms
GPT2_ATTENTION = 2304 * 768 + 768 * 768
GPT2_FFN = 2 * 3072 * 768
GPT2_REST = GPT2_TABLES + 2 * 768 + 12 * GPT2_BIASES  # everything but the matrices of the blocks
GPT2_HEAD = 50257 * 768
MEDIUM_REST = 50257 * 1024 + 1024 * 1024 + 2 * 1024 + 24 * (3072 + 1024 + 4096 + 1024 + 4 * 1024 + 4 * 1024 * 1024)
ODD = 6  # layers 1, 3, 5, 7, 9, 11


def gpt2(attention: int = GPT2_ATTENTION, ffn: int = GPT2_FFN) -> int:
    """GPT-2 small with so many parameters in the matrices of every layer."""
    return GPT2_REST + 12 * (attention + ffn)


def train(cores: list[tuple[int, int]], bonds: list[int]) -> int:
    """A tensor train: ``(r_k, m, n, r_{k+1})`` per core."""
    ends = [1, *bonds, 1]
    return sum(left * m * n * right for (m, n), left, right in zip(cores, ends, ends[1:], strict=False))


def ttm(cores: list[tuple[int, int]], rank: int) -> int:
    """One published TTM matrix; no bond is clipped at these ranks."""
    return train(cores, [rank] * (len(cores) - 1))


def twice(cores: list[tuple[int, int]], rank: int, layers: int = 12) -> int:
    """Both feed-forward matrices of every layer; the second is the mirror image of the first."""
    return layers * (ttm(cores, rank) + ttm([(n, m) for m, n in cores], rank))


def krony(a: tuple[int, int], terms: int = 1) -> int:
    """Both feed-forward matrices as ``terms`` products ``A (x) B`` with ``A`` of shape ``a``."""
    return gpt2(ffn=2 * terms * (prod(a) + 3072 * 768 // prod(a)))


SMALL_TTM = GPT2_REST + 12 * GPT2_ATTENTION
UNBIASED = SMALL_TTM - 12 * (3072 + 768)
SVD_50 = 24 * 2 * 274 * (4096 + 1024)
TTM_72 = 24 * 5120 + twice([(16, 16), (16, 16), (4, 16)], 72, 24)
MEDIUM_UNBIASED = MEDIUM_REST - 24 * (4096 + 1024)

TQ_TABLE = 50257 * 192 + 2 + 2
TQ_FFN = 2 * 4 * (384 * 768 + 2 * 4)
TQ = TQ_TABLE + 1024 * 768 + 2 * 768 + 12 * (GPT2_BIASES + GPT2_ATTENTION) + ODD * (GPT2_FFN + TQ_FFN)

KN_TABLE = 50257 * 384 + 2
KN_FFN = 2 * (1536 * 768 + 2)
KN_QKV = 3 * (384 * 768 + 2)
KN_EVEN = GPT2_ATTENTION + GPT2_FFN
KN_REST = KN_TABLE + 1024 * 768 + 2 * 768 + 12 * GPT2_BIASES + ODD * (KN_EVEN + KN_QKV + KN_FFN)
KN_HALF_OUT = KN_REST + ODD * (384 * 768 + 2)
KN_DENSE_OUT = KN_REST + ODD * 768 * 768


# MPO shapes: left cores, central core, right cores, each (bond, in, out, bond)
def cores(*shapes: tuple[int, int, int, int]) -> tuple[int, int]:
    """``(central, the other four)``"""
    sizes = [prod(shape) for shape in shapes]
    return sizes[2], sum(sizes) - sizes[2]


SQUARE = cores((1, 3, 4, 12), (12, 4, 4, 192), (192, 4, 4, 192), (192, 4, 4, 12), (12, 4, 3, 1))
WIDE = cores((1, 3, 4, 12), (12, 4, 4, 192), (192, 4, 8, 384), (384, 4, 6, 16), (16, 4, 4, 1))
WIDE_CENTRED = cores((1, 3, 4, 12), (12, 4, 6, 288), (288, 4, 8, 256), (256, 4, 4, 16), (16, 4, 4, 1))
SQUARE_L = cores((1, 4, 4, 16), (16, 4, 4, 256), (256, 4, 4, 256), (256, 4, 4, 16), (16, 4, 4, 1))
WIDE_L = cores((1, 4, 4, 16), (16, 4, 4, 256), (256, 4, 8, 512), (512, 4, 8, 16), (16, 4, 4, 1))
TABLE = cores((1, 5, 2, 10), (10, 10, 2, 200), (200, 10, 4, 480), (480, 10, 4, 12), (12, 6, 2, 1))


def albert_rest(width: int) -> int:
    """Tables but the word embedding, norms, embedding projection with its bias."""
    return 512 * 128 + 2 * 128 + 2 * 128 + 128 * width + width


def block_biases(width: int) -> int:
    return 4 * width + 4 * width + width + 4 * width  # attention, inner and outer feed-forward, two norms


def mpobert(layers: int, width: int, square, wide, groups: int = 1, adapter: int = 8) -> int:
    central = groups * (4 * square[0] + 2 * wide[0])
    own = layers * (4 * square[1] + 2 * wide[1] + block_biases(width) + 4 * adapter * 2 * width)
    return 30000 * 128 + albert_rest(width) + width * width + width + central + own


MPOP_TRAINED = TABLE[1] + 5 * SQUARE[1] + 2 * WIDE[1] + albert_rest(768) + block_biases(768) + 768
MPOP_CENTRAL = TABLE[0] + 5 * SQUARE[0] + 2 * WIDE[0]
CUT_TABLE = cores((1, 5, 2, 10), (10, 10, 2, 140), (140, 10, 4, 480), (480, 10, 4, 12), (12, 6, 2, 1))
CUT_SQUARE = cores((1, 3, 4, 12), (12, 4, 4, 160), (160, 4, 4, 160), (160, 4, 4, 12), (12, 4, 3, 1))
CUT_WIDE = cores((1, 3, 4, 12), (12, 4, 4, 132), (132, 4, 8, 384), (384, 4, 6, 16), (16, 4, 4, 1))
CUT_TRAINED = CUT_TABLE[1] + 5 * CUT_SQUARE[1] + 2 * CUT_WIDE[1] + albert_rest(768) + block_biases(768) + 768
CUT = CUT_TRAINED + CUT_TABLE[0] + 5 * CUT_SQUARE[0] + 2 * CUT_WIDE[0]

ROBERTA = 50265 * 768 + 514 * 768 + 768 + 2 * 768 + 768 * 768 + 768 + 12 * (block_biases(768) + 4 * 768**2 + GPT2_FFN)
TRAWL = ROBERTA - 3 * GPT2_FFN + 2 * (768 * (3072 + 768) + 3 * 768)
TRAWL_TUCKER = ROBERTA - 3 * GPT2_FFN + 2 * (512 * (3072 + 768) + 3 * 512 * 512)

BONDS = [2, 4, 4, 4, 4, 4, 4, 3]  # from the left 2, 4, 8 .., from the right 3, 6, 12 .., none above 4
ROW = train([(2, 1)] * 8 + [(3, 1)], BONDS)
TENSORGPT = 50257 * ROW + 1024 * 768 + 2 * 768 + 12 * (GPT2_BIASES + GPT2_ATTENTION + GPT2_FFN)

HALF = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
LOW_RANK = GPT2_REST + 12 * sum(m * n // 2 // (m + n) * (m + n) for m, n in HALF)

SQUARE_MONARCH = 4 * 192 * 192 + 4 * 192 * 192  # two block-diagonal factors of four blocks
MONARCH = gpt2(4 * SQUARE_MONARCH, 2 * (4 * 192 * 192 + 4 * 768 * 192))


def btt(out: tuple[int, int], inner: tuple[int, int], rank: int = 4) -> int:
    """The authors' two cores, ``(m1, m0, r n0)`` and ``(n0, r m1, n1)``, with ascending factors."""
    (n0, n1), (m0, m1) = out, inner
    return m1 * m0 * rank * n0 + n0 * rank * m1 * n1


BTT = gpt2(
    btt((48, 48), (16, 48)) + btt((16, 48), (16, 48)),
    btt((32, 96), (16, 48)) + btt((16, 48), (32, 96)),
)

LLAMA_NORMS = (2 * 32 + 1) * 4096
LLAMA_REST = 2 * 32000 * 4096 + LLAMA_NORMS
LLAMA = LLAMA_REST + 32 * (4 * 4096**2 + 3 * 4096 * 11008)
BLAST = LLAMA_REST + 32 * (4 * 1024 * (4096 + 4096 + 16**2) + 3 * 1488 * (4096 + 11008 + 16**2))
JOINT = LLAMA_REST + 32 * (2 * 4096**2 + 4096 * 11008 + 1792 * (2 * 4096 + 4096) + 2304 * (2 * 11008 + 4096))

COLA = 2 * 32000 * 512 + (2 * 8 + 1) * 512 + 8 * 128 * (4 * (512 + 512) + 3 * (512 + 1376))
MPOE_BLOCK = 4 * 768**2 + 4 * 768 + 8 * 768 + 3 * WIDE[0] + 8 * 3 * WIDE[1]  # attention, norms, router, experts

# recipe: (total, total without the output head, both by arithmetic)
COUNTS = {
    "ttm-16": (68_085_504, 68_085_504, UNBIASED + twice([(4, 4)] * 4 + [(3, 12)], 16)),
    "ttm-32": (71_756_544, 71_756_544, UNBIASED + twice([(8, 8), (8, 8), (12, 8), (1, 6)], 32)),
    "ttm-64": (83_606_784, 83_606_784, UNBIASED + twice([(8, 8), (8, 8), (12, 8), (1, 6)], 64)),
    "ttm-80": (107_698_944, 107_698_944, SMALL_TTM + twice([(16, 16), (16, 16), (3, 12)], 80)),
    "ttm-72": (218_303_488, 218_303_488, MEDIUM_UNBIASED + TTM_72),
    "svd-50": (220_834_816, 220_834_816, MEDIUM_REST + SVD_50),
    "krony-67m": (67_893_504, 67_893_504, krony((64, 32))),
    "krony-81m": (81_972_576, 81_972_576, krony((1536, 384))),
    "krony-96m": (96_128_304, 96_128_304, krony((1536, 768))),
    "krony-96m-prune": (96_128_304, 96_128_304, krony((1536, 768))),
    "krony-80m-2": (80_400_048, 80_400_048, krony((1024, 256), 2)),
    "krony-92m-4": (92_983_392, 92_983_392, krony((1024, 256), 4)),
    "tqcompressor": (119_933_764, 81_336_388, TQ + GPT2_HEAD),
    "kngpt2": (122_504_906, 83_907_530, KN_HALF_OUT + GPT2_HEAD),
    "kngpt2-dense-out": (124_274_366, 85_676_990, KN_DENSE_OUT + GPT2_HEAD),
    "mpobert-12": (20_369_280, 20_369_280, mpobert(12, 768, SQUARE, WIDE)),
    "mpobert-48": (78_225_920, 78_225_920, mpobert(48, 1024, SQUARE_L, WIDE_L)),
    "mpobert-48-no-adapter": (75_080_192, 75_080_192, mpobert(48, 1024, SQUARE_L, WIDE_L, adapter=0)),
    "mpobert-48-plus": (103_391_744, 103_391_744, mpobert(48, 1024, SQUARE_L, WIDE_L, groups=3)),
    "deepen": (19_509_120, 19_509_120, mpobert(12, 768, SQUARE, WIDE_CENTRED)),
    "cola": (42_770_944, 26_386_944, COLA),
    "mpoe": (205_154_304, 205_154_304, 50257 * 768 + 768 + 12 * MPOE_BLOCK),
    "mpop": (12_693_748, 12_693_748, MPOP_TRAINED + MPOP_CENTRAL),
    "mpop-squeezed": (9_069_588, 9_069_588, CUT),
    "tensorgpt": (96_547_173, 96_547_173, TENSORGPT),
    "trawl": (116_392_704, 116_392_704, TRAWL),
    "trawl-tucker": (115_994_880, 115_994_880, TRAWL_TUCKER),
    "low-rank": (81_954_048, 81_954_048, LOW_RANK),
    "monarch": (71_355_648, 71_355_648, MONARCH),
    "btt": (63_098_112, 63_098_112, BTT),
    "blast": (3_563_851_776, 3_432_779_776, BLAST),
    "joint-rank-k": (5_408_821_248, 5_277_749_248, JOINT),
}
TRAINED = {"mpop": (1_186_036, MPOP_TRAINED), "mpop-squeezed": (1_089_556, CUT_TRAINED)}
DENSE = {
    "gpt2": (124_439_808, gpt2()),
    "gpt2-medium": (354_823_168, MEDIUM_REST + 24 * 2 * 4096 * 1024),
    "albert-base": (
        11_683_584,
        30000 * 128 + albert_rest(768) + block_biases(768) + 5 * 768**2 + 768 + GPT2_FFN,
    ),
    "roberta-base": (124_645_632, ROBERTA),
    "llama-7b": (6_738_415_616, LLAMA),
}


@cache
def priced(name: str) -> dict:
    recipe = load_recipe(name)
    assert recipe.base_model is not None
    return inspect(recipe.base_model, recipe)


@cache
def planned(name: str):
    recipe = load_recipe(name)
    return make_plan(meta_model(recipe.base_model), recipe)


@cache
def dense(model: str) -> dict:
    return inspect(model)


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", COUNTS)
def test_count_is_the_published_one_and_the_arithmetic_one(name):
    total, without_head, counted = COUNTS[name]
    found = priced(name)["parameters"]
    assert (found["total"], found["without_head"]) == (total, without_head)
    assert found["total"] == counted


@pytest.mark.parametrize("name", COUNTS)
def test_everything_is_trained_but_frozen_factors(name):
    found = priced(name)["parameters"]
    stated, counted = TRAINED.get(name, (found["total"], COUNTS[name][2]))
    assert found["trainable"] == stated == counted


@pytest.mark.parametrize("model", DENSE)
def test_dense_models(model):
    stated, counted = DENSE[model]
    found = dense(model)["parameters"]
    assert found["total"] == found["dense"] == found["trainable"] == stated == counted


def test_index_maps_are_not_parameters():
    """Two permutations at six pairs of matrices, one at the embedding: 40,704 numbers that the count leaves out."""
    entries = planned("tqcompressor").entries.values()
    maps = [length for entry in entries for (length,) in entry.structure.index_shapes().values()]
    assert sum(maps) == 768 + 6 * 2 * (3072 + 768)
    sites = {site["path"]: site["parameters"] for site in priced("tqcompressor")["sites"]}
    assert sites["transformer.wte"] == 50257 * 192 + 4
    assert sites["transformer.h.1.mlp.c_fc"] == 4 * (384 * 768 + 8) + 3072


def test_shared_factors_count_once_and_stay_within_their_rule():
    """q and k share one right factor, gate and up another: two per layer, none of them over layers."""
    entries = planned("joint-rank-k").entries
    keys = {path: entry.shared["right"] for path, entry in entries.items()}
    assert len(set(keys.values())) == 2 * 32
    layer = "model.layers.3."
    assert keys[f"{layer}self_attn.q_proj"] == keys[f"{layer}self_attn.k_proj"]
    assert keys[f"{layer}mlp.gate_proj"] == keys[f"{layer}mlp.up_proj"] != keys[f"{layer}self_attn.q_proj"]


def test_central_cores_are_shared_by_role_and_group():
    for name, groups in (("mpobert-48", 1), ("mpobert-48-plus", 3)):
        entries = planned(name).entries.values()
        assert len({key for entry in entries for key in entry.shared.values()}) == 6 * groups


# ---------------------------------------------------------------------------------------------- FLOPs


def flops_of(result: dict, ending: str) -> dict[str, int]:
    return next(site["flops"] for site in result["sites"] if site["path"].endswith(ending))


def test_flops_of_dense_gpt2():
    """Two per entry of every matrix of the blocks and of the tied head; looking up a token is free."""
    per_token = 2 * (12 * (GPT2_ATTENTION + GPT2_FFN) + 50257 * 768)
    assert per_token == 247_064_064
    assert dense("gpt2")["flops_per_token"] == {"1": per_token, "1024": per_token}
    assert priced("ttm-64")["flops_per_token_dense"] == dense("gpt2")["flops_per_token"]


def test_flops_count_a_layer_that_runs_twelve_times_twelve_times():
    shared, unshared = dense("albert-base"), dense("mpobert-12")
    assert flops_of(shared, "ffn")["1"] == 12 * 2 * 3072 * 768 == 12 * flops_of(unshared, "ffn")["1"]
    assert flops_of(shared, "embedding_hidden_mapping_in")["1"] == 2 * 128 * 768
    assert shared["flops_per_token"] == unshared["flops_per_token"]
    folded = planned("mpop").entries["encoder.albert_layer_groups.0.albert_layers.0.ffn"]
    assert flops_of(priced("mpop"), "ffn")["1"] == 12 * folded.structure.flops(1)


@pytest.mark.parametrize("name", ["svd-50", "low-rank", "monarch", "btt", "blast"])
def test_flops_of_structures_that_use_each_parameter_once(name):
    """Low rank, block trains and BLAST multiply and add once per parameter and token."""
    for site in priced(name)["sites"]:
        if site["structure"]["kind"] != "dense":
            bias = 0 if name == "blast" else site["shape"][0]
            assert site["flops"]["1"] == pytest.approx(2 * (site["parameters"] - bias), rel=0.01)


def test_flops_of_a_kronecker_product():
    """A (1536, 768) (x) (2, 1): 1536 sums of 768 products, then 3072 products and their sum over one term."""
    assert flops_of(priced("krony-96m"), "0.mlp.c_fc")["1"] == 2 * 1536 * 768 + 2 * 3072


# ---------------------------------------------------------------------------------------------- every recipe


def test_published_systems_are_all_tested():
    recipes = {name: load_recipe(name) for name in recipe_names()}
    published = {name for name, recipe in recipes.items() if recipe.source.startswith("arXiv") and recipe.base_model}
    assert published == set(COUNTS) - {"low-rank"} | {"tqcompressor-staged", "mpop-staged"}  # in stages


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_loads_plans_and_prices(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    if recipe.base_model is None:  # a pre-training recipe brings its own model
        return
    assert recipe.source and recipe.note and (recipe.replace or recipe.stages)
    if recipe.stages:
        return
    plan, result = planned(name), priced(name)
    assert plan.entries and plan.recipe == name
    kinds = {site["path"]: site["structure"]["kind"] for site in result["sites"]}
    for path, entry in plan.entries.items():
        assert entry.start.fit in STARTS and kinds[path] == entry.structure.kind
    assert set(plan.entries) == {path for path, kind in kinds.items() if kind != "dense"} - {"lm_head"}  # may be tied


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("pretrain-")])
def test_recipes_that_pretrain_bring_a_model_that_they_suit(name):
    recipe, kept = load_recipe(name), {"btt": 0.234, "monarch": 0.6, "guided": 0.547, "cola": 0.395, "shared": 0.5}
    kept["taught"] = kept["shared"]
    assert recipe.source and recipe.note and recipe.train.eval_tokens and recipe.tokenizer
    if recipe.train.compress_at:  # sizes are chosen by activations then
        assert recipe.calibrate and (recipe.budget.keep, recipe.budget.of) == (0.6, "blocks")
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**recipe.model))
    before = count_parameters(model, "blocks")
    install_empty(model, make_plan(model, recipe))
    assert count_parameters(model, "blocks") / before == pytest.approx(kept[name.removeprefix("pretrain-")], abs=0.01)


def test_result_is_json_with_the_promised_keys():
    result = priced("ttm-64")
    assert json.loads(json.dumps(result)) == result
    assert set(result["parameters"]) == {"total", "without_head", "dense", "trainable"}
    assert set(result["flops_per_token"]) == {"1", "1024"}
    keys = {"path", "role", "structure", "shape", "parameters", "flops"}
    assert result["sites"] and all(set(site) == keys for site in result["sites"])
    for rows in ("1", "1024"):
        assert result["flops_per_token"][rows] == sum(site["flops"][rows] for site in result["sites"])
    first = next(site for site in result["sites"] if site["path"] == "transformer.h.0.mlp.c_fc")
    assert first["role"] == "mlp.in" and first["shape"] == [3072, 768] and first["parameters"] == 659_840
    assert first["structure"] == {
        "kind": "tensor_train", "outs": [8, 8, 8, 6], "ins": [8, 8, 12, 1], "ranks": [64, 64, 64]
    }  # fmt: skip


def test_nothing_is_allocated():
    assert all(parameter.is_meta for parameter in meta_model("llama-7b").parameters())


def test_docs_have_every_recipe_with_its_counts():
    lines = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text().splitlines()
    rows = {found[1]: line for line in lines if (found := re.match(r"\| `([\w-]+)` \|", line))}
    assert set(rows) >= set(COUNTS)
    for name, (total, without_head, _) in COUNTS.items():
        assert f"| {total:,} | {without_head:,} |" in rows[name], rows[name]
