"""What a recipe may not say: every mistake is refused in one sentence with the value and the way out."""

from __future__ import annotations

import pytest

from tenfold import api
from tenfold.models.auto import meta_model
from tenfold.models.cost import inspect
from tenfold.models.plan import make_plan
from tenfold.models.recipe import load_recipe

LOW_RANK = {"kind": "low_rank", "rank": 64}
OPEN = {"kind": "low_rank"}
FFN = ["mlp.in", "mlp.out"]
C_FC = "transformer.h.0.mlp.c_fc (3072x768): "


def one(role: str | list[str] = "mlp.in", structure: dict = LOW_RANK, **more) -> dict:
    """A recipe of one rule."""
    return {"replace": [{"role": role, "structure": structure} | more]}


SHARE = {"factors": ["left"], "across": "experts"}
OF_THE_MODEL = {"budget": {"keep": 0.5, "of": "model"}}
# recipe, and what the sentence says
REFUSED = {
    "unknown key": ({"nam": "x"}, "unknown key 'nam'", "did you mean 'name'?"),
    "of a rule": ({"replace": [{"role": "mlp.in", "structre": LOW_RANK}]}, "'replace.0.structre'", "'structure'?"),
    "of a start": (one(start={"fit": "svd", "nrm": "keep"}), "'replace.0.start.nrm'", "did you mean 'norm'?"),
    "of sharing": (one(share={"factors": ["left"], "acros": "roles"}), "'replace.0.share.acros'", "'across'?"),
    "of a budget": (one() | {"budget": {"keep": 0.5, "off": "model"}}, "unknown key 'budget.off'", "'of'?"),
    "of healing": (one() | {"heal": {"epoch": 3}}, "unknown key 'heal.epoch'", "did you mean 'epochs'?"),
    "unknown field": (one(structure={"kind": "low_rank", "rnk": 4}), C_FC, "no field 'rnk'", "in_features, rank"),
    "unknown kind": (one(structure={"kind": "lowrank", "rank": 4}), "'lowrank'", "low_rank", "tensor_train"),
    "unknown role": (one("mlp.inn"), "no role 'mlp.inn'", "did you mean 'mlp.in'?"),
    "another role": (one(["mlp.in", "xyz"]), "no role 'xyz'", "there are attn.q,"),
    "choice of a budget": (
        one() | {"budget": {"keep": 0.5, "of": "modle"}},
        "budget.of", "'model', 'sites', 'blocks', 'without_head', 'flops' or 'bytes'", "'modle'",
    ),
    "choice of a bias": (one(bias="dropp"), "replace.0.bias", "'keep' or 'drop'", "'dropp'"),
    "no role": ({"replace": [{"structure": LOW_RANK}]}, "role or a path"),
    "no structure": ({"replace": [{"role": "mlp.in"}]}, "structure", "for instance {kind: low_rank, rank: 64}"),
    "no kind": (one(structure={"rank": 4}), "structure with its kind"),
    "no match": (one("mlp.gate"), "gpt2", "role mlp.gate", "roles here: attn.out, attn.qkv, embed, mlp.in, mlp.out"),
    "no layer": (one(layers=[99]), "layers [99]"),
    "no path": ({"replace": [{"path": "fc_in", "structure": LOW_RANK}]}, "path fc_in"),
    "no match of a later rule": ({"replace": one()["replace"] + one("mlp.gate")["replace"]}, "role mlp.gate"),
    "split": (one("attn.qkv", split=5), "h.0.attn.c_attn (2304x768): 2304 rows", "into 5 equal parts"),
    "rank above": (one(structure=LOW_RANK | {"rank": 769}), C_FC, "rank 769", "from 1 to 768"),
    "rank below": (one(structure=LOW_RANK | {"rank": 0}), C_FC, "rank 0", "from 1 to 768"),
    "rank of blocks": (
        one(structure={"kind": "block_train", "outs": [48, 64], "ins": [24, 32], "rank": 33}), C_FC, "rank 33", "1 to 32"
    ),
    "ranks of tucker": (
        one(structure={"kind": "tucker", "parts": 1, "ranks": [3073, 4]}), C_FC, "(3073, 4)", "(3072, 768)"
    ),
    "ranks of a train": (
        one(structure={"kind": "tensor_train", "outs": [48, 64], "ins": [24, 32], "ranks": [4, 4]}),
        C_FC, "(4, 4)", "one rank between",
    ),
    "rank of cp": (one(structure={"kind": "cp", "rank": -2}), C_FC, "-2", "whole numbers from 1 up"),
    "tied head": (one("head"), "tied", "factorise role embed", "untie: true"),
    "path of a tied head": ({"replace": [{"path": "lm_head", "structure": LOW_RANK}]}, "tied", "untie: true"),
    "factor to share": (one(share={"factors": ["lef"]}), "transformer.h.0.mlp.c_fc", "'lef'", "left, right"),
    "factor to freeze": (one(freeze=["core_2"]), "'core_2'", "left, right"),
    "shapes of a shared factor": (
        one(FFN, share={"factors": ["left"], "across": "roles"}),
        "'left'", "(3072, 64)", "(768, 64)", "c_fc", "c_proj", "rules of their own",
    ),
    "sharing without experts": (one(FFN, share=SHARE), "shares across experts, but each of its matrices", "or share across"),
    "sharing with itself": (one(share=SHARE | {"across": "roles"}), "rule for role mlp.in shares across roles, but each"),
    "keep below the smallest": (one(structure=OPEN, keep=1e-6), C_FC, "3840 parameters", "keep more"),
    "budget too small": (
        one(FFN, OPEN) | {"budget": {"keep": 0.3, "of": "model"}}, "0.3", "87,107,866", "56,623,104", "factorise more"
    ),
    "budget of fixed ranks": (one(FFN) | OF_THE_MODEL, "which hold 0;", "change keep"),
    "keep of pruning": ({"replace": [{"prune": "mlp", "keep": 0.5}]}, "prunes takes no keep; a budget says how much stays"),
    "transform beside stages": ({"stages": [{"replace": []}], "transform": "slice"}, "has its rules in them, and no transform"),
    "squeeze and replace": (one() | {"squeeze": {"role": "mlp.in"}}, "squeeze and replace are two stages"),
    **{
        f"keep {keep}": (recipe, where, str(float(keep)), "between 0 and 1")
        for keep in (0, 1, -0.1, 1.5, float("nan"))
        for where, recipe in (
            ("replace.0.keep", one(structure=OPEN, keep=keep)),
            ("budget.keep", one(structure=OPEN) | {"budget": {"keep": keep}}),
        )
    },
    **{
        f"sizes of {structure['kind']} {made}": (
            one(structure=structure), C_FC, f"makes a matrix {made}, but the weight is (3072, 768)", "change its sizes"
        )
        for structure, made in (
            ({"kind": "kronecker", "outs": [1536, 3], "ins": [384, 2]}, "(4608, 768)"),
            ({"kind": "kronecker", "outs": [768, 4], "ins": [1536, 2]}, "(3072, 3072)"),
            ({"kind": "tensor_train", "outs": [8, 8, 8, 5], "ins": [8, 8, 12, 1], "rank": 8}, "(2560, 768)"),
            ({"kind": "blast", "blocks": 5, "rank": 8}, "(3070, 765)"),
        )
    },
    **{
        f"types of {structure}": (one(structure=structure), C_FC, repr(structure)[1:-1], "whole numbers or lists")
        for structure in (
            {"kind": "low_rank", "rank": "full"},
            {"kind": "tensor_train", "rank": "ful"},
            {"kind": "kronecker", "outs": 3072, "ins": 768},
            {"kind": "placed", "base": 7},
            {"kind": "blast", "blocks": 0, "rank": 4},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "parts"), [(recipe, parts) for recipe, *parts in REFUSED.values()], ids=REFUSED)
def test_mistakes_are_one_sentence_with_the_value_and_the_way_out(recipe, parts):
    with pytest.raises(ValueError) as caught:
        make_plan(meta_model("gpt2"), load_recipe(recipe))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    for part in parts:
        assert part in said, said


def test_first_matching_rule_wins():
    special = one(structure={"kind": "low_rank", "rank": 8}, layers=[2])["replace"]
    plan = make_plan(meta_model("gpt2"), load_recipe({"replace": special + one()["replace"]}))
    assert {path: entry.structure.rank for path, entry in plan.entries.items()} == {
        f"transformer.h.{layer}.mlp.c_fc": 8 if layer == 2 else 64 for layer in range(12)
    }


def test_an_untied_head_is_factorised_by_itself():
    untied = inspect("gpt2", load_recipe(one("head") | {"untie": True}))["parameters"]
    assert untied["total"] == 124_439_808 + 64 * (50257 + 768)
    assert untied["without_head"] == 124_439_808


def test_two_rules_never_share():
    """The same role in two rules: layers 0 to 5 use one factor, layers 6 to 11 another."""
    share = {"factors": ["right"]}
    halves = [one(share=share, layers=list(range(k, k + 6)))["replace"][0] for k in (0, 6)]
    total = inspect("gpt2", load_recipe({"replace": halves}))["parameters"]["total"]
    assert total == 124_439_808 - 12 * 3072 * 768 + 12 * 3072 * 64 + 2 * 64 * 768


# ---------------------------------------------------------------------------------------------- budgets


def test_keep_of_a_rule_is_of_each_site():
    plan = make_plan(meta_model("gpt2"), load_recipe(one(FFN, OPEN, keep=0.25)))
    assert {entry.structure.rank for entry in plan.entries.values()} == {3072 * 768 // 4 // (3072 + 768)}


def test_budget_of_sites():
    folded = inspect("gpt2", load_recipe(one(FFN, OPEN) | {"budget": {"keep": 0.5}}))["parameters"]
    assert folded["total"] == 124_439_808 - 24 * (3072 * 768 - 307 * (3072 + 768))


def test_budget_of_the_model_is_met_and_not_wasted():
    folded = inspect("gpt2", load_recipe(one(FFN, OPEN) | {"budget": {"keep": 0.8, "of": "model"}}))["parameters"]
    assert 0 <= 0.8 * 124_439_808 - folded["total"] < 24 * (3072 + 768)  # the next rank would be over it


@pytest.mark.parametrize("first", [{"keep": 0.5}, {"structure": {"kind": "low_rank", "rank": 300}}])
def test_budget_of_the_model_counts_what_other_rules_drop(first):
    rules = [one("mlp.in", OPEN)["replace"][0] | first, one("mlp.out", OPEN)["replace"][0]]
    folded = inspect("gpt2", load_recipe({"replace": rules, "budget": {"keep": 0.8, "of": "model"}}))["parameters"]
    assert 0 <= 0.8 * 124_439_808 - folded["total"] < 12 * (3072 + 768)


# ---------------------------------------------------------------------------------------------- names and files


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"no recipe 'krony-81': did you mean krony-81m\?"):
        load_recipe("krony-81")
    with pytest.raises(FileNotFoundError, match=r"there are .*ttm-64"):
        load_recipe("nothing-like-it")


def test_missing_file_shows_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe file .*mine\.yaml; check the path"):
        load_recipe(tmp_path / "mine.yaml")


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"no model 'no-such-model': no folder, not one of gpt2,.*llama-7b"):
        inspect("no-such-model")


def test_file_that_is_no_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("replace: [")
    with pytest.raises(ValueError, match=r"mine\.yaml is not YAML"):
        load_recipe(path)
    path.write_text("- role: mlp.in")
    with pytest.raises(ValueError, match=r"mine\.yaml holds no mapping"):
        load_recipe(path)


def test_stages_have_sizes_of_their_own():
    with pytest.raises(ValueError, match="mpop-staged has stages, each with sizes of its own; leave --keep out"):
        api.with_keep("mpop-staged", 0.5)


def test_what_shares_with_others_is_planned():
    make_plan(meta_model("gpt2"), load_recipe(one(FFN, share={"factors": ["right"], "group": 1})))
    make_plan(meta_model("moe-small"), load_recipe(one(FFN, share=SHARE)))
