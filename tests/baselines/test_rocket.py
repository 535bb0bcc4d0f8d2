"""ROCKET against loops in plain NumPy: the support, the least squares, the bytes, the budget."""

import copy
import math

import numpy as np
import pytest
import torch
from plain import text
from toys import build
from transformers import AutoModelForCausalLM

from tenfold.api import compress
from tenfold.baselines.rocket import (
    REFILL,
    RIDGE,
    SHARES,
    count_bytes,
    decompose,
    fit_dictionary,
    list_sizes,
    relative_error,
    select_coefficients,
)
from tenfold.models.model_card import save_compressed
from tenfold.models.recipe import Budget, load_recipe
from tenfold.models.sites import count_parameters, find_sites, weight_of
from tenfold_cli.output import format_counts

seeds = pytest.mark.parametrize("seed", range(3))


def recipe(keep: float):
    return load_recipe("rocket").model_copy(update={"budget": Budget.model_construct(keep=keep, of="blocks")})


def problem(seed: int, out: int = 30, inner: int = 20) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(300, inner)) @ draw.normal(size=(inner, inner))
    return draw.normal(size=(out, inner)), x.T @ x / len(x)


def by_hand(w: np.ndarray, second: np.ndarray, atoms: int, nonzeros: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow the paper: Cholesky, eigenvectors, a threshold for every column, a few more, least squares, back."""
    upper = np.linalg.cholesky(second).T
    white = upper @ w.T
    values, vectors = np.linalg.eigh(white @ white.T)
    basis = vectors[:, np.argsort(-values)][:, :atoms]
    v, back = basis.T @ white, np.linalg.inv(upper)
    norms = np.linalg.norm(back @ basis, axis=0)
    mask = np.zeros(v.shape, bool)
    each = max(1, nonzeros // v.shape[1] - round(REFILL * atoms))
    for column in range(v.shape[1]):
        scores = [abs(v[row, column]) ** 0.5 * (abs(v[row, column]) * norms[row]) ** 0.5 for row in range(atoms)]
        mask[np.argsort(scores)[::-1][:each], column] = True
    left = sorted(
        ((abs(v[i, j]) * norms[i], i, j) for i in range(atoms) for j in range(v.shape[1]) if not mask[i, j]),
        reverse=True,
    )
    for _, i, j in left[: nonzeros - int(mask.sum())]:
        mask[i, j] = True
    kept = v * mask
    gram = kept @ kept.T
    gram = gram + RIDGE * np.trace(gram) / atoms * np.eye(atoms)
    return back @ (white @ kept.T @ np.linalg.inv(gram)), kept, mask


@seeds
@pytest.mark.parametrize("atoms, each", [(20, 9), (13, 13), (7, 3)])
def test_product_is_the_papers(seed, atoms, each):
    w, second = problem(seed)
    left, right, _ = by_hand(w, second, atoms, each * 30)
    found = decompose(torch.tensor(w), torch.tensor(second))
    kept = select_coefficients(found, atoms, each * 30)
    assert int((kept != 0).sum()) == each * 30
    made = fit_dictionary(torch.tensor(w), kept)
    np.testing.assert_allclose((made @ kept).numpy(), left @ right, atol=1e-8)
    error = np.linalg.norm(w - (left @ right).T) / np.linalg.norm(w)
    assert relative_error(torch.tensor(w), kept) == pytest.approx(error, abs=1e-7)


def test_some_coefficients_are_chosen_for_all_outputs():
    w, second = problem(5, out=200, inner=160)
    atoms, nonzeros = 150, 60 * 200
    _, _, mask = by_hand(w, second, atoms, nonzeros)
    kept = select_coefficients(decompose(torch.tensor(w), torch.tensor(second)), atoms, nonzeros) != 0
    assert (kept.numpy() == mask).all() and len(set(kept.sum(0).tolist())) > 1


@seeds
def test_no_dictionary_does_better_on_whitened_outputs(seed):
    w, second = problem(seed)
    kept = select_coefficients(decompose(torch.tensor(w), torch.tensor(second)), 15, 8 * 30)
    made, root = fit_dictionary(torch.tensor(w), kept).numpy(), np.linalg.cholesky(second).T

    def lost(left):
        ridge = RIDGE * np.square(kept.numpy()).sum() / 15 * np.square(root @ left).sum()
        return np.square(root @ (w.T - left @ kept.numpy())).sum() + ridge

    for step in np.random.default_rng(seed).normal(size=(20, *made.shape)) * 1e-3:
        assert lost(made) < lost(made + step)


@pytest.mark.parametrize("inner, out, atoms, nonzeros", [(20, 30, 12, 180), (20, 30, 12, 360), (512, 64, 400, 640)])
def test_bytes_are_those_of_the_parts(inner, out, atoms, nonzeros):
    number, pointer, index = 2, 4, 2
    ways = [atoms * out * number, nonzeros * number + math.ceil(atoms * out / 8)]
    ways.append(nonzeros * (number + index) + (out + 1) * pointer)
    assert count_bytes(inner, out, atoms, nonzeros) == inner * atoms * number + min(ways)


def test_every_layout_is_the_cheapest_somewhere():
    assert count_bytes(1, 100, 10, 1000) - 20 == 2000  # dense
    assert count_bytes(1, 100, 10, 500) - 20 == 1000 + 125  # a bit for every entry
    assert count_bytes(1, 100, 1000, 100) - 2000 == 400 + 404  # indices


@pytest.mark.parametrize("inner, out", [(20, 30), (64, 16), (2, 3)])
def test_sizes_fit_and_no_larger_one_does(inner, out):
    for share in SHARES:
        for atoms, nonzeros in list_sizes(inner, out, share):
            assert count_bytes(inner, out, atoms, nonzeros) <= share * 2 * inner * out and atoms <= min(inner, out)
            assert out <= nonzeros <= atoms * out and nonzeros % out == 0


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_report_counts_bytes_and_the_budget_is_theirs(toy, keep):
    before = build(toy)
    after, report = compress(copy.deepcopy(before), recipe(keep), text=text(4, 48))
    shapes = {site.path: site.shape for site in find_sites(before) if site.layer is not None}
    counted = 0
    for choice in report["choices"]:
        (out, inner), (atoms, nonzeros) = shapes[choice["item"]], choice["chosen"]
        counted += count_bytes(inner, out, atoms, nonzeros)
        near = weight_of(after.get_submodule(choice["item"])).detach().double()
        assert torch.linalg.matrix_rank(near, rtol=1e-5) <= atoms
    dense = sum(2 * out * inner for out, inner in shapes.values())
    assert report["counted"] == {"bytes": counted, "dense_bytes": dense, "note": "counted bytes, stored dense"}
    allowed = keep * count_parameters(before, "blocks") - (count_parameters(before, "blocks") - dense // 2)
    assert 0.95 * allowed < counted / 2 <= allowed
    assert count_parameters(after, "blocks") == count_parameters(before, "blocks")


def test_losses_are_relative_errors_of_the_weights():
    before = build("llama")
    after, report = compress(copy.deepcopy(before), recipe(0.7), text=text(4, 48))
    for choice in report["choices"]:
        w, near = (weight_of(m.get_submodule(choice["item"])).detach().double() for m in (before, after))
        assert choice["unit"] == "relative error"
        assert choice["loss"] == pytest.approx(float((w - near).norm() / w.norm()), rel=1e-3)


def test_result_is_an_ordinary_checkpoint(tmp_path):
    after, report = compress(build("gpt2"), recipe(0.7), text=text(4, 48))
    save_compressed(after, tmp_path / "model", report=report)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, after(ids).logits)
    said = f"(counted bytes, stored dense) | {report['counted']['bytes']:,} | {report['counted']['dense_bytes']:,} |"
    assert said in (tmp_path / "model" / "README.md").read_text()
    assert f"stored dense: {report['counted']['dense_bytes']:,} -> {report['counted']['bytes']:,}" in format_counts(
        report
    )


WRONG = {
    "a structure": ({"structure": {"kind": "low_rank"}}, "give it structure {kind: dense}"),
    "a share": ({"keep": 0.5}, "no keep, no bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rules_that_ask_for_more_are_refused(case):
    changes, said = WRONG[case]
    rule = {"role": "mlp.in", "structure": {"kind": "dense"}, "criterion": "rocket"} | changes
    with pytest.raises(ValueError, match=said):
        compress(build("gpt2"), {"replace": [rule], "budget": {"keep": 0.5}, "calibrate": {}}, text=text(4, 48))


def test_methods_are_for_what_they_are_for():
    given = {"replace": [{"prune": "mlp", "criterion": "rocket"}], "budget": {"keep": 0.5}, "calibrate": {}}
    with pytest.raises(ValueError, match="names criterion rocket, which is not for this; there are loss, modegpt"):
        compress(build("gpt2"), given, text=text(4, 48))
