"""Budgets as shares of the model, of its parts, of FLOPs and of bytes."""

import copy

import pytest
import torch
from models import toys
from plain import text
from safetensors import safe_open

from tenfold.compression.compress import compress
from tenfold.models.cost import price
from tenfold.structure import Structure

RULES = {
    "prune": [{"prune": "mlp"}, {"prune": "attention"}],
    "low rank": [{"role": ["mlp.in", "mlp.out", "attn.q", "attn.qkv", "attn.out"], "structure": {"kind": "low_rank"}}],
}


# any two values of two columns are beside each other in some row
KEPT = [
    ("gpt2", "prune", "model", 0.9),
    ("gpt2", "low rank", "without_head", 0.7),
    ("gpt2", "prune", "flops", 0.7),
    ("gpt2-untied", "low rank", "model", 0.7),
    ("gpt2-untied", "prune", "without_head", 0.9),
    ("gpt2-untied", "low rank", "flops", 0.9),
    ("llama", "low rank", "model", 0.9),
    ("llama", "prune", "without_head", 0.7),
    ("llama", "low rank", "flops", 0.7),
]
IN_FILES = [
    ("gpt2", "prune", torch.float32, 0.9),
    ("gpt2", "low rank", torch.bfloat16, 0.8),
    ("llama", "prune", torch.bfloat16, 0.8),
    ("llama", "low rank", torch.float32, 0.8),
    ("llama", "low rank", torch.bfloat16, 0.9),
]


SIZES = {
    "model": lambda model: price(model)["parameters"]["total"],
    "without_head": lambda model: price(model)["parameters"]["without_head"],
    "flops": lambda model: price(model)["flops_per_token"]["1024"],
    "blocks": lambda model: sum(p.numel() for p in model.transformer.h.parameters()),
    "bytes": lambda model: 4 * price(model)["parameters"]["total"],
}
parameters, flops = SIZES["model"], SIZES["flops"]


def compressed(model, recipe: dict, keep: float, of: str, unused: float = 0.02):
    """Return a compressed copy, after checking that it has the share ``keep`` of the part ``of`` the model, and not much less."""
    after = compress(copy.deepcopy(model), recipe | {"budget": {"keep": keep, "of": of}}, text=text())[0]
    assert (keep - unused) * SIZES[of](model) < SIZES[of](after) <= keep * SIZES[of](model)
    return after


@pytest.mark.parametrize(
    ("name", "rules", "of", "keep"), [*KEPT, *(("mixtral", "prune", of, 0.8) for of in ("model", "flops"))]
)
def test_a_budget_is_kept_and_used(name, rules, of, keep):
    compressed(toys.build(name), {"replace": RULES[rules]}, keep, of)


@pytest.mark.parametrize("of", ["flops", "bytes"])
def test_flops_and_bytes_need_activations(of):
    recipe = {"replace": RULES["low rank"], "budget": {"keep": 0.7, "of": of}}
    with pytest.raises(ValueError, match=f"a budget of {of} is for rules that a calibration text guides"):
        compress(toys.build("gpt2"), recipe)


@pytest.mark.parametrize(("name", "rules", "dtype", "keep"), IN_FILES)
def test_a_budget_of_bytes_is_kept_by_the_files(name, rules, dtype, keep, tmp_path):
    def size(model, folder) -> int:
        model.save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as stored:
            return sum(stored.get_tensor(key).nbytes for key in stored.keys())  # noqa: SIM118 - no mapping

    model = toys.build(name).to(dtype)
    recipe = {"replace": RULES[rules], "budget": {"keep": keep, "of": "bytes"}}
    whole, after = size(model, tmp_path / "whole"), compress(copy.deepcopy(model), recipe, text=text())[0]
    small = size(after, tmp_path / "small")
    assert (keep - 0.04) * whole < small <= keep * whole
    again = compress(copy.deepcopy(after), recipe, text=text())[0]
    assert (keep - 0.08) * small < size(again, tmp_path / "again") <= keep * small


# several structures ------------------------------------------------------------------------------------------------


CHOICE = [{"kind": "low_rank"}, {"kind": "kronecker", "outs": [8, 4], "ins": [8, 4]}]


def choosing(structure, roles=("attn.q", "attn.out"), keep=0.2) -> dict:
    return {"replace": [{"role": [*roles], "structure": structure}], "budget": {"keep": keep, "of": "sites"}}


def test_every_site_gets_the_structure_that_suits_it():
    """One matrix has low rank, another is a sum of few Kronecker products: both are found without loss."""
    model = toys.build("llama")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            left, right = (torch.randn(32, 3, generator=draw) for _ in range(2))
            layer.self_attn.q_proj.weight.copy_(left @ right.T / 8)
            parts = [torch.kron(*(torch.randn(k, k, generator=draw) for k in (8, 4))) for _ in range(2)]
            layer.self_attn.o_proj.weight.copy_((parts[0] + parts[1]) / 8)
    alone = {}
    for name, structure in {"low rank": CHOICE[0], "kronecker": CHOICE[1], "both": CHOICE}.items():
        after, report = compress(copy.deepcopy(model), choosing(structure), text=text())
        alone[name] = sum(choice["loss"] for choice in report["choices"])
    kinds = {site["path"].split(".")[-1]: site["structure"]["kind"] for site in report["sites"]}
    assert kinds == {"q_proj": "low_rank", "o_proj": "kronecker"}
    assert alone["both"] < 0.1 * min(alone["low rank"], alone["kronecker"])
    torch.testing.assert_close(toys.logits(after), toys.logits(model), atol=0.05, rtol=0)


