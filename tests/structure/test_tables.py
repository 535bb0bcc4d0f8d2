"""The matrix of a head is never whole: neither in compiled code nor on another device than a processor."""

from contextlib import nullcontext

import pytest
import torch
from cases import each
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.structure import Kronecker, RowTrain, TensorTrain, contract, rebuild

OUT, IN, ROWS = 300, 12, 2100
STRUCTURES = {
    "kronecker": Kronecker(outs=(60, 5), ins=(4, 3), terms=2),
    "tensor_train": TensorTrain(outs=(25, 4, 3), ins=(2, 3, 2), ranks=(5, 3)),
    "row_train": RowTrain(out_features=OUT, ins=(4, 3), ranks=(2,)),
}


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor had that was made, products with ``x`` left out."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, given=(), keywords=None):
        made = function(*given, **(keywords or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor) and ROWS not in one.shape:
                self.numbers = max(self.numbers, one.numel())
        return made


@pytest.fixture(params=[7, 300])
def table(request, monkeypatch):
    """``W`` is made, and larger than is allowed: by parts that don't divide it, or as a whole (a check of the checks)."""
    monkeypatch.setattr(rebuild, "TABLE", OUT * IN // request.param if request.param < OUT else 1)
    monkeypatch.setattr(rebuild, "SOME", request.param)
    monkeypatch.setattr(contract, "cheaper", lambda *given: False)
    monkeypatch.setattr(contract, "_through_dense", lambda *given: True)
    known = (contract.forward_plans, rebuild._cut)
    for one in known:
        one.cache_clear()
    torch._dynamo.reset()
    yield
    for one in known:
        one.cache_clear()
    torch._dynamo.reset()


@pytest.mark.traced
@each(STRUCTURES)
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_code_makes_it_in_parts(structure, bias, table):
    factors, x = structure.init(0.5), torch.randn(ROWS, IN)
    given = torch.randn(OUT) if bias else None
    expected = x @ structure.dense(factors).T + (0 if given is None else given)
    largest = Largest()

    def watched(graph, _):
        def run(*given):
            with largest:
                return graph.forward(*given)

        return run

    compiled = torch.compile(lambda f, x: structure._apply(f, x, given), backend=watched, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(factors, x), expected, rtol=1e-4, atol=1e-4)
    assert 0 < largest.numbers < OUT * IN

    leaves = {name: value.requires_grad_() for name, value in factors.items()}
    weight = torch.randn(ROWS, OUT)
    ours = torch.autograd.grad((compiled(leaves, x) * weight).sum(), list(leaves.values()))
    theirs = torch.autograd.grad((x @ structure.dense(leaves).T * weight).sum(), list(leaves.values()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@each(STRUCTURES)
def test_another_device_makes_it_in_parts_and_its_gradient(structure, table, monkeypatch):
    """The device that has no numbers, and knows of no autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *given: False)
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())
    factors = {name: value.to("meta").requires_grad_() for name, value in structure.init(0.5).items()}
    x = torch.empty(ROWS, IN, device="meta", requires_grad=True)
    with Largest() as largest:
        structure._apply(factors, x).backward(torch.empty(ROWS, OUT, device="meta"))
    assert 0 < largest.numbers < OUT * IN
    assert all(value.grad.shape == value.shape for value in (x, *factors.values()))


@pytest.mark.parametrize(
    ("outs", "inner", "parts"), [((786, 64), 768, 2), ((1024, 250), 8192, 16), ((32, 32), 1024, 1)]
)
def test_a_table_has_sixteen_parts_at_most(outs, inner, parts):
    """GPT-2's; one of 256,000 entries; a matrix of a layer has none."""
    (place,) = Kronecker(outs=outs, ins=(inner // 32, 32), terms=2).normal_form()
    cut = rebuild.cut_of_table(place.diagram)
    assert (cut is None) == (parts == 1) and (cut is None or -(-outs[0] // cut[2]) == parts)
