"""Index maps beside hidden units: the logits stay, one map of every MLP goes, and nothing that has no right to is touched."""

import pytest
import torch
import toys
from folding import KRONECKER, LOW_RANK, fold
from transformers import AutoModelForCausalLM

import tenfold
from tenfold.models.invariances.maps import absorb_index_maps
from tenfold.models.plan import SitePlan
from tenfold.models.sites import find_sites
from tenfold.models.surgery import finish, install
from tenfold.structure import Kronecker, Scattered

MAPPED = {"kind": "placed", "base": KRONECKER}
IN, GATE, OUT = "mlp.in", "mlp.gate", "mlp.out"


def folded(name: str, **structures) -> torch.nn.Module:
    model = toys.build(name)
    roles = {site.role for site in find_sites(model)}
    wanted = {role.replace("_", "."): structure for role, structure in structures.items()}
    some = [{"role": role, "structure": structure} for role, structure in wanted.items() if role in roles]
    fold(model, some, "noise")  # maps at random
    return model


def maps(model) -> set[str]:
    return {name for name, _ in model.named_buffers() if name.endswith(("rows", "columns"))}


def of(model, role: str) -> list[torch.nn.Module]:
    return [model.get_submodule(site.path) for site in find_sites(model) if site.role == role]


@pytest.mark.parametrize("name", [*toys.TOYS, "qwen3_moe"])
@pytest.mark.parametrize("some", [(IN,), (OUT,), (IN, OUT), (IN, GATE, OUT), (GATE,)])
def test_the_same_logits_with_a_map_less(name, some):
    model = folded(name, **{role.replace(".", "_"): MAPPED for role in some})
    before, had, mapped = toys.logits(model), maps(model), any(of(model, role) for role in some)
    gone = absorb_index_maps(model)
    torch.testing.assert_close(toys.logits(model), before, rtol=1e-4, atol=1e-4)
    assert bool(gone) == mapped and len(maps(model)) == len(had) - len(gone)
    assert len(gone) == len({path.rpartition(".")[0] for path in gone})  # one of every MLP


def test_equal_maps_go_together():
    model = folded("llama", mlp_in=MAPPED, mlp_gate=MAPPED, mlp_out=MAPPED)
    for one, gate, out in zip(of(model, IN), of(model, GATE), of(model, OUT), strict=True):
        gate.rows.copy_(one.rows)
        out.columns.copy_(one.rows)
    before = toys.logits(model)
    assert len(absorb_index_maps(model)) == 6
    torch.testing.assert_close(toys.logits(model), before, rtol=1e-4, atol=1e-4)
    assert all(name.endswith(("proj.rows", "proj.columns")) for name in maps(model)) and len(maps(model)) == 6


def test_a_base_without_maps_stands_alone():
    model = folded("gpt2", mlp_in=MAPPED | {"map_columns": False})
    absorb_index_maps(model)
    assert [layer.structure.kind for layer in of(model, IN)] == ["kronecker"] * 2


@pytest.mark.parametrize(
    "structures",
    [
        {"mlp_in": MAPPED, "mlp_out": LOW_RANK},  # no map: its columns can't follow
        {"mlp_in": LOW_RANK, "mlp_out": MAPPED},
        {"attn_out": MAPPED},
    ],
)
def test_what_can_not_follow_stays(structures):
    model = folded("llama", **structures)
    before = toys.snapshot(model)
    assert absorb_index_maps(model) == []
    assert toys.is_untouched(model, before)


def test_units_that_are_pruned_stay():
    model, base = toys.build("llama"), Kronecker(outs=(12, 2), ins=(8, 4))
    (site, _) = (site for site in find_sites(model) if site.role == IN)
    half = Scattered(base=base, out_features=48, in_features=32)
    install(model, SitePlan(site, half, False), half.init(0.02), None)
    assert absorb_index_maps(model) == []


def test_only_inside():
    model = folded("gpt2", mlp_in=MAPPED)
    assert absorb_index_maps(model, "transformer.h.1") == ["transformer.h.1.mlp.c_fc"]


def test_compression_leaves_it_out_and_it_is_saved(tmp_path):
    model = toys.build("gpt2")
    recipe = {
        "name": "permuted",
        "replace": [{"role": [IN, OUT], "structure": MAPPED, "start": {"fit": "permute", "options": {"rounds": 2}}}],
    }
    model, report = tenfold.compress(model, recipe)
    assert not any(name.endswith("c_fc.rows") for name in maps(model)) and len(maps(model)) == 6
    kinds = {site["path"]: site["structure"] for site in report["sites"]}
    assert kinds["transformer.h.0.mlp.c_fc"]["map_rows"] is False
    tenfold.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(toys.logits(again), toys.logits(model))


def test_a_finished_model_says_what_it_has():
    model = folded("gpt2", mlp_in=MAPPED)
    absorb_index_maps(model)
    finish(model, "test")
    assert model.config.quantization_config.sites["transformer.h.0.mlp.c_fc"]["structure"]["map_rows"] is False
