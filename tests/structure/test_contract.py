"""How a diagram is evaluated: the counted FLOPs are those of the cheapest order, and forward keeps nothing extra."""

from itertools import combinations
from math import prod
from random import Random

import pytest
import torch
from cases import ALL, COMBINED, DIAGRAMS, FAMILIES, KRONECKER, LOW_RANK, each, factors_of
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.structure import (
    Blast,
    BlockTrain,
    Kronecker,
    LowRank,
    Placed,
    Sum,
    TensorTrain,
    Tucker,
    contract,
    pair,
    plan,
)
from tenfold.structure.hold import Hold
from tenfold.structure.worth import CPU, Worth, worth_of

F64 = torch.float64


@pytest.fixture
def fresh_plans():
    """Plans made with changed prices must not stay."""
    yield
    contract.forward_plans.cache_clear()
    contract._through_dense.cache_clear()


# an independent count ---------------------------------------------------------------------------------------------


def cheapest(operands: list[frozenset], output: frozenset, size: dict[str, int]) -> int:
    """The least FLOPs over all orders of pairwise contractions: 2 for a multiply-add, 1 for a product without a sum."""
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
    (place,) = structure.normal_form()
    diagram = place.diagram
    size = dict(diagram.sizes) | {"rows": rows}
    factors = [frozenset(labels) for _, labels in diagram.factors]
    outs, ins = frozenset(diagram.outs), frozenset(diagram.ins)
    x, y, w = ins | {"rows"}, outs | {"rows"}, outs | ins
    return cheapest([x, *factors], y, size), cheapest(factors, w, size) + cheapest([x, w], y, size)


SEVERAL = {name: s for name, s in (FAMILIES | DIAGRAMS).items() if len(s.factor_shapes()) > 1}


@each(SEVERAL)
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_flops_are_those_of_the_best_order_or_of_a_rebuild(structure, rows):
    best, rebuilt = counted(structure, rows)
    assert structure.flops(rows) in (best, rebuilt)
    assert best <= rebuilt


@each(SEVERAL)
def test_flops_are_least_when_only_they_have_a_price(structure, monkeypatch, fresh_plans):
    monkeypatch.setattr(contract, "CPU", Worth(0.0, 0.0, 0.0))
    assert structure.flops(7) == counted(structure, 7)[0]


def test_flops_of_known_cases():
    """By hand, as on the definition page: ``O I`` multiply-adds, ``R (O + I)``, ``R (ABC + BCD)``."""
    assert FAMILIES["dense"].flops(5) == 2 * 5 * 3 * 4
    assert LowRank(out_features=40, in_features=60, rank=2).flops(5) == 2 * 5 * 2 * (40 + 60)
    assert BlockTrain(outs=(16, 16), ins=(16, 16), rank=1).flops(3) == 2 * 3 * 2 * 16**3
    assert Kronecker(outs=(64, 2), ins=(64, 2)).flops(1) == 2 * (2 * 64 * 64 + 64 * 2 * 2)


@each({"sum": Sum(parts=(KRONECKER, LOW_RANK)), "stacked": COMBINED["stacked"]})
def test_flops_of_parts_add_up(structure):
    """Those of a sum are added up; parts below each other are not."""
    added = structure.shape[0] if isinstance(structure, Sum) else 0
    assert structure.flops(7) == sum(part.flops(7) for part in structure.parts) + 7 * added


def test_parts_below_each_other_are_put_together(monkeypatch):
    """Nothing is padded with zeros and added; what overlaps is."""
    structure = COMBINED["stacked"]
    factors, x = factors_of(structure), torch.randn(5, structure.shape[1], dtype=F64)
    assert [start for start, *_ in structure._blocks] == [0, structure.parts[0].shape[0]] and structure._added == 0
    monkeypatch.setattr(torch.nn.functional, "pad", None)
    torch.testing.assert_close(structure.apply(factors, x), x @ structure.dense(factors).T)
    assert Sum(parts=(KRONECKER, LOW_RANK))._added == KRONECKER.shape[0]
    assert Placed(base=KRONECKER, out_features=9, in_features=9)._blocks is None


