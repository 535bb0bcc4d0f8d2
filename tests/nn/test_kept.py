"""Kept matrices: the same outputs, in evaluation only, never those of factors that have changed, within their limit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tenfold.nn import FactorizedLinear
from tenfold.nn.kept import keep_matrices, offer
from tenfold.structure import Dense, Kronecker, LowRank, TensorTrain, contract
from tenfold.structure.contract import BUCKETS

DEAR = TensorTrain(
    outs=(8, 8, 8), ins=(8, 8, 8), ranks=(48, 48)
)  # costs more than the dense matrix at any number of rows
CHEAP = LowRank(out_features=512, in_features=512, rank=4)


def layer(structure) -> FactorizedLinear:
    made = FactorizedLinear(structure)
    made.set_factors(structure.init(0.1))
    nn.init.normal_(made.bias)
    return made.eval()


def test_a_matrix_is_not_kept_twice():
    """Narrowed layers hold a matrix: making it would copy it, and gain nothing."""
    for mode, limit in (("auto", 2**40), ("speed", None)):
        one = layer(Dense(out_features=512, in_features=384))
        assert keep_matrices(one, mode, limit)["bytes"] == 0 and not one.keeps


@torch.no_grad()
def test_low_rank_keeps_its_matrix_where_it_is_told_to_and_goes_by_its_factors_elsewhere():
    one = layer(CHEAP)
    one.keeps = frozenset({1})
    expected = nn.functional.linear(few := torch.randn(20, 512), one.dense(), one.bias)
    torch.testing.assert_close(one(few), expected)
    assert one._again.kept is None
    torch.testing.assert_close(one(few[:1]), expected[:1])
    assert one._again.kept is not None


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"dear": layer(DEAR), "twin": layer(DEAR), "cheap": layer(CHEAP)}).eval()


def made(model, monkeypatch) -> list:
    """Which layers make their matrix from now on."""
    found = []
    for name in ("dear", "twin", "cheap"):
        one = model[name].structure
        dense = type(one).dense
        monkeypatch.setattr(
            type(one), "dense", lambda self, factors, dense=dense: found.append(self) or dense(self, factors)
        )
        if name == "dear":
            break
    return found


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_outputs_are_those_of_the_factors(model, rows, monkeypatch):
    x = torch.randn(rows, 512)
    with torch.no_grad():
        expected = model["dear"](x)
        keep_matrices(model, "speed")
        found = made(model, monkeypatch)
        for _ in range(2):
            torch.testing.assert_close(model["dear"](x), expected, rtol=1e-4, atol=1e-4)
    assert len(found) == 1, "made once"


def test_a_matrix_that_is_kept_serves_few_rows_unless_they_are_much_cheaper_without():
    near = TensorTrain(outs=(8, 8, 12, 1), ins=(8, 8, 8, 6), ranks=(64, 64, 64))  # 0.9 of the price of a row of W
    far = Kronecker(outs=(192, 4), ins=(192, 4), terms=7)  # half of it
    for structure, expected in ((near, True), (far, False)):
        rows = offer(FactorizedLinear(structure)).rows
        assert rows and (min(BUCKETS) in rows) is expected


def test_who_gains_nothing_keeps_nothing(model):
    keep_matrices(model, "speed")
    assert model["dear"].keeps and not model["cheap"].keeps


def test_training_goes_through_the_factors_without_gradients_too(model, monkeypatch):
    keep_matrices(model, "speed")
    found = made(model, monkeypatch)
    with torch.no_grad():
        model.train()["dear"](torch.randn(40, 512))
    assert not found


def test_auto_takes_what_gains_most_for_its_bytes():
    less = TensorTrain(outs=(8, 8, 8), ins=(8, 8, 8), ranks=(30, 30))
    for names in (("dear", "less"), ("less", "dear")):
        both = nn.ModuleDict({name: layer(DEAR if name == "dear" else less) for name in names})
        assert keep_matrices(both, "speed")["layers"] == 2
        factors = sum(one.structure.numel * 4 for one in both.values())
        assert keep_matrices(both, "auto", factors + 4 * 512 * 512)["layers"] == 1 and both["dear"].keeps


def test_auto_stays_within_its_limit(model):
    size = 4 * 512 * 512
    factors = sum(p.numel() * 4 for m in model.values() for name, p in m.named_parameters() if name != "bias")
    assert keep_matrices(model, "auto", factors + 2 * size)["layers"] == 2
    assert keep_matrices(model, "auto", factors + 2 * size - 1) == {
        "mode": "auto", "layers": 1, "bytes": size, "limit": factors + 2 * size - 1,
    }  # fmt: skip
    assert keep_matrices(model, "auto")["layers"] == 1  # the factors take as much as 1.2 of three
    assert keep_matrices(model, "memory") == {
        "mode": "memory",
        "layers": 0,
        "bytes": 0,
        "limit": 3 * size,
    }
    with pytest.raises(ValueError, match=r"no mode 'fast'; take one of auto, speed, memory"):
        keep_matrices(model, "fast")
    with pytest.raises(ValueError, match="a limit of -5 bytes is less than nothing"):
        keep_matrices(model, "auto", -5)
    with pytest.raises(ValueError, match="mode speed has no limit; leave that of 5 bytes out"):
        keep_matrices(model, "speed", 5)


def change_in_place(one):
    with torch.no_grad():
        one.core_0.mul_(2)


def load(one):
    one.load_state_dict({name: 2 * value for name, value in one.state_dict().items()})


def replace(one):
    one.core_1 = nn.Parameter(torch.randn_like(one.core_1))


def fused_step(one):
    """Writes behind torch's back: no version of a tensor changes."""
    with torch.enable_grad():
        one.structure.apply(one.factors(), torch.ones(2, 512)).sum().backward()
    torch.optim.AdamW(one.parameters(), 0.1, fused=True).step()


