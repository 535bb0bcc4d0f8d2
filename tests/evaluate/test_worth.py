"""What was measured on a machine decides its plans; what is counted does not depend on it."""

import json

import pytest
import torch

from tenfold.api import calibrate
from tenfold.evaluate import worth
from tenfold.nn.worth import folder, keep_measured, read_measured
from tenfold.structure import BlockTrain, Kronecker, LowRank, contract
from tenfold.structure.pair import KERNELS
from tenfold.structure.products import ROWS
from tenfold.structure.worth import CPU, MEASURED, SHIPPED, Worth, worth_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield
    forget()


def forget():
    read_measured.cache_clear()
    MEASURED.clear()
    KERNELS.clear()
    ROWS.clear()
    ROWS["cpu"] = 32


def test_what_is_measured_is_stored_and_used():
    assert worth_of("cpu") == SHIPPED["cpu"]
    found = calibrate("cpu")
    assert worth_of("cpu") == Worth(**found["worth"]) and str(folder() / "worth-cpu.json") == found["file"]
    MEASURED.clear()
    read_measured()
    assert worth_of("cpu") == Worth(**found["worth"]), "in the next process, too"
    assert min(found["worth"]["moved"], found["worth"]["call"], found["flops_per_second"]) > 0
    assert json.loads((folder() / "worth-cpu.json").read_text())["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"worth": {"moved": 1}}', '{"worth": {"moved": 1, "copied": 2, "call": 3, "x": 4}}', "[]"]
)
def test_a_file_that_says_nothing_is_left_aside(text):
    folder().mkdir(parents=True)
    (folder() / "worth-cpu.json").write_text(text)
    read_measured()
    assert worth_of("cpu") == SHIPPED["cpu"]


def test_a_file_of_an_earlier_version_has_what_was_not_measured_then_from_here():
    folder().mkdir(parents=True)
    (folder() / "worth-cpu.json").write_text('{"worth": {"moved": 1, "copied": 2, "call": 3}}')
    read_measured()
    assert worth_of("cpu") == Worth(1, 2, 3, SHIPPED["cpu"].narrow) and worth_of("cpu").narrow > 0


def test_what_was_measured_with_other_threads_or_on_another_gpu_is_left_aside(monkeypatch):
    keep_measured("cpu", CPU, {"threads": torch.get_num_threads() + 1})
    keep_measured("cuda", CPU, {"device": "another", "kernels": 2.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "this one")
    MEASURED.clear(), KERNELS.clear()
    read_measured()
    assert not MEASURED and not KERNELS


def test_a_kernel_that_gives_other_numbers_is_never_used(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from tenfold.structure import kernel

    monkeypatch.setattr(worth, "TWO_FACTORS", (Kronecker(outs=(8, 16), ins=(8, 16), terms=1),))
    monkeypatch.setattr(worth, "ROWS", 512)
    monkeypatch.setattr(worth, "turns", lambda ours, plain, *_: [(1.0, 2.0)])
    contracted = kernel.contract
    assert worth._kernels(torch.device("cpu"), torch.float32) == 2.0
    monkeypatch.setattr(kernel, "contract", lambda *given: contracted(*given).mul_(1.1))
    assert worth._kernels(torch.device("cpu"), torch.float32) == 0.0


def test_a_kernel_is_used_where_it_was_faster():
    keep_measured("cuda", CPU, {"kernels": 1.2})
    KERNELS.clear()
    read_measured()
    assert {"cuda"} == KERNELS, "in the next process, too"
    for slower in (0.9, None):
        keep_measured("cuda", CPU, {"kernels": slower})
        assert not KERNELS


@pytest.mark.parametrize("slower", [1, 8, 1000])
def test_few_rows_are_multiplied_in_parts_up_to_where_that_is_slower(slower, monkeypatch):
    def turns(ours, plain, device, repeats):
        rows = ours.args[1].shape[0]
        ours(), plain()
        return [(1.0, 0.5 if rows >= slower else 2.0)]

    monkeypatch.setattr(worth, "turns", turns)
    found = worth._rows(torch.device("cpu"))
    assert found == {1: 0, 8: 4, 1000: 64}[slower] and ROWS == {"cpu": 32}, "measuring changes nothing"
    keep_measured("cpu", CPU, {"rows": found})
    assert {"cpu": found} == ROWS
    ROWS["cpu"] = 32
    read_measured()
    assert {"cpu": found} == ROWS, "in the next process, too"
    keep_measured("cpu", CPU, {})
    assert {"cpu": found} == ROWS, "of a version that does not know it"


@pytest.mark.parametrize("on", [True, False])
def test_measuring_the_kernel_changes_nothing(on, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from tenfold.structure import kernel

    structures = BlockTrain(outs=(4, 8), ins=(4, 16), rank=4), Kronecker(outs=(8, 16), ins=(8, 16), terms=1)
    monkeypatch.setattr(worth, "TWO_FACTORS", structures)
    monkeypatch.setattr(worth, "ROWS", 512)
    monkeypatch.setattr(worth, "TURNS", 1)
    used, contracted = [], kernel.contract
    monkeypatch.setattr(kernel, "contract", lambda *given: used.append(given) or contracted(*given))
    KERNELS.update({"cpu"} if on else {})
    assert 0 < worth._kernels(torch.device("cpu"), torch.float32) < 1, "an interpreter is slower"
    assert used and ({"cpu"} if on else set()) == KERNELS


def test_unknown_accelerators_are_taken_for_the_known_one():
    assert worth_of("xpu") == SHIPPED["cuda"] and worth_of("cuda") == SHIPPED["cuda"]


def test_plans_follow_the_machine_and_counts_do_not():
    """Where moving a number costs everything, ``W`` is made: what lies between two products is larger."""
    structure = LowRank(out_features=512, in_features=512, rank=200)
    diagram, factors, x = structure.normal_form()[0].diagram, structure.init(0.3), torch.randn(300, 512)
    flops, expected = structure.flops(2048), structure.apply(factors, x)
    assert contract._known_forward_plans(diagram, 2048, "cpu")[1] is None
    keep_measured("cpu", Worth(1e9, 0.0, 0.0), {})
    assert contract._known_forward_plans(diagram, 2048, "cpu")[1] is not None
    assert structure.flops(2048) == flops
    torch.testing.assert_close(structure.apply(factors, x), expected, rtol=1e-4, atol=1e-4)