def test_parts_of_rows_leave_what_is_between_in_the_cache():
    """512 rows at most, fewer where a row has much between the steps, and never fewer than a few."""
    blocks = BlockTrain(outs=(32, 24), ins=(64, 48), rank=2).normal_form()[0].diagram
    dear = TensorTrain(outs=(4, 4, 4, 4, 3), ins=(4, 4, 4, 4, 12), ranks=(12, 12, 12, 12)).normal_form()[0].diagram
    with torch.no_grad():
        for diagram, expected in ((blocks, range(256, 513)), (dear, range(64, 129))):
            plan_, multiply = contract.forward_plans(diagram, 2048)
            assert multiply is None
            part = contract._part(plan_, diagram, torch.empty(5000, diagram.shape[1]), False)
            assert part in expected
            assert contract._part(plan_, diagram, torch.empty(100, diagram.shape[1]), False) is None


def test_flops_of_a_placed_matrix_are_those_of_its_base():
    assert Placed(base=KRONECKER, out_features=9, in_features=9).flops(7) == KRONECKER.flops(7)


@pytest.mark.parametrize(
    "structure",
    [
        Kronecker(outs=(32, 24), ins=(64, 48), terms=64),
        TensorTrain(outs=(12, 8, 8), ins=(16, 16, 12), ranks=(64, 64)),
        Blast(outs=(4, 192), ins=(4, 768), rank=600),
    ],
)
def test_many_rows_never_cost_much_more_than_dense(structure):
    rows, (out, inner) = 2048, structure.shape
    assert structure.flops(rows) <= 1.1 * 2 * rows * out * inner


def test_the_price_decides_between_the_kinds_of_plans():
    diagrams = [place.diagram for structure in ALL.values() for place in structure.normal_form()]
    kinds = {contract.forward_plans(diagram, rows)[1] is None for diagram in diagrams for rows in contract.BUCKETS}
    assert kinds == {True, False}  # else the laws would say nothing about one of the kinds
    few = LowRank(out_features=400, in_features=400, rank=8).normal_form()[0].diagram
    many = Blast(outs=(4, 192), ins=(4, 768), rank=600).normal_form()[0].diagram
    assert not contract._through_dense(few, 32, CPU, False)
    assert contract._through_dense(many, 2048, CPU, False)


def test_products_with_short_sides_are_dearer_where_they_are_carried_out():
    """Sixteen numbers are summed over at a time: fewer FLOPs than with ``W``, and slower."""
    short, long = BlockTrain(outs=(48, 16), ins=(48, 16), rank=4), BlockTrain(outs=(192, 4), ins=(4, 192), rank=48)
    for structure, chain in ((short, False), (long, True)):
        diagram = structure.normal_form()[0].diagram
        assert (contract.forward_plans(diagram, 2048, worth_of("cpu"))[1] is None) == chain
        assert contract.flops(diagram, 2048) < 2 * 2048 * 768 * 768, "what is counted does not depend on it"


def test_the_order_is_that_of_the_lowest_price():
    """One row and a large factor: the order of the fewest FLOPs would copy that factor."""
    (place,) = Kronecker(outs=(768, 4), ins=(192, 4), terms=7).normal_form()
    diagram = place.diagram
    fewest, cheapest = contract._chain(diagram, 1, None), contract._chain(diagram, 1, CPU)
    assert fewest.cost.flops < cheapest.cost.flops and fewest.cost.copied > 10 * cheapest.cost.copied
    assert cheapest.cost.price(CPU) < 0.5 * fewest.cost.price(CPU)
    assert contract._chain(diagram, 1, Worth(0.0, 0.0, 0.0)) == fewest
    assert contract.forward_plans(diagram, 1) == (cheapest, None)
    assert contract.forward_plans(diagram, 1, CPU, True) == (fewest, None)
    assert contract.flops(diagram, 1) == fewest.cost.flops, "counts do not depend on prices"


def test_the_way_back_is_two_products_for_one_and_what_is_made_again():
    made = plan.plan_of((("n", "i"), ("r", "i"), ("o", "r")), ("n", "o"), (("n", 500), ("i", 40), ("r", 3), ("o", 60)))
    assert [cost.flops for cost in made.costs] == [2 * 500 * 40 * 3, 2 * 500 * 3 * 60]
    assert made.cost_back.flops == 3 * 2 * 500 * 40 * 3 + 2 * 2 * 500 * 3 * 60


