"""Sums of entrywise products: the contraction they stand for, found where its batch runs fastest, and without a copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.structure import CP, added, contract, entrywise, pair

SIZE = {"a": 100, "b": 3, "s": 4, "t": 5, "r": 6, "u": 2, "w": 70}
CASES = {
    "own-labels-before": ("rsa,sa->ra", "rsa", "sa"),
    "own-labels-between": ("sra,sa->ra", "sra", "sa"),
    "of-the-other": ("ta,rta->ra", "ta", "rta"),
    "two-summed": ("rsta,tsa->ar", "rsta", "tsa"),
    "none-kept-but-the-batch": ("sa,sa->a", "sa", "sa"),
    "two-in-the-batch": ("rsba,bsa->rab", "rsba", "sba"),
    "axes-not-as-they-lie": ("ars,as->ra", "rsa", "sa"),
    "both-have-own-few-summed": ("rsa,usa->rua", "rsa", "usa"),
    "both-have-own-few-kept": ("wba,wua->bua", "wba", "wua"),
    "both-have-own-two-summed": ("wtba,twua->uba", "wtba", "twua"),
    "both-have-own-the-other-way": ("usa,rsa->aur", "usa", "rsa"),
}


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, given=(), keywords=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*given, **(keywords or {}))


def stored(labels: str, lie: str) -> torch.Tensor:
    return torch.randn([SIZE[x] for x in lie], dtype=torch.float64).permute([lie.index(x) for x in labels])


@pytest.mark.parametrize("add", [None, False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_contraction_and_copies_nothing(case, add):
    equation, *lies = case
    one, other = (stored(labels, lie) for labels, lie in zip(equation.split("->")[0].split(","), lies, strict=True))
    expected = torch.einsum(equation, one, other)
    place = torch.randn_like(expected)
    into = None if add is None else pair.Target(place.clone(), add)
    with torch.no_grad(), Calls() as calls:
        found = pair.multiply(pair.pair_of(equation), one, other, into=into)
    torch.testing.assert_close(found, expected + place if add else expected)
    assert {"addcmul_", "sum"} & set(calls.names) and not {"bmm", "clone", "baddbmm"} & set(calls.names)


@pytest.mark.parametrize(
    ("equation", "lies"),
    [
        ("rsa,sa->ra", ("rsa", "as")),  # it runs fastest in one alone
        ("rsa,sa->ra", ("ars", "as")),
        ("wba,wua->bua", ("wab", "wua")),
        ("wra,rua->wua", ("wra", "rua")),  # both have something of their own, and it is gone through too often
        ("wsa,uwa->sua", ("wsa", "uwa")),
        ("wxa,yxa->wya", ("wxa", "yxa")),  # 8 and 5, which is more than 32
        ("rs,s->r", ("rs", "s")),  # no batch
        ("rsb,sb->rb", ("rsb", "sb")),  # a short one
    ],
)
def test_what_is_something_else_is_left_alone(equation, lies):
    size = SIZE | {"u": 9, "x": 8, "y": 5}
    assert entrywise.fastest(pair.pair_of(equation), lies, size) is None


def test_passes_are_priced_where_both_have_something_of_their_own():
    assert pair.lies_of("rsa,usa->rua", ["rsa", "usa"], SIZE, True) == ("rua", 6 * 4 * 2 * 100 // 6, 0)
    assert pair.lies_of("rsa,sa->ra", ["rsa", "sa"], SIZE, True) == ("ra", 0, 0)


def test_neighbours_have_to_be_neighbours():
    wide = torch.randn(6, 4, 100, 2)[..., 0]
    assert entrywise.lie(wide, "rsa") == "" and entrywise.lie(wide.contiguous(), "rsa") == "rsa"
    assert entrywise.lie(torch.tensor(1.0), "") == ""


def test_gradients_of_cp_copy_no_factor():
    """All products of factors of one rank have it at their end."""
    structure = CP(outs=(16, 12), ins=(10, 16), rank=300)
    factors = {name: value.requires_grad_() for name, value in structure.init(0.02).items()}
    x = torch.randn(300, 160)
    y = structure.apply(factors, x)
    with Calls() as calls:
        y.sum().backward()
    assert "addcmul_" in calls.names
    assert not any(name == "baddbmm" for name in calls.names), calls.names


@pytest.mark.parametrize("rows", [1, 40, 300, 1100])
def test_a_long_rank_is_summed_in_slices(rows, monkeypatch):
    """By whatever way: the numbers are those of ``W``, for autograd, too, and x and the factors are all that is kept."""
    monkeypatch.setattr(added, "SLICE", 30)
    monkeypatch.setattr(contract, "CACHED", 100)
    added._sliced.cache_clear()
    structure = CP(outs=(20, 10), ins=(16, 10), rank=70, weighted=True)
    factors = {k: v.double().requires_grad_() for k, v in structure.init(0.5).items()}
    x, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((rows, 160), (200,)))
    leaves = [x, bias, *factors.values()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        y = structure._apply(factors, x, bias)
    expected = x @ structure.dense(factors).T + bias
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((value * weight).sum(), leaves) for value in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    known = {value.untyped_storage().data_ptr() for value in leaves}
    assert {value.untyped_storage().data_ptr() for value in kept} <= known
    (place,) = structure.normal_form()
    assert added._sliced(contract._slim(place.diagram), 512, contract.worth_of("cpu"), False) is not None
    added._sliced.cache_clear()
