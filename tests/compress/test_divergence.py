"""Measured divergences, against copies of the whole model with wrong matrices."""

import copy

import pytest
import torch
from idle import HEADS
from models import toys
from plain import text
from transformers.pytorch_utils import Conv1D

from tenfold.compression.blockwise import BlockwiseCompression
from tenfold.compression.compress import compress

WORDS = text(8, padded=True)
RULES = [{"prune": "mlp"}, {"prune": "attention"}]


@torch.no_grad()
def log_probabilities(model) -> torch.Tensor:
    kept = [batch["attention_mask"].bool() for batch in WORDS.batches]
    return torch.cat(
        [model(**b, use_cache=False).logits[at].log_softmax(-1) for b, at in zip(WORDS.batches, kept, strict=True)]
    )


def wrong(model, correction: dict):
    """Return a copy of the model with ``correction`` added to its matrices."""
    model = copy.deepcopy(model)
    for path, (matrix, bias) in correction.items():
        module = model.get_submodule(path)
        matrix = matrix.T if isinstance(module, Conv1D) else matrix
        module.weight.data += matrix.to(module.weight)
        if bias is not None:
            module.bias.data += bias.to(module.bias)
    return model


def tried(model, monkeypatch, **calibrate) -> list:
    """Return ``(trials of a block, its curves before and after)`` of every block."""
    found, real = [], BlockwiseCompression._scale_by_trials

    def scale(self, curves, trials, *given):
        before = copy.deepcopy(curves)
        done = real(self, curves, trials, *given)
        found.append((trials, before, curves))
        return done

    monkeypatch.setattr(BlockwiseCompression, "_scale_by_trials", scale)
    recipe = {"replace": RULES, "budget": {"keep": 0.6, "of": "sites"}}
    compress(copy.deepcopy(model), recipe | {"calibrate": {"divergence": 10_000} | calibrate}, text=WORDS)
    return found


@pytest.mark.parametrize("name", HEADS)
def test_curves_lose_what_was_measured(name, monkeypatch):
    model = toys.build(name).eval()
    original, found = log_probabilities(model), tried(model, monkeypatch)
    assert len(found) == model.config.num_hidden_layers
    for trials, before, after in found:
        for trial in trials:
            other = log_probabilities(wrong(model, {trial.path: trial.correction}))
            divergence = float((original.exp() * (original - other)).sum(-1).mean())
            at = {item: min(range(len(after[item].options)), key=lambda k: abs(after[item].options[k] - size))
                  for item, size in trial.sizes.items()}  # fmt: skip
            assert sum(after[n].losses[k] for n, k in at.items()) == pytest.approx(divergence, rel=2e-2, abs=1e-6)
            for item in trial.sizes:
                ratio = after[item].losses[:-1] / before[item].losses[:-1]
                torch.testing.assert_close(torch.tensor(ratio), torch.full((len(ratio),), ratio[0]).double())


def test_a_trial_of_an_mlp_is_what_narrowing_makes_of_it(monkeypatch):
    model = toys.build("llama").eval()
    trials = [trial for some, *_ in tried(model, monkeypatch) for trial in some]
    (trial,) = [one for one in trials if "model.layers.1.mlp.down_proj" in one.sizes]
    (size,) = trial.sizes.values()
    told: list[dict] = []
    units = model.config.intermediate_size
    recipe = {"replace": [{"prune": "mlp", "layers": [1]}], "budget": {"keep": size / units, "of": "sites"}}
    narrow, _ = compress(
        copy.deepcopy(model), recipe | {"calibrate": {"refit": False}}, text=WORDS, announce=told.extend
    )
    assert [choice["chosen"] for choice in told] == [size]
    torch.testing.assert_close(
        log_probabilities(narrow), log_probabilities(wrong(model, {trial.path: trial.correction})), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_curves_are_scaled_by_what_all_blocks_lose_together(name, monkeypatch):
    """Try the errors of one role in all blocks against the sum of what each loses."""
    model = toys.build(name).eval()
    model.get_output_embeddings().weight.data *= 30  # sharp distributions, whose divergences do not add up
    original = log_probabilities(model)
    final, choose = {}, BlockwiseCompression.choose

    def note(self, curves, influence):
        final.update({curve.name: curve for curve in curves})
        return choose(self, curves, influence)

    monkeypatch.setattr(BlockwiseCompression, "choose", note)
    blocks = tried(model, monkeypatch)
    trials, alone = [t for some, *_ in blocks for t in some], {n: c for *_, after in blocks for n, c in after.items()}

    def lost(some: list) -> float:
        other = log_probabilities(wrong(model, {trial.path: trial.correction for trial in some}))
        return float((original.exp() * (original - other)).sum(-1).mean())

    ends = sorted({trial.path.split(".", 3)[-1] for trial in trials})  # without the number of the block
    roles = [[trial for trial in trials if trial.path.split(".", 3)[-1] == end] for end in ends]
    assert len(roles) > 1
    wanted_apart = []
    for some in roles:
        wanted = lost(some) / sum(lost([trial]) for trial in some)
        wanted_apart.append(abs(wanted - 1))
        for trial in some:
            for item in trial.sizes:
                assert final[item].losses == pytest.approx(alone[item].losses * wanted, rel=3e-2, abs=1e-9)
    assert max(wanted_apart) > 0.1


def test_nothing_is_measured_unless_it_is_asked_for(monkeypatch):
    assert not tried(toys.build("llama"), monkeypatch, divergence=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_trial_of_heads_leaves_as_many_dimensions_as_it_says(name, monkeypatch):
    """Compare the rank of the output of each head, bias included, and of the matrix that reads it."""
    model, (queries, groups, size, _) = toys.build(name).eval(), HEADS[name]
    trials = [trial for some, *_ in tried(model, monkeypatch) for trial in some if " " in next(iter(trial.sizes))]
    assert trials
    for trial in trials:
        path, (error, shift) = trial.path, trial.correction
        module, values = model.get_submodule(path), " v" in next(iter(trial.sizes))
        weight = module.weight.detach().double()
        weight = (weight.T if isinstance(module, Conv1D) else weight) + error
        if shift is not None and not values:
            weight = torch.cat([weight, (module.bias.detach() + shift)[:, None]], 1)
        pairs = name == "llama"  # of queries and keys, which rotate together
        for head in range(queries):
            at = slice(head * size, (head + 1) * size)
            count = [*trial.sizes.values()][head * groups // queries] * (2 if pairs and not values else 1)
            left = weight[:, at] if values else weight[at]
            assert int(torch.linalg.matrix_rank(left, rtol=1e-5)) == count