def test_a_bucket_holds_its_numbers_of_rows():
    assert [contract.bucket(rows) for rows in (0, 1, 4, 5, 80, 81, 1024, 1025, 10**6)] == [
        *(1, 1, 1, 32, 32, 512, 512, 2048, 2048)
    ]


# forward ----------------------------------------------------------------------------------------------------------


@each(ALL)
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_forward_is_the_same_with_and_without_gradients(structure, rows):
    factors, x = factors_of(structure), torch.randn(rows, structure.shape[1], dtype=F64)
    with_gradients = structure.apply(factors, x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(structure.apply(factors, x), with_gradients)


def kept_by(structure, factors, x) -> list[torch.Tensor]:
    """The numbers that forward keeps for backward."""
    kept = []
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in factors.items()}
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda value: value):
        structure.apply(leaves, x.requires_grad_())
    return [value for value in kept if value.is_floating_point()]


def storages(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@each(ALL)
@pytest.mark.parametrize("rows", [2, 300])
def test_forward_keeps_x_and_the_factors_only(structure, rows):
    factors, x = factors_of(structure), torch.randn(rows, structure.shape[1], dtype=F64)
    kept = kept_by(structure, factors, x)
    others = [value for value in kept if value.untyped_storage().data_ptr() not in storages([x, *factors.values()])]
    assert kept
    if not any(place.columns for place in structure.normal_form()):
        assert not others
    for value in others:  # a map of the columns keeps the columns of x that it takes
        assert (value.shape[0], value.shape[1] <= x.shape[1]) == (rows, True)


def saved_by(structure, rows: int, matrix: bool, between: bool) -> list[tuple[int, ...]]:
    """Shapes of what a layer keeps for the way back beside its input and its factors."""
    factors, x, shapes = factors_of(structure), torch.randn(rows, structure.shape[1], dtype=F64), []
    known = storages([x, *factors.values()])
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in factors.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda v: shapes.append((v, v.shape)) or v, lambda v: v):
        structure._apply(leaves, x.requires_grad_(), None, Hold({} if matrix else None, between))
    return [tuple(shape) for value, shape in shapes if value.untyped_storage().data_ptr() not in known]


def test_what_is_asked_for_is_kept_and_nothing_else():
    wide, dear = LowRank(out_features=40, in_features=600, rank=9), TensorTrain(outs=(8, 8), ins=(8, 8), ranks=(60,))
    assert saved_by(wide, 300, False, False) == [] and saved_by(wide, 300, True, False) == []
    assert saved_by(wide, 300, False, True) == [(300, 9)]
    assert saved_by(dear, 300, False, True) == [] and saved_by(dear, 300, True, True) == [(64, 64)]


def test_what_is_larger_than_the_input_is_not_kept():
    tall = LowRank(out_features=600, in_features=40, rank=30)
    assert saved_by(tall, 300, False, True) == [(300, 30)]
    blocks = BlockTrain(outs=(192, 4), ins=(4, 12), rank=4)  # 4 x 4 x 4 numbers of 48 inputs
    assert saved_by(blocks, 300, False, True) == []


@pytest.mark.parametrize("rows", [3, 300])
def test_autocast_computes_in_its_type_and_gives_gradients_in_that_of_the_factors(rows):
    structure = FAMILIES["kronecker"]
    factors = {name: value.float().requires_grad_() for name, value in factors_of(structure).items()}
    x = torch.randn(rows, structure.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        y = structure.apply(factors, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x @ structure.dense(factors).T, rtol=0.05, atol=0.2)
    y.sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in factors.values())


@pytest.mark.parametrize("terms", [("ab", "bc"), ("ba", "bc"), ("ab", "cb"), ("ba", "cb"), ("bc", "ab"), ("cb", "ba")])
@pytest.mark.parametrize("kept", ["ac", "ca"])
def test_products_of_matrices_are_those_of_einsum(terms, kept):
    sizes = {"a": 3, "b": 4, "c": 5}
    made = plan.plan_of(tuple(map(tuple, terms)), tuple(kept), tuple(sizes.items()))
    operands = [torch.randn([sizes[x] for x in term]) for term in terms]
    assert made.steps[0][2] is not None
    torch.testing.assert_close(plan.run(made, operands), torch.einsum(f"{','.join(terms)}->{kept}", *operands))


