"""Estimated losses of a site, from gradients of the loss in float64, one sequence at a time.

The labels that a model draws are replaced by its least likely tokens, as the slow reference has them.
"""

import copy
from itertools import cycle

import numpy as np
import pytest
import torch
import transformers
from models import toys
from plain import gradients, moment, seen, text

from tenfold.compression.calibration import Calibration
from tenfold.compression.compress import compress
from tenfold.models.sites import base_model

DAMPING = 1e-9
MODELS = ["gpt2", "llama", "gemma3_text", "phi", "bert", "headless gpt2", "headless bert"]


@pytest.fixture
def model(request):
    name = request.param.removeprefix("headless ")
    return toys.build(name) if name == request.param else toys.build(name).base_model


@pytest.fixture
def words():
    return text(8, padded=True)


def foreseen(model, words, roles, **settings) -> dict[str, tuple[int, float]]:
    """Return ``{site: (rank, nats)}``."""
    told: list[dict] = []
    recipe = {
        "replace": [{"role": roles, "structure": {"kind": "low_rank"}}],
        "budget": {"keep": 0.6},
        "calibrate": {"damping": DAMPING, "allocate": "uniform"} | settings,
    }
    compress(copy.deepcopy(model), recipe, text=words, announce=told.extend)
    return {choice["item"]: (choice["chosen"]["rank"], choice["loss"]) for choice in told}


def least_loss(outputs: np.ndarray, weight: np.ndarray, inputs: np.ndarray, rank: int) -> float:
    """Return the least ``tr(G E C E^T) / 2`` over all ``W - E`` of this rank (Eckart-Young)."""
    sides = [np.linalg.cholesky(m + 1e-9 * np.trace(m) / len(m) * np.eye(len(m))) for m in (outputs, inputs)]
    return float((np.linalg.svd(sides[0].T @ weight @ sides[1], compute_uv=False)[rank:] ** 2).sum()) / 2


CASES = zip([*MODELS, *MODELS], [False] * len(MODELS) + [True] * len(MODELS), cycle(["full", "row", "none"]))


@pytest.mark.parametrize(("model", "center", "outputs"), CASES, indirect=["model"])
def test_the_foreseen_loss_is_that_of_gradients_and_inputs(model, words, known_draws, center, outputs):
    table = foreseen(model, words, ["attn.out", "mlp.in"], bias_correction=center, output_metric=outputs)
    assert len(table) == 4
    for path, (rank, nats) in table.items():
        module, (inputs, _) = model.get_submodule(path), seen(model, words, path)
        weight = module.weight.detach().double().numpy()
        weight = weight.T if type(module).__name__ == "Conv1D" else weight
        if center and module.bias is not None:
            inputs = inputs - inputs.mean(0)
        matters = moment(gradients(model, words, path))
        metric = {"full": matters, "row": np.diag(np.diag(matters)), "none": np.eye(len(weight))}[outputs]
        assert nats == pytest.approx(least_loss(metric, weight, moment(inputs), rank), rel=2e-3)


@pytest.mark.parametrize("model", ["gpt2", "headless bert"], indirect=True)
def test_gradients_pass_through_blocks_that_stay(model, words, known_draws):
    """A rule for the first block alone estimates the same loss as one for all blocks."""
    recipe = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank"}}], "budget": {"keep": 0.6}}
    whole = {path: nats for path, (_, nats) in foreseen(model, words, ["mlp.in"]).items()}
    told: list[dict] = []
    recipe["replace"][0]["layers"] = [0]
    recipe["calibrate"] = {"damping": DAMPING, "allocate": "uniform"}
    compress(copy.deepcopy(model), recipe, text=words, announce=told.extend)
    assert [choice["item"] for choice in told] == list(whole)[:1]
    assert told[0]["loss"] == pytest.approx(whole[told[0]["item"]], rel=1e-6)


@pytest.mark.parametrize("model", ["gpt2", "headless gpt2"], indirect=True)
def test_the_seed_draws(model, words):
    one, same, other = (foreseen(model, words, ["mlp.in"], seed=seed) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("model", ["gpt2", "llama", "headless bert"], indirect=True)
def test_what_is_drawn_for_a_sequence_does_not_depend_on_what_runs_beside_it(model, words):
    alone = [{name: value[row : row + 1] for name, value in batch.items()} for batch in words.batches for row in (1, 0)]
    alone = [{name: value[:, : int(one["attention_mask"].sum())] for name, value in one.items()} for one in alone]
    together, apart = (foreseen(model, given, ["mlp.in"]) for given in (words, Calibration(alone, words.source)))
    assert list(together) == list(apart)
    for path, (_, nats) in together.items():
        assert apart[path][1] == pytest.approx(nats, rel=1e-2)


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_labels_are_drawn_from_what_the_model_says(model, words, monkeypatch):
    """At every position without padding."""
    chances: list[torch.Tensor] = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *more, **given: chances.append(p) or draw(p, *more, **given))
    foreseen(model, words, ["mlp.in"])
    _, logits = seen(model, words, "lm_head")
    np.testing.assert_allclose(torch.cat(chances), torch.from_numpy(logits).softmax(-1), rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForQuestionAnswering"]
)
def test_a_classifier_is_compressed_as_its_base_model_is(kind):
    whole = getattr(transformers, kind)(toys.build("llama").config).eval()
    base = copy.deepcopy(base_model(whole))
    recipe = {"replace": [{"prune": "mlp"}], "budget": {"keep": 0.7, "of": "sites"}, "calibrate": {"divergence": 16}}
    for model in (whole, base):
        compress(model, recipe, text=text(4))
    expected, found = base.state_dict(), base_model(whole).state_dict()
    assert any(name.endswith("mlp.down_proj.matrix") for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
