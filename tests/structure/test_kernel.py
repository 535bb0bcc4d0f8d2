"""The kernel for GPUs, on one or by Triton's interpreter: its contractions are those of einsum, and layers do not change."""

import subprocess
import sys
from itertools import permutations
from random import Random

import pytest
import torch
from cases import FAMILIES, each

from tenfold.structure import BlockTrain, Kronecker, LowRank, TensorTrain, contract, pair, plan

pytest.importorskip("triton", reason="Triton is not installed")
kernel = pytest.importorskip("tenfold.structure.kernel")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRUCTURES = {
    "Kronecker sum": Kronecker(outs=(6, 8), ins=(5, 4), terms=3),
    "block train": BlockTrain(outs=(6, 5), ins=(4, 7), rank=3),
    "tensor train": TensorTrain(outs=(4, 3, 5), ins=(3, 4, 2), ranks=(5, 4)),
}
EQUATIONS = [
    "abc,cd->adb",
    "abc,bcd->bad",
    "abcd,bce->dae",
    "abcd,cbea->ebad",
    "ab,cbd->dca",
    "abcd,bd->ca",
    "ba,bc->ac",
]


@pytest.fixture
def kernels(monkeypatch):
    """Kernels are on, for small tensors too; the equations that went through one."""
    used, contracted = [], kernel.contract

    def spied(how, *given):
        used.append(f"{how.one},{how.other}->{how.kept}")
        return contracted(how, *given)

    monkeypatch.setattr(kernel, "contract", spied)
    monkeypatch.setattr(plan, "SMALL", 0)
    pair.KERNELS.add(DEVICE)
    with torch.device(DEVICE):
        yield used
    pair.KERNELS.discard(DEVICE)


def drawn(labels: str, size: dict[str, int], luck: Random) -> torch.Tensor:
    """A tensor whose axes lie in memory in any order, with room between them or not."""
    order = list(labels)
    luck.shuffle(order)
    room = [size[x] + luck.choice([0, 3]) for x in order]
    value = torch.randn(room, device=DEVICE)[tuple(slice(size[x]) for x in order)]
    return value.permute([order.index(x) for x in labels])


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("parts", [1, 4])
def test_contractions_are_those_of_einsum_however_operands_lie(equation, parts, monkeypatch):
    luck, how = Random(equation), pair.pair_of(equation)
    torch.manual_seed(0)
    size = {x: luck.choice([1, 3, 7, 18]) for x in "abcde"}
    size[how.summed[0]] = 150  # more than a block
    monkeypatch.setattr(kernel, "_parts", lambda tiles, summed: parts)
    one, other = (drawn(labels, size, luck) for labels in (how.one, how.other))
    expected = torch.einsum(equation, one.double(), other.double())
    result = drawn(how.kept, size, luck)
    added = drawn(how.kept[-1], size, luck).expand_as(result)
    for extra in (None, added, result):
        before = 0.0 if extra is None else extra.double()
        wanted = expected + before
        assert kernel.contract(how, one, other, result, extra) is result
        torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=1e-4)


def test_long_sums_are_cut_where_there_are_few_tiles():
    assert kernel._parts(1000, 10**6) == 1 and kernel._parts(1, 2048) == 1
    assert kernel._parts(1, 10**6) == 128 and kernel._parts(4, 8192) == 4


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_labels_that_are_one_axis_in_every_tensor_become_one(order):
    value = torch.empty([(5, 3, 4)[k] for k in order]).permute([order.index(k) for k in range(3)])
    sizes, (one, other) = kernel._axis((5, 3, 4), value.stride(), (12, 4, 1))
    places = [(0, 0)]
    for size, a, b in zip((*sizes, 60), one, other, strict=True):  # the slowest label is as long as what is left
        places = [(i + k * a, j + k * b) for k in range(size) for i, j in places][:60]
    expected = [(int(i), j) for j, i in enumerate(torch.arange(60).as_strided((5, 3, 4), value.stride()).flatten())]
    labels = {(0, 1, 2): 1, (1, 2, 0): 2, (2, 0, 1): 2}
    assert len(sizes) + 1 == labels.get(order, 3) and places == expected