@pytest.mark.parametrize(
    ("terms", "kept"), [(("ab", "ab"), "ab"), (("ab", "ac"), "bc"), (("ab", "bc"), "ab"), (("ab", "cd"), "ac")]
)
def test_what_is_no_product_of_matrices_is_left_to_einsum(terms, kept):
    sizes = {"a": 3, "b": 4, "c": 5, "d": 2}
    made = plan.plan_of(tuple(map(tuple, terms)), tuple(kept), tuple(sizes.items()))
    operands = [torch.randn([sizes[x] for x in term]) for term in terms]
    assert (made.steps[0][2] is None) == (terms != ("ab", "ac"))
    torch.testing.assert_close(plan.run(made, operands), torch.einsum(f"{','.join(terms)}->{kept}", *operands))


@pytest.mark.parametrize(
    ("terms", "kept"),
    [
        (("az", "ab", "bc"), "ca"),  # z is in one operand alone: what it adds up has one gradient everywhere
        (("ab", "bcd", "dae"), "ec"),
        (("abc",), "cab"),
        (("ab", "ab", "ca"), "cb"),
    ],
)
def test_the_way_back_through_a_plan_is_that_of_autograd(terms, kept):
    sizes = {"a": 3, "b": 4, "c": 5, "d": 2, "e": 6, "z": 7}
    operands = [torch.randn([sizes[x] for x in term], dtype=F64, requires_grad=True) for term in terms]
    result = torch.einsum(f"{','.join(terms)}->{kept}", *operands)
    upstream = torch.randn_like(result)
    expected = torch.autograd.grad(result, operands, upstream)
    made = plan.plan_of(tuple(map(tuple, terms)), tuple(kept), tuple(sizes.items()))
    for needs in ([True] * len(terms), [k == 0 for k in range(len(terms))]):
        values = plan.Values(made, [operand.detach() for operand in operands])
        torch.testing.assert_close(values.result(), result)
        found = values.back(upstream, needs)
        for need, value, other in zip(needs, found, expected, strict=True):
            assert (value is not None) == need
            if need:
                torch.testing.assert_close(value, other)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_pairs_are_multiplied_as_einsum_does(seed, gradients):
    """Random labels, sizes and memory layouts; many and few matrices in a batch."""
    random = Random(seed)
    size = {letter: random.choice([1, 2, 3, 5, 17]) for letter in "abcdefgh"}
    kinds = {letter: random.choice(["batch", "summed", "rows", "columns"]) for letter in size} | {
        "a": "summed",
        "b": "rows",
    }
    terms = []
    for own in ("rows", "columns"):
        letters = [x for x in kinds if kinds[x] in ("batch", "summed", own)]
        terms.append("".join(random.sample(letters, len(letters))))
    letters = [x for x in kinds if kinds[x] != "summed"]
    kept = "".join(random.sample(letters, len(letters)))
    operands = []
    for term in terms:
        stored = random.sample(term, len(term))
        value = torch.randn([size[x] for x in stored], dtype=F64)
        operands.append(value.permute([stored.index(x) for x in term]))
    equation = f"{','.join(terms)}->{kept}"
    with torch.set_grad_enabled(gradients):
        found = pair.multiply(pair.pair_of(equation), *operands)
        kept = [{}, {}]
        again = [pair.multiply(pair.pair_of(equation), *operands, copies=kept) for _ in range(2)][1]
    torch.testing.assert_close(found, torch.einsum(equation, *operands))
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_results_go_where_they_belong(seed, add):
    """Into memory of any layout, which the product may or may not be made in."""
    random = Random(seed)
    size = {"n": 20, "a": 3, "b": 2, "c": 5, "s": 4}
    kept = "".join(random.sample("nabc", 4))
    one, other = torch.randn(20, 2, 4, 3, dtype=F64), torch.randn(3, 5, 4, dtype=F64)
    stored = random.sample(kept, 4)
    place = torch.randn([size[x] for x in stored], dtype=F64).permute([stored.index(x) for x in kept])
    wanted = torch.einsum(f"nbsa,acs->{kept}", one, other) + (place if add else 0)
    with torch.no_grad():
        found = pair.multiply(pair.pair_of(f"nbsa,acs->{kept}"), one, other, into=pair.Target(place, add))
    torch.testing.assert_close(found, wanted)
    assert found.data_ptr() == place.data_ptr()


