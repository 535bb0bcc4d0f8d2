"""Every fitted site against least squares on the activations of plain runs."""

import copy

import numpy as np
import pytest
from models import toys
from plain import gradients, moment, seen, text, watched

from tenfold.compression.compress import compress
from tenfold.models.sites import find_sites

WORDS, PADDED = text(16), text(24, padded=True)
MODELS = ["gpt2", "llama", "qwen3", "gemma3_text", "bert", "opt", "gpt_neox", "phi"]
METRICS = ["none", "row", "full"]
INTO = ["attn.q", "attn.k", "attn.v", "attn.qkv", "mlp.in", "mlp.gate"]


def compressed(name: str, rules: list[dict], keep: float | None = None, **settings):
    """Return a toy, its compressed copy with little damping, and its text."""
    model, words = toys.build(name), PADDED if name == "bert" else WORDS
    recipe = {"replace": rules, "calibrate": {"damping": 1e-6, **settings}}
    recipe |= {} if keep is None else {"budget": {"keep": keep}}
    return model, compress(copy.deepcopy(model), recipe, text=words)[0], words


def both(before, after, words, sites, share: float = 1.0):
    """Return for every site: its target outputs, its inputs now and its outputs now.

    It is to make what it made, a ``share`` of it, and what its own matrix would make of what it gets now.
    """
    wanted, found = (watched(model, words, [site.path for site in sites]) for model in (before, after))

    def local(site) -> np.ndarray:
        return own(before, site, found[site.path][0]) if share < 1 else 0

    return [(site, share * wanted[site.path][1] + (1 - share) * local(site), *found[site.path]) for site in sites]


def own(model, site, inputs: np.ndarray) -> np.ndarray:
    """Return the outputs of the matrix and the bias of a site of ``model`` for ``inputs (n, in)``."""
    module = model.get_submodule(site.path)
    weight = module.weight.detach().double().numpy()
    bias = 0 if module.bias is None else module.bias.detach().double().numpy()
    return inputs @ (weight if type(module).__name__ == "Conv1D" else weight.T) + bias


def sites_of(model, *roles: str):
    return [site for site in find_sites(model) if site.role in roles and site.layer is not None]