@each(STRUCTURES | {name: s for name, s in FAMILIES.items() if not name.startswith("dense")})
@pytest.mark.parametrize("rows", [1, 50])
def test_layers_do_not_change(structure, rows, kernels):
    torch.manual_seed(0)
    factors = {name: value.requires_grad_(value.is_floating_point()) for name, value in structure.init(0.5).items()}
    trained = [value for value in factors.values() if value.requires_grad]
    x, bias = (
        torch.randn(rows, structure.shape[1], requires_grad=True),
        torch.randn(structure.shape[0], requires_grad=True),
    )
    upstream = torch.randn(rows, structure.shape[0])
    expected = x @ structure.dense(factors).T + bias
    found = structure._apply(factors, x, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(structure._apply(factors, x, bias), expected, rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(expected, [x, bias, *trained], upstream)
    for one, other in zip(torch.autograd.grad(found, [x, bias, *trained], upstream), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@each(STRUCTURES)
def test_forward_and_back_go_through_it(structure, kernels, monkeypatch):
    monkeypatch.setattr(contract, "_through_dense", lambda *given: False)
    monkeypatch.setattr(contract, "cheaper", lambda *given: True)
    contract.forward_plans.cache_clear()
    factors = {name: value.requires_grad_(True) for name, value in structure.init(0.5).items()}
    x = torch.randn(64, structure.shape[1], requires_grad=True)
    y = structure._apply(factors, x)
    forward = len(kernels)
    y.sum().backward()
    assert 0 < forward < len(kernels)
    contract.forward_plans.cache_clear()


def test_what_lies_well_is_left_to_the_vendor(kernels):
    structure = LowRank(out_features=40, in_features=30, rank=7)
    structure._apply(structure.init(0.5), torch.randn(64, 30))
    assert not kernels


@torch.no_grad()
def test_results_are_written_where_they_belong(kernels):
    """Both operands lie well, and the product does not."""
    one, other = torch.randn(5, 6, 7), torch.randn(7, 8)
    expected, how = torch.einsum("abc,cd->adb", one, other), pair.pair_of("abc,cd->adb")
    found = pair.multiply(how, one, other)
    assert kernels and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    target = pair.Target(torch.ones(5, 8, 6), add=True, bias=torch.randn(8, 1))
    assert pair.multiply(how, one, other, into=target) is target.tensor
    torch.testing.assert_close(target.tensor, expected + 1 + target.bias, rtol=1e-4, atol=1e-4)


def test_far_apart_is_too_far():
    assert kernel.serves(torch.empty(1).expand(2**31)) and not kernel.serves(torch.empty(2**31 + 1, device="meta"))


def test_types_that_it_does_not_know_take_the_plain_path(kernels):
    structure = STRUCTURES["block train"]
    factors = {name: value.double() for name, value in structure.init(0.5).items()}
    x = torch.randn(64, structure.shape[1], dtype=torch.float64)
    torch.testing.assert_close(structure._apply(factors, x), x @ structure.dense(factors).T)
    assert not kernels


def test_it_is_off_until_it_was_measured():
    assert not pair.KERNELS


TOLD = """
import torch
torch.backends.fp32_precision = {said!r}
from tenfold.structure import kernel
assert kernel._tf32() is {expected}
"""


@pytest.mark.parametrize("said, expected", [("tf32", True), ("ieee", False), ("none", False)])
def test_how_exact_float32_is_follows_torch_however_it_was_said(said, expected):
    """In a process of its own: torch refuses to be told in two ways."""
    done = subprocess.run(
        [sys.executable, "-c", TOLD.format(said=said, expected=expected)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