def test_rows_between_products_are_aligned_and_results_are_not():
    one, other = torch.randn(300, 20), torch.randn(20, 37)
    with torch.no_grad():
        between, result = pair.product(one, other, None, True), pair.product(one, other)
    assert between.stride() == (48, 1) and result.is_contiguous()
    torch.testing.assert_close(between, one @ other)
    torch.testing.assert_close(result, one @ other)


@pytest.mark.parametrize(
    ("equation", "lies", "between", "made", "copied"),
    [
        ("ns,as->na", ["ns", "as"], True, "na", 0),
        ("ns,as->an", ["ns", "as"], True, "an", 0),
        ("nsb,sa->nba", ["nsb", "sa"], True, "nab", 0),  # a product for each row, and what x keeps comes last
        ("nsb,sa->nba", ["nsb", "sa"], False, "nba", 0),  # .. or what has to
        ("nsp,sa->npa", ["nsp", "sa"], True, "npa", 5000 * 10 * 5),  # too narrow for that
        ("nbs,as->nab", ["nbs", "as"], True, "nba", 0),
        ("nbs,as->nab", ["nbs", "as"], False, "nab", 0),
        ("nps,as->nap", ["nps", "as"], False, "npa", 0),
        ("npbs,as->apnb", ["npbs", "as"], False, "anpb", 0),  # rows apart would not help
        ("nbs,bas->nab", ["nbs", "bas"], True, "bna", 0),  # a batch of 64: one after the other
        ("nbs,bas->nab", ["nsb", "bas"], True, "bna", 5000 * 64 * 10),  # .. of no matrices as they lie
        ("nps,pas->nap", ["nps", "pas"], True, "npa", 0),
        ("nsp,asp->na", ["nsp", "psa"], True, "na", 8 * 10 * 5),
        ("na,a->na", ["na", "a"], True, "na", 5000 * 8),  # no product of matrices
    ],
)
def test_copies_are_foreseen(equation, lies, between, made, copied):
    size = {"n": 5000, "s": 10, "a": 8, "b": 64, "p": 5}
    assert pair.lies_of(equation, lies, size, between)[:2] == (made, copied)