def errors(wanted: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Return the mean square of every column."""
    return ((wanted - made) ** 2).mean(0)


def regression(x: np.ndarray, y: np.ndarray, rank: int, center: bool) -> np.ndarray:
    """Return the best outputs ``(n, out)`` of a matrix of this rank for ``x``, with a bias if ``center``."""
    middle = y.mean(0) if center else 0
    x = x - x.mean(0) if center else x
    fitted = x @ np.linalg.lstsq(x, y - middle, rcond=1e-5)[0]
    left, values, right = np.linalg.svd(fitted, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] + middle


def low_rank(*roles: str) -> dict:
    return {"role": list(roles), "structure": {"kind": "low_rank", "rank": 6}}


@pytest.mark.parametrize("roles", [(*INTO, "attn.out"), ("attn.out", "mlp.out")], ids=["into", "out"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("name", "center"), [(name, True) for name in MODELS] + [("gpt2", False), ("phi", False)])
def test_a_low_rank_site_makes_the_best_of_the_inputs_that_it_now_gets(name, center, roles, share):
    present = {site.role for site in sites_of(toys.build(name), *roles)}
    settings = {"output_metric": "none", "bias_correction": center, "original_share": share}
    before, after, words = compressed(name, [low_rank(*present)], **settings)
    for site, wanted, inputs, made in both(before, after, words, sites_of(before, *present), share):
        bias = before.get_submodule(site.path).bias.detach().double().numpy() if site.bias else 0
        free = center and site.bias
        best = regression(inputs, wanted if free else wanted - bias, 6, free) + (0 if free else bias)
        assert errors(wanted, made).sum() == pytest.approx(errors(wanted, best).sum(), rel=3e-2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_without_refit_a_site_makes_the_best_of_the_original_inputs(name):
    roles = ["mlp.in", "attn.out"]
    before, after, words = compressed(name, [low_rank(*roles)], output_metric="none", refit=False)
    for site in sites_of(before, *roles):
        inputs, wanted = seen(before, words, site.path)
        layer = after.get_submodule(site.path)
        made = inputs @ layer.dense().T.detach().double().numpy() + (
            layer.bias.detach().double().numpy() if site.bias else 0
        )
        best = regression(inputs, wanted, 6, site.bias)
        assert errors(wanted, made).sum() == pytest.approx(errors(wanted, best).sum(), rel=3e-2)


@pytest.mark.parametrize("name", MODELS)
def test_what_reads_narrowed_units_makes_up_for_the_others(name):
    """No other matrix that reads the remaining units and heads is nearer to the original output."""
    before, after, words = compressed(name, [{"prune": "mlp"}, {"prune": "attention"}], 0.6, original_share=1)
    for site, wanted, inputs, made in both(before, after, words, sites_of(before, "mlp.out", "attn.out")):
        best = regression(inputs, wanted, site.shape[0], site.bias)
        assert errors(wanted, made).sum() <= errors(wanted, best).sum() * 1.03 + 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_heads_that_lost_dimensions_answer_to_what_they_made_of_the_same_states(name):
    """In the first block original and compressed inputs are equal, so that the original outputs are the target."""
    before, after, words = compressed(name, [{"prune": "attention", "layers": [0]}], 0.6)
    for site, wanted, inputs, made in both(before, after, words, sites_of(before, "attn.out")[:1]):
        best = regression(inputs, wanted, site.shape[0], site.bias)
        assert errors(wanted, made).sum() <= errors(wanted, best).sum() * 1.03 + 1e-9


@pytest.mark.parametrize(
    ("name", "narrow"), [(name, "mlp") for name in MODELS] + [("qwen3", "attention"), ("gemma3_text", "attention")]
)
def test_without_refit_what_stays_makes_up_for_the_others_in_whichever_basis(name, narrow):
    """Where queries and keys stay, only the basis of the values changes, and the output matrix follows it."""
    before, after, words = compressed(name, [{"prune": narrow, "layers": [0]}], 0.6, refit=False)
    role = "mlp.out" if narrow == "mlp" else "attn.out"
    for site, wanted, inputs, made in both(before, after, words, sites_of(before, role)[:1]):
        best = regression(inputs, wanted, site.shape[0], site.bias)
        assert errors(wanted, made).sum() <= errors(wanted, best).sum() * 1.03 + 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_units_that_stay_are_those_of_the_original(name):
    before, after, _words = compressed(name, [{"prune": "mlp"}], 0.6)
    for site in sites_of(before, "mlp.in", "mlp.gate"):
        left = after.get_submodule(site.path).dense().detach().double()
        whole = own(before, site, np.eye(site.shape[1])) - own(before, site, np.zeros((1, site.shape[1])))
        found = [int(np.argmin(((whole.T - row) ** 2).sum(1))) for row in left.numpy()]
        assert len(set(found)) == len(left) < site.shape[0]
        np.testing.assert_allclose(whole.T[found], left.numpy(), atol=1e-6)


def test_every_metric_of_the_outputs_is_served_best_by_its_own_fit(known_draws):
    """The error is ``||R (y - made)||^2`` with ``R`` from the gradients of the loss: none, by row, or in full."""
    folded = {
        kind: compressed("gpt2", [low_rank("attn.qkv") | {"layers": [0]}], output_metric=kind) for kind in METRICS
    }
    before, _, words = folded["none"]
    path = "transformer.h.0.attn.c_attn"
    outputs = moment(gradients(before, words, path))
    metrics = {"none": np.eye(len(outputs)), "row": np.diag(np.diag(outputs)), "full": outputs}
    wanted = seen(before, words, path)[1]
    for kind, metric in metrics.items():
        rests = {other: wanted - seen(after, words, path)[1] for other, (_, after, _) in folded.items()}
        losses = {other: float(np.einsum("no,op,np->", rest, metric, rest)) for other, rest in rests.items()}
        assert min(losses, key=losses.get) == kind and sorted(losses.values())[1] > 1.02 * losses[kind]