@pytest.mark.parametrize("change", [change_in_place, load, replace, fused_step, lambda one: one.double().float()])
def test_a_changed_factor_is_noticed(model, change):
    one, x = model["dear"], torch.randn(40, 512)
    keep_matrices(model, "speed")
    with torch.no_grad():
        one(x)
        change(one)
        torch.testing.assert_close(one(x), x @ one.dense().T + one.bias, rtol=1e-4, atol=1e-4)


def test_steps_of_another_model_leave_the_matrix_of_a_frozen_layer(model):
    one, x, other = model["dear"].requires_grad_(False), torch.randn(40, 512), nn.Linear(2, 2)
    keep_matrices(model, "speed")
    with torch.no_grad():
        one(x)
    kept = one._again.kept
    other(torch.ones(2)).sum().backward()
    torch.optim.AdamW(other.parameters()).step()
    assert kept is not None and one._again.kept is kept


def test_training_goes_through_the_factors(model):
    one, x = model["dear"], torch.randn(40, 512)
    keep_matrices(model, "speed")
    with torch.no_grad():
        one(x)
    assert one._again.kept is not None
    one.train()
    assert one._again.kept is None
    one(x).sum().backward()
    assert all(p.grad is not None for p in one.parameters())
    one.eval()
    one(x).sum().backward()  # gradients are wanted in evaluation too
    assert one._again.kept is None


def test_copies_and_checkpoints_leave_it_behind(model):
    one, x = model["dear"], torch.randn(40, 512)
    keep_matrices(model, "speed")
    with torch.no_grad():
        expected = one(x)
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert other._again.kept is None and other.keeps == one.keeps
            torch.testing.assert_close(other(x), expected)
    assert set(one.state_dict()) == {"core_0", "core_1", "core_2", "bias"}


