"""Contractions: the counted FLOPs are those of the best order, copies are foreseen, results are those of torch.einsum."""

from itertools import combinations
from math import prod
from random import Random

import pytest
import torch
from cases import DIAGRAMS, FAMILIES, each

from tenfold.structure import TensorTrain
from tenfold.structure.contraction import THIN, gradients, multiply, plan_of, product_of, run
from tenfold.structure.cost_model import CPU, HardwareCosts
from tenfold.structure.matmul import plan_chain

F64 = torch.float64


def spec_of(structure):
    (place,) = structure.normal_form()
    return place.spec


def cheapest(operands: list[frozenset], output: frozenset, size: dict[str, int]) -> int:
    """The least FLOPs over all pairwise orders: 2 for a multiply-add, 1 for a product without a sum."""
    if len(operands) == 1:
        return 0
    best = []
    for i, j in combinations(range(len(operands)), 2):
        others = [operand for k, operand in enumerate(operands) if k not in (i, j)]
        both = operands[i] | operands[j]
        kept = both & output.union(*others)
        cost = prod(size[label] for label in both) * (2 if kept != both else 1)
        best.append(cost + cheapest([*others, kept], output, size))
    return min(best)


def counted(structure, rows: int) -> tuple[int, int]:
    """FLOPs of the best order, and of the best one that makes ``W`` first and multiplies once."""
    spec = spec_of(structure)
    size = dict(spec.sizes) | {"rows": rows}
    factors = [frozenset(labels) for _, labels in spec.factors]
    outs, ins = frozenset(spec.outs), frozenset(spec.ins)
    x, y, w = ins | {"rows"}, outs | {"rows"}, outs | ins
    return cheapest([x, *factors], y, size), cheapest(factors, w, size) + cheapest([x, w], y, size)


SEVERAL = {name: s for name, s in (FAMILIES | DIAGRAMS).items() if len(s.factor_shapes()) > 1}


@each(SEVERAL)
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_flops_are_those_of_the_best_order_or_of_a_rebuild(structure, rows):
    best, rebuilt = counted(structure, rows)
    assert structure.flops(rows) in (best, rebuilt)
    assert plan_chain(spec_of(structure), rows, None).counts.flops == best <= rebuilt


@each(SEVERAL)
@pytest.mark.parametrize("rows", [7, 300])
def test_the_order_by_price_is_no_dearer_than_that_of_the_fewest_flops(structure, rows):
    by_price, by_flops = (plan_chain(spec_of(structure), rows, costs).counts for costs in (CPU, None))
    assert by_price.price(CPU) <= by_flops.price(CPU) and by_price.flops >= by_flops.flops
    free = HardwareCosts(0.0, 0.0, 0.0)
    assert plan_chain(spec_of(structure), rows, free).counts.flops == by_flops.flops


def test_the_order_of_the_lowest_price_is_taken_where_it_is_clearly_lower():
    """One row through a tensor train: the fewest FLOPs put two cores together first, which is written and copied."""
    spec = spec_of(TensorTrain(outs=(12, 8, 8), ins=(16, 16, 12), ranks=(104, 104)))
    by_price, by_flops = (plan_chain(spec, 1, costs).counts for costs in (CPU, None))
    assert by_price.price(CPU) < 0.8 * by_flops.price(CPU) and by_price.flops > by_flops.flops


def random_terms(seed: int, operands: int) -> tuple[list[str], str, dict[str, int]]:
    random = Random(seed)
    size = {letter: random.choice([1, 2, 3, 5, 17]) for letter in "abcdefgh"}
    terms = ["".join(random.sample("abcdefgh", random.randint(1, 4))) for _ in range(operands)]
    used = sorted(set("".join(terms)))
    return terms, "".join(random.sample(used, random.randint(0, min(5, len(used))))), size


@pytest.mark.parametrize("costs", [None, CPU], ids=["flops", "price"])
@pytest.mark.parametrize("operands", [1, 2, 4, 12])
@pytest.mark.parametrize("seed", range(25))
def test_results_and_gradients_are_those_of_einsum(seed, operands, costs):
    terms, target, size = random_terms(seed, operands)
    if operands == 12:  # with so many the order is opt_einsum's
        size = dict.fromkeys(size, 2)
    values = []
    for term in terms:  # operands may lie in any order
        stored = sorted(term)
        value = torch.randn([size[x] for x in stored], dtype=F64, requires_grad=True)
        values.append(value.permute([stored.index(x) for x in term]))
    expected = torch.einsum(",".join(terms) + "->" + target, *values)
    upstream = torch.randn_like(expected)
    plan = plan_of(tuple(map(tuple, terms)), tuple(target), tuple(size.items()), costs)
    torch.testing.assert_close(run(plan, values), expected)
    wanted = torch.autograd.grad(expected, values, upstream)
    for needs in ([True] * operands, [k % 2 == 0 for k in range(operands)]):
        found = gradients(plan, [value.detach() for value in values], upstream, needs)
        for need, one, other in zip(needs, found, wanted, strict=True):
            assert (one is not None) == need
            if need:
                torch.testing.assert_close(one, other)


SIZES = {"n": 100, "m": 1, "a": 32, "b": 48, "c": 8, "d": 3, "r": 5}


@pytest.mark.parametrize(
    ("one", "other", "kept", "made", "copied"),
    [
        ("nb", "ab", "na", "na", 0),
        ("nb", "ba", "na", "na", 0),
        ("nab", "cb", "nac", "nac", 0),  # rows (n, a) are one axis
        ("nba", "cb", "nac", "nca", 0),  # one product for each n
        ("nbd", "cb", "ncd", "ndc", 100 * 48 * 3),  # d is too short for that
        ("nbr", "bcdr", "cdn", "ncd", 48 * 8 * 3 * 5),  # the smaller one
        ("nab", "acbr", "nacr", "ancr", 32 * 8 * 48 * 5),  # .. for many rows, and for one
        ("mab", "acbr", "macr", "acmr", 32 * 48 * 8),  # .. rather eight copies of it
        ("nab", "cba", "nc", "nc", 8 * 48 * 32),  # the smaller operand takes the order of the larger one
        ("cnb", "cab", "cna", "cna", 0),  # a batch
        ("ncb", "cab", "nca", "cna", 0),  # .. whose matrices lie apart
        ("nbc", "acb", "nac", "cna", 100 * 48 * 8),  # .. or one element after the other
    ],
)
def test_copies_are_foreseen(one, other, kept, made, copied):
    product = product_of(one, other, kept, tuple(SIZES.items()))
    assert (product.made, product.counts.copied) == (made, copied)
    values = [torch.randn([SIZES[x] for x in term]) for term in (one, other)]
    torch.testing.assert_close(
        multiply(product, *values), torch.einsum(f"{one},{other}->{made}", *values), rtol=1e-4, atol=1e-4
    )
    assert SIZES["d"] < THIN <= SIZES["a"]