class Copied(TorchDispatchMode):
    """How many numbers are put into another order."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, how, types, given=(), keywords=None):
        if how.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_):
            self.numbers += given[0].numel()
        return how(*given, **(keywords or {}))


@pytest.mark.parametrize(
    ("equation", "copied"),
    [
        ("nsb,sa->nba", 0),
        ("nbs,as->nab", 0),
        ("sa,nsb->nba", 0),  # the same with the operands the other way round
        ("as,nbs->nab", 0),
        ("npbs,as->npab", 0),
        ("nsb,as->nba", 0),
        ("nsp,sa->npa", 500 * 10 * 5),
        ("nsb,apsq->npbaq", 8 * 5 * 10 * 6),  # the factor, once
        ("nab,npb->pa", 500 * 5 * 8),  # a gradient: a matrix for each row, then their sum; instead of both operands
        ("napb,nspb->as", 500 * 8 * 10),
        ("nbpq,ncpq->bc", 500 * (64 + 60) * 5 * 6),  # .. where these are less
        ("nsbp,basp->nab", 500 * 10 * 64 * 5),  # once, to matrices
        ("npsb,dsp->ndb", 100 * 10 * 5),
        ("nasb,nb->as", 500 * 8 * 10),
        ("nasq,nqs->a", 500 * 8 * 10 * 6 + 500 * 6 * 10),  # both, where one number is left of a row
    ],
)
def test_what_is_copied_is_what_is_foreseen(equation, copied):
    """Of results that go on to another product, beside the smaller operand; ``n`` is many, ``p`` and ``q`` are few."""
    size = {"n": 500, "s": 10, "a": 8, "b": 64, "c": 60, "d": 100, "p": 5, "q": 6}
    terms = equation.split("->")[0].split(",")
    one, other = (torch.randn([size[x] for x in term]) for term in terms)
    with torch.no_grad(), Copied() as mode:
        found = pair.multiply(pair.pair_of(equation), one, other, between=True)
    torch.testing.assert_close(found, torch.einsum(equation, one, other), rtol=1e-4, atol=1e-3)
    assert pair.lies_of(equation, terms, size, True)[1] == copied
    assert mode.numbers <= copied + min(one.numel(), other.numel())


@pytest.mark.parametrize(
    ("equation", "numbers"),
    [
        ("ns,as->na", 0),  # 8 columns, 10 that are summed over
        ("nsp,ap->nsa", 500 * 10 * 5 + 8 * 5 + 500 * 10 * 8),  # 8 and 5
        ("nsp,p->ns", 500 * 10 * 5 + 5 + 500 * 10),
        ("sb,sb->", 0),
        ("na,a->na", 0),  # no product of matrices
    ],
)
def test_skinny_products_are_known(equation, numbers):
    operands, size = equation.split("->")[0].split(","), {"n": 500, "s": 10, "a": 8, "b": 64, "p": 5}
    assert pair.lies_of(equation, operands, size, True)[2] == numbers


def test_skinny_products_are_put_together():
    """Of eight modes of a few numbers each no factor is applied alone: pairs of them are, at more FLOPs."""
    (place,) = Tucker(outs=(8, 8, 6, 8), ins=(4, 6, 8, 4), ranks=(6, 6, 4, 6, 3, 4, 6, 3)).normal_form()
    fewest, cheapest = contract._chain(place.diagram, 512, None), contract._chain(place.diagram, 512, CPU)

    def on_rows(made):
        return sum(len(taken) == 2 and any(made.moving[k] for k in taken) for taken in made.taken)

    assert on_rows(fewest) == 9 and on_rows(cheapest) < 7
    assert fewest.cost.flops < cheapest.cost.flops < 2 * fewest.cost.flops


BATCHES = {
    "block train": BlockTrain(outs=(24, 48), ins=(48, 16), rank=4),
    "BLAST": Blast(outs=(32, 24), ins=(32, 16), rank=30),
    "Tucker": Tucker(outs=(32, 24), ins=(32, 24), ranks=(16, 16, 16, 16)),
    "tensor train": TensorTrain(outs=(24, 32), ins=(16, 32), ranks=(8,)),
}


@each(BATCHES)
def test_batches_are_of_matrices(structure, monkeypatch):
    """Else torch would make the products one by one, and copy operands each time."""
    made = []

    def checked(result, one, other, beta, out):
        made.append(len(out))
        for value in (one, other):
            (rows, columns), strides = value.shape[1:], value.stride()[1:]
            assert (strides[1] == 1 and strides[0] >= columns) or (strides[0] == 1 and strides[1] >= rows)
        assert out.is_contiguous()
        return out.copy_(torch.bmm(one, other) + (result if beta else 0))

    monkeypatch.setattr(torch, "baddbmm", checked)
    monkeypatch.setattr(contract, "_through_dense", lambda *given: False)
    monkeypatch.setattr(contract, "cheaper", lambda *given: True)
    contract.forward_plans.cache_clear()
    factors = {name: value.requires_grad_(True) for name, value in structure.init(0.3).items()}
    x = torch.randn(700, structure.shape[1], requires_grad=True)
    w = structure.dense(factors)
    found, expected = (
        torch.autograd.grad((y**2).sum(), [x, *factors.values()]) for y in (structure.apply(factors, x), x @ w.T)
    )
    assert made
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    contract.forward_plans.cache_clear()


def test_few_rows_do_not_copy_the_factor():
    """One row and a factor whose axes would have to be put together: they become a batch instead."""
    size = {"n": 1, "c": 4, "d": 64, "b": 4, "r": 16}
    assert pair.spread(pair.pair_of("ncd,cbdr->nbcr"), size, lambda side, labels: labels in ("ncd", "cbdr")[side]) == (
        1,
        "b",
    )
    assert pair.lies_of("ncd,cbdr->nbcr", ["ncd", "cbdr"], size, True)[1] == 4 * 1 * 4 * 64
    many = size | {"n": 10**5}
    assert (
        pair.spread(pair.pair_of("ncd,cbdr->nbcr"), many, lambda side, labels: labels in ("ncd", "cbdr")[side]) is None
    )


@pytest.mark.parametrize("equation", ["ab->ba", "ab,cd->abcd", "ab,b->b", "ab,cb->c", "a,a->a"])
def test_what_is_no_product_of_two_is_none(equation):
    assert pair.pair_of(equation) is None


def test_a_product_may_be_one_number():
    one, other = (torch.randn(3, 4, dtype=F64) for _ in range(2))
    torch.testing.assert_close(pair.multiply(pair.pair_of("ab,ab->"), one, other), (one * other).sum())