def test_a_structure_of_fixed_size_may_be_one_of_them():
    fixed = {"kind": "kronecker", "outs": [8, 4], "ins": [8, 4], "terms": 2}
    after, report = compress(toys.build("llama"), choosing([{"kind": "low_rank"}, fixed]), text=text())
    assert {site["structure"]["kind"] for site in report["sites"]} <= {"low_rank", "kronecker"}
    assert torch.isfinite(toys.logits(after)).all()


def test_which_structure_suits_is_not_seen_without_data():
    with pytest.raises(ValueError, match="choice between 2 structures, which activations make"):
        compress(toys.build("llama"), choosing(CHOICE))


# what is outside of the blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["model", "without_head", "blocks", "bytes"])
def test_a_budget_is_a_share_of_the_model_that_came_in(of):
    """An embedding with a rule of its own counts towards the budget."""
    embed = {"role": "embed", "structure": {"kind": "low_rank"}, "keep": 0.5}
    after = compressed(toys.build("gpt2"), {"replace": [embed, *RULES["prune"]]}, 0.8, of)
    assert after.transformer.wte.structure.kind == "low_rank"


def test_outside_of_the_blocks_a_rule_says_how_much_stays():
    model = toys.build("gpt2")
    embed = {"role": "embed", "structure": {"kind": "low_rank"}}
    recipe = {"replace": [embed, *RULES["prune"]], "budget": {"keep": 0.8, "of": "model"}}
    with pytest.raises(
        ValueError, match=r"role embed is outside of the blocks, .* give it a keep or a size of its own"
    ):
        compress(model, recipe, text=text())
    recipe = {"replace": [embed | {"keep": 0.1}, *RULES["prune"]], "budget": {"keep": 0.99, "of": "model"}}
    with pytest.raises(ValueError, match=r"keep 0.99 of the model is reached outside of the blocks already"):
        compress(model, recipe, text=text())


# models that are folded already ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.9, 0.8])
@pytest.mark.parametrize("of", ["model", "flops"])
def test_a_rule_of_its_own_size_on_folded_matrices_is_counted_from_what_they_hold(of, keep):
    low = {"kind": "low_rank"}
    first = {"replace": [{"role": ["mlp.in", "mlp.gate", "mlp.out"], "structure": {**low, "rank": 8}}]}
    model = compress(toys.build("llama"), first)[0]
    rules = [
        {"role": ["mlp.in", "mlp.gate"], "structure": {**low, "rank": 6}},
        {"role": ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.out"], "structure": low},
    ]
    compressed(model, {"replace": rules}, keep, of, 0.03)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_flops_of_a_shared_factor_are_those_of_every_site(name):
    """Gate and up share a right factor, but both multiply by it."""
    shared = {"role": ["mlp.gate", "mlp.in"], "structure": {"kind": "low_rank"}}
    shared["share"] = {"factors": ["right"], "across": "roles"}
    rules = [shared, {"role": ["mlp.out", "attn.q", "attn.out"], "structure": {"kind": "low_rank"}}]
    compressed(toys.build(name), {"replace": rules}, 0.8, "flops", 0.03)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_flops_are_used_up_a_second_time(name):
    once = compressed(toys.build(name), {"replace": RULES["prune"]}, 0.8, "flops", 0.03)
    compressed(once, {"replace": RULES["prune"]}, 0.8, "flops", 0.03)


def test_a_rule_is_for_matrices_inside_or_outside_of_the_blocks():
    rule = {"role": ["embed", "mlp.in"], "structure": {"kind": "low_rank", "rank": 4}}
    with pytest.raises(ValueError, match=r"names matrices inside and outside of the blocks; .* write two rules"):
        compress(toys.build("gpt2"), {"replace": [rule]}, text=text())


def test_a_head_gets_its_own_matrix_with_a_text_too():
    model = toys.build("gpt2")
    recipe = {"replace": RULES["prune"], "budget": {"keep": 0.8, "of": "blocks"}}
    tied, own = (compress(copy.deepcopy(model), recipe | {"untie": untie}, text=text())[0] for untie in (False, True))
    assert own.lm_head.weight is not own.transformer.wte.weight
    assert parameters(own) == parameters(tied) + 97 * 32


@pytest.mark.parametrize("kind", ["cp", "blast", "tensor_train"])
def test_fits_that_nothing_asks_for_are_not_made(kind, monkeypatch):
    """Uniform allocation needs no losses, so that a structure is fitted once, at its own size."""
    fitted, whole = [], Structure.fit
    monkeypatch.setattr(Structure, "fit", lambda self, *a, **k: fitted.append(self) or whole(self, *a, **k))
    counts = {}
    for allocate in ("uniform", "sensitivity"):
        fitted.clear()
        recipe = choosing({"kind": kind}, keep=0.5) | {"calibrate": {"allocate": allocate}}
        recipe["replace"][0]["start"] = {"options": {"sweeps": 1}}
        after, report = compress(toys.build("llama"), recipe, text=text())
        counts[allocate] = len(fitted)
        losses = [choice["loss"] for choice in report["choices"]]
        known = allocate == "sensitivity" or kind == "tensor_train"  # which has a closed form
        assert all(loss is not None if known else loss is None for loss in losses)
        sizes = [Structure.from_json(site["structure"]).numel for site in report["sites"]]
        assert allocate == "sensitivity" or all(350 < size < 670 for size in sizes)  # of 1,024
        assert torch.isfinite(toys.logits(after)).all()
    assert counts["uniform"] == 4  # two matrices in two layers
    assert counts["sensitivity"] > 5 * counts["uniform"] or kind == "tensor_train"
