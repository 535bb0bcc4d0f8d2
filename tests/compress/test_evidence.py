"""Loss of an error by gradients token by token, against loops over tokens and against the model itself."""

import copy

import numpy as np
import pytest
import torch
from models import toys
from plain import gradients, seen, text

from tenfold.compression import blockwise
from tenfold.compression.compress import compress
from tenfold.compression.evidence import expected_loss, fisher_losses, split_halves, unit_products


def drawn(sequences: int = 6, tokens: int = 5, inner: int = 4, out: int = 3):
    generator = torch.Generator().manual_seed(3)
    pairs = [
        (torch.randn(tokens, inner, generator=generator), torch.randn(tokens, out, generator=generator))
        for _ in range(sequences)
    ]
    return pairs, torch.randn(out, inner, generator=generator), torch.randn(out, generator=generator)


def test_the_cost_is_half_the_mean_square_of_what_a_token_loses():
    pairs, error, shift = drawn()
    squares = []
    for inputs, outputs in pairs:
        for z, g in zip(inputs.numpy(), outputs.numpy(), strict=True):
            squares.append(float(g @ (error.numpy() @ z + shift.numpy())) ** 2)
    assert fisher_losses(pairs, error, shift, 30)[0] == pytest.approx(sum(squares) / 30 / 2, rel=1e-5)


def test_either_half_is_judged_by_what_the_other_one_knows():
    pairs, _, _ = drawn()
    splits = split_halves(pairs, 4, 30)
    for first, split in enumerate(splits):
        known = np.concatenate([inputs.numpy() for inputs, _ in pairs[first::2]])
        np.testing.assert_allclose(split.second, known.T @ known / len(known), rtol=1e-5)
        np.testing.assert_allclose(split.mean, known.mean(0), atol=1e-6)
        assert split.tokens == 15 and len(split.judging) == 3
        assert all(one is other for one, other in zip(split.judging, pairs[1 - first :: 2], strict=True))
    assert len(splits) == 2 and split_halves(pairs[:1], 4, 5) == []


def test_the_expected_cost_is_that_of_least_squares_on_many_tokens():
    """Least squares of 4 values over 80 tokens, and over 40 judged by others: the expected loss is in between."""
    draw, inside, outside = np.random.default_rng(0), [], []
    for _ in range(400):
        x, noise = draw.normal(size=(120, 4)), draw.normal(size=120)
        errors = []
        for known in (80, 40):
            near = np.linalg.lstsq(x[:known], noise[:known], rcond=None)[0]
            errors.append(noise - x @ near)
        inside.append((errors[0][:80] ** 2).mean())
        outside.append((errors[1][40:] ** 2).mean())
    assert expected_loss(np.mean(inside), np.mean(outside)) == pytest.approx(1.0, abs=0.03)
    assert np.mean(inside) < 0.97 and np.mean(outside) > 1.07


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_small_error_costs_what_the_model_then_loses(name):
    """Compare the loss by gradients for many drawn labels with the divergence of the changed model."""
    model, words = toys.build(name), text(4)
    path = "transformer.h.1.mlp.c_proj" if name == "gpt2" else "model.layers.1.mlp.down_proj"
    module = model.get_submodule(path)
    flat = name == "gpt2"
    error = 0.02 * torch.randn(
        module.weight.T.shape if flat else module.weight.shape, generator=torch.Generator().manual_seed(5)
    )
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.get_submodule(path).weight.add_(error.T if flat else error)
    divergence, tokens, costs = 0.0, 0, []
    for batch in words.batches:
        with torch.no_grad():
            one, other = (m(**batch).logits.log_softmax(-1) for m in (model, after))
        divergence += float((one.exp() * (one - other)).sum())
        tokens += one.shape[0] * one.shape[1]
        for ids in batch["input_ids"]:
            for draw in range(60):
                costs.append(_drawn_pair(model, module, ids, draw))
    found = fisher_losses(costs, error, None, 60 * tokens)[0]
    assert found == pytest.approx(divergence / tokens, rel=0.25)


def _drawn_pair(model, module, ids, seed):
    """Return the inputs of a module, and the gradients at its output of the loss of drawn tokens."""
    caught = []
    hook = module.register_forward_hook(lambda m, given, out: caught.append((given[0], out)))
    logits = model(input_ids=ids[None]).logits[0]
    hook.remove()
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, caught[0][1])
    return caught[0][0][0].detach(), gradient[0]


def test_the_survey_has_the_gradients_of_plain_runs(known_draws, monkeypatch):
    """The evidence has the gradients of every batch beside its inputs."""
    found, real = {}, blockwise.Block

    def block(*given):
        found.update(given[7] if len(given) > 7 else {})
        return real(*given)

    monkeypatch.setattr(blockwise, "Block", block)
    model, words = toys.build("llama"), text(8)
    compress(copy.deepcopy(model), {"replace": [{"prune": "mlp"}], "budget": {"keep": 0.6}}, text=words)
    path = "model.layers.1.mlp.down_proj"
    inputs, outputs = (torch.cat(side).numpy() for side in zip(*found[path], strict=True))
    np.testing.assert_allclose(inputs, seen(model, words, path)[0], atol=1e-5)
    np.testing.assert_allclose(outputs, gradients(model, words, path), rtol=1e-3, atol=1e-6)


def test_what_tokens_cost_together_and_units_too():
    """Compare with plain sums over sequences and tokens."""
    generator = np.random.default_rng(1)
    batches = [(generator.normal(size=(n, 5)), generator.normal(size=(n, 3))) for n in (4, 7)]
    pairs = [(torch.tensor(z).float(), torch.tensor(g).float()) for z, g in batches]
    error, weight = generator.normal(size=(3, 5)), generator.normal(size=(3, 5))
    alone = together = 0.0
    products = np.zeros((5, 5))
    for inputs, slopes in batches:
        each = [g @ error @ z for z, g in zip(inputs, slopes, strict=True)]
        alone += sum(a * a for a in each)
        together += sum(each) ** 2
        for z, g in zip(inputs, slopes, strict=True):
            lost = np.array([float(g @ weight[:, u] * z[u]) for u in range(5)])
            products += np.outer(lost, lost)
    found = fisher_losses(pairs, torch.tensor(error).float(), None, 11)
    assert found == pytest.approx((alone / 22, together / 22), rel=1e-5)
    np.testing.assert_allclose(unit_products(pairs, torch.tensor(weight)).numpy(), products, rtol=1e-4, atol=1e-4)
