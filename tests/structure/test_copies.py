"""Copies into another order: bit for bit those of NumPy, and in wide numbers where only a few lie together."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.structure import BlockTrain, contract, products

TYPES = [torch.float32, torch.float64, torch.bfloat16]


class Copied(TorchDispatchMode):
    """The types of what is copied."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, function, types, given=(), keywords=None):
        if function.__name__.split(".")[0] in ("copy_", "clone"):
            self.types.append(given[0].dtype)
        return function(*given, **(keywords or {}))


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(products, "LONG", 1)


def bits(value: torch.Tensor) -> np.ndarray:
    return value.contiguous().view(torch.uint8).numpy()


def blocks(run: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """``(b, n, c, run)``, which lies as ``(c, n, b, run)``, with numbers that are none."""
    flat = torch.randn(offset + 5 * 7 * 6 * run, generator=torch.Generator().manual_seed(run)).to(dtype)
    flat[offset::11] = float("nan")
    return flat[offset:].view(5, 7, 6, run).permute(2, 1, 0, 3)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("run", range(1, 18))
def test_a_packed_tensor_has_the_same_bits(run, dtype):
    value = blocks(run, dtype)
    expected = np.ascontiguousarray(bits(value.permute(2, 1, 0, 3)).reshape(5, 7, 6, -1).transpose(2, 1, 0, 3))
    with torch.no_grad(), Copied() as copied:
        packed = products.packed(value)
    assert packed.is_contiguous() and (bits(packed).reshape(expected.shape) == expected).all()
    length = run * dtype.itemsize
    wide = {16: torch.complex128, 8: torch.float64}[16 if length % 16 == 0 else 8] if length % 8 == 0 else dtype
    assert set(copied.types) == {wide if length <= products.RUN else dtype}


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_numbers_between_two_wide_ones_are_copied_one_by_one(offset):
    value = blocks(4, torch.float32, offset)
    with torch.no_grad(), Copied() as copied:
        packed = products.packed(value)
    assert torch.equal(packed.nan_to_num(9), value.nan_to_num(9))
    assert set(copied.types) == {torch.complex128 if offset == 0 or offset == 4 else torch.float32}


def test_what_lies_around_a_target_stays(monkeypatch):
    around = torch.zeros(6, 7, 5, 12)
    with torch.no_grad():
        products.put(around[..., 4:8], blocks(4, torch.float32).nan_to_num(9))
    assert torch.equal(around[..., 4:8], blocks(4, torch.float32).nan_to_num(9))
    assert not around[..., :4].any() and not around[..., 8:].any()


@pytest.mark.parametrize("case", ["other type", "broadcast", "one run", "transposed"])
def test_other_copies_are_plain(case):
    value = blocks(4, torch.float32).nan_to_num(9)
    target = torch.empty(6, 7, 5, 4, dtype=torch.float64 if case == "other type" else torch.float32)
    value = {"broadcast": value[:, :1], "one run": value.contiguous(), "transposed": value.mT.contiguous().mT}.get(
        case, value
    )
    with torch.no_grad(), Copied() as copied:
        products.put(target, value)
    assert torch.equal(target, value.expand_as(target).to(target.dtype))
    assert not any(kind.is_complex for kind in copied.types)


def test_gradients_pass_through_a_packed_tensor():
    value = blocks(4, torch.float32).nan_to_num(9).requires_grad_()
    products.packed(value).square().sum().backward()
    torch.testing.assert_close(value.grad, 2 * value.detach())


def test_a_block_train_copies_wide_numbers():
    structure = BlockTrain(outs=(32, 16), ins=(16, 32), rank=4)
    factors, x = structure.init(0.02), torch.randn(600, 512)
    with torch.no_grad(), Copied() as copied:
        y = structure.apply(factors, x)
    assert torch.complex128 in copied.types
    torch.testing.assert_close(y, x @ structure.dense(factors).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [200, 512, 1000, 1024, 4096, 5000])
def test_parts_are_of_nearly_equal_odd_numbers_of_rows(rows):
    (place,) = BlockTrain(outs=(64, 48), ins=(32, 24), rank=8).normal_form()
    plan, _ = contract.forward_plans(place.diagram, contract.bucket(rows))
    with torch.no_grad():
        part = contract._part(plan, place.diagram, torch.empty(rows, 768), False)
    last = rows % part or part
    assert part % 2 == 1 and part - last <= 2 * -(-rows // part)