def test_inference_mode_and_autocast(model):
    one, x = model["dear"], torch.randn(40, 512)
    keep_matrices(model, "speed")
    with torch.inference_mode():
        expected = one(x)
    with torch.no_grad():
        torch.testing.assert_close(one(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert one(x).dtype == torch.bfloat16
    one(x).sum().backward()


def test_equal_layers_gain_equally():
    """A structure that needs fewer FLOPs than the dense matrix is left alone."""
    model = nn.ModuleDict({"kronecker": layer(Kronecker(outs=(512, 2), ins=(512, 2), terms=1))})
    assert keep_matrices(model, "speed")["layers"] == 0


def rows_of(one, rows: int = 3000):
    return torch.randn(rows, one.in_features, generator=torch.Generator().manual_seed(rows))


def train_step(one, optimizer, batches: int, before=lambda number: None) -> list:
    """The gradients of a step over some micro-batches, ``before`` called ahead of each."""
    optimizer.zero_grad()
    for number in range(batches):
        before(number)
        one(rows_of(one, 3000 + number)).square().mean().backward()
    found = [p.grad.clone() for p in one.parameters()]
    optimizer.step()
    return found


@pytest.fixture
def trained(monkeypatch):
    """A layer in training that keeps its matrix, its optimizer, and the matrices that were made."""
    torch.manual_seed(0)
    one, found, dense = layer(DEAR).train(), [], contract.dense
    keep_matrices(one, "speed")
    monkeypatch.setattr(contract, "dense", lambda *given: found.append(dense(*given)) or found[-1])
    return one, torch.optim.SGD(one.parameters(), lr=1e-3), found


def test_a_matrix_is_used_again_by_the_next_micro_batch(trained):
    one, optimizer, found = trained
    counts = []
    for _ in range(4):
        before = len(found)
        other = copy.deepcopy(one)
        keep_matrices(other, "memory")
        expected = train_step(other, torch.optim.SGD(other.parameters(), lr=1e-3), 3)
        got = train_step(one, optimizer, 3)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
        counts.append(len(found) - before)
        assert not one._again._made
    assert counts == [3, 1, 1, 1], "the first step does not know that there are several"


def test_who_sums_over_no_micro_batches_holds_no_matrix(trained):
    one, optimizer, found = trained
    for _ in range(3):
        train_step(one, optimizer, 1)
        assert not one._again._made
    assert len(found) == 3


@pytest.mark.parametrize("what", ["written", "replaced", "unseen", "mode", "moved"])
def test_a_matrix_of_factors_that_changed_is_not_used_again(what, trained):
    one, optimizer, _ = trained
    name = next(iter(one.structure.factor_shapes()))

    def change(number: int) -> None:
        factor = getattr(one, name)
        if number != 1:
            return
        if what == "written":
            with torch.no_grad():
                factor.mul_(2.0)
        elif what == "replaced":
            setattr(one, name, nn.Parameter(factor.detach() * 2.0))
        elif what == "unseen":  # an optimizer that writes behind torch's back
            factor.data.mul_(2.0)
            torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()
        elif what == "mode":
            factor.data.mul_(2.0)
            one.train()
        else:
            factor.data.mul_(2.0)
            one.float()

    train_step(one, optimizer, 2)
    changed = []
    one.register_forward_hook(lambda module, given, y: changed.append((given[0], y.detach(), module.dense().detach())))
    train_step(one, optimizer, 2, change)
    for x, y, w in changed:
        torch.testing.assert_close(y, nn.functional.linear(x, w, one.bias), rtol=1e-3, atol=1e-2)


def test_under_autocast_nothing_is_held_nor_is_it_copied(trained):
    one, optimizer, _ = trained
    train_step(one, optimizer, 2)
    held = []
    train_step(one, optimizer, 3, lambda number: held.append(len(one._again._made)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_step(one, optimizer, 3, lambda number: held.append(len(one._again._made)))
    assert held == [0, 1, 1, 0, 0, 0]
    one._again._held.append(torch.ones(1))
    assert not copy.deepcopy(one)._again._held and not pickle.loads(pickle.dumps(one))._again._held
