"""The order of contractions: labels that travel together lie together, and what is too dear is not searched."""

import pytest
import torch

from tenfold.structure import CP, TensorTrain, Tucker, contract, plan, rebuild, search
from tenfold.structure.worth import CPU

BLOCK = TensorTrain(outs=(8, 8, 6, 8), ins=(4, 6, 8, 4), ranks=(64, 64, 64))
TUCKER = Tucker(outs=(8, 8, 6, 8), ins=(4, 6, 8, 4), ranks=(6, 6, 4, 6, 3, 4, 6, 3))
SMALL = Tucker(outs=(8, 6), ins=(4, 6), ranks=(6, 4, 3, 4))


def diagram_of(structure):
    (place,) = structure.normal_form()
    return contract._slim(place.diagram)


def places(terms: str, target: str, row: str | None = None) -> search.Places:
    return search.Places(terms.split(","), target, dict.fromkeys("abcdefghijkr", 9) | {"n": 100}, row)


def test_labels_of_the_result_and_of_x_keep_their_order():
    train = places("ngik,fgb,bhic,cjk", "nfhj", "n")
    assert train.kept(["fgb", "bhic"], ["ngik", "cjk"]) == "fhgic", "outs first, then ins; what is summed stays"
    assert places("fgb,hibc,cjk", "fhjgik").kept(["fgb", "hibc"], ["cjk"]) == "fhgic"
    assert places("ngi,afgb", "nfa", "n").kept(["bfg", "gin"], ["ib"]) == "nbfi", "rows of x come first"


def test_what_both_end_with_comes_last():
    rank = places("nfg,ar,br,fr,gr", "nab", "n")
    assert rank.kept(["br", "ar"], ["fr", "gr", "nfg"]) == "abr"
    assert rank.kept(["abr", "gr"], ["fr", "nfg"]) == "abgr"


@pytest.mark.parametrize("rows", [256, 2048])
def test_nothing_large_is_copied_where_an_order_without_copies_exists(rows):
    """Tucker: neighbouring factors are put together, and the rows of ``x`` never move."""
    chain = contract._chain(diagram_of(TUCKER), rows, CPU)
    assert chain.cost.copied < 20_000
    assert contract._chain(diagram_of(TUCKER), rows, None).cost.flops <= chain.cost.flops


def test_the_axes_of_w_go_to_their_places_in_runs():
    """Of a tensor train: ``W`` is made as (outs, ins)(outs, ins) and copied in runs of all ins of the second half."""
    *_, (_, equation, _) = rebuild.rebuild(diagram_of(BLOCK)).steps
    first, second = equation.split("->")[0].split(",")
    outs, ins = ("".join(x for x in equation.split("->")[1] if x in term) for term in (first, second))
    for term, own in ((first, outs), (second, ins)):
        kept = "".join(x for x in term if x in own)
        assert kept == own, "in the order of W"


@pytest.mark.parametrize(
    "structure", [BLOCK, SMALL, CP(outs=(4, 6, 2), ins=(5, 4), rank=40)], ids=["tt", "tucker", "cp"]
)
@pytest.mark.parametrize("worth", [None, CPU], ids=["flops", "price"])
def test_a_limit_changes_nothing_but_what_is_dearer(structure, worth):
    diagram = diagram_of(structure)
    labels = [("n", *diagram.ins), *(labels for _, labels in diagram.factors)]
    names = {label: chr(97 + k) for k, label in enumerate(["n", *dict(diagram.sizes)])}
    size = {names[label]: number for label, number in (*diagram.sizes, ("n", 300))}
    terms = ["".join(names[label] for label in term) for term in labels]
    target = "".join(names[label] for label in ("n", *diagram.outs))
    given = search.Places(terms, target, size, names["n"])
    best = search.path_of(given, worth)
    inputs = ((plan.ROWS, *diagram.ins), *(labels for _, labels in diagram.factors))
    made = plan._planned(inputs, (plan.ROWS, *diagram.outs), (*diagram.sizes, (plan.ROWS, 300)), worth)
    price = made.cost.flops if worth is None else made.cost.price(worth)
    assert search.path_of(given, worth, 1.0001 * price) == best
    assert search.path_of(given, worth, 0.999 * price) == []


def test_a_plan_that_does_not_exist_has_no_steps_and_runs_as_the_other():
    diagram = diagram_of(CP(outs=(4, 6), ins=(5, 4), rank=40))
    labels = ((plan.ROWS, *diagram.ins), *(labels for _, labels in diagram.factors))
    sizes = (*diagram.sizes, (plan.ROWS, 300))
    assert plan._planned(labels, (plan.ROWS, *diagram.outs), sizes, CPU, 1.0).steps == ()
    found = plan.cheapest_plan(labels, (plan.ROWS, *diagram.outs), sizes, CPU)
    operands = [torch.randn([dict(sizes)[label] for label in term]) for term in labels]
    least = plan.plan_of(labels, (plan.ROWS, *diagram.outs), sizes)
    torch.testing.assert_close(plan.run(found, operands), plan.run(least, operands), rtol=1e-4, atol=1e-3)
