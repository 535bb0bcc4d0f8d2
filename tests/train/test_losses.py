"""Every loss of distillation against a loop over floats in NumPy, in double precision."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tenfold.models.distillation_config import LOSSES
from tenfold.train import losses
from tenfold.train.losses import CROSS_ENTROPY, DIVERGENCES, IGNORED, STATES, cross_entropy, log_probabilities

N, V = 6, 7


def probabilities(logits, temperature=1.0):
    heated = np.exp(np.asarray(logits, dtype=np.float64) / temperature)
    return heated / heated.sum(-1, keepdims=True)


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def reference(name, teacher, student):
    """Return the divergence of one row of logits."""
    p, q = probabilities(teacher), probabilities(student)
    middle = (p + q) / 2
    return {
        "kl": divergence(p, q),
        "reverse_kl": divergence(q, p),
        "jensen_shannon": (divergence(p, middle) + divergence(q, middle)) / 2,
    }[name]


def test_a_recipe_knows_every_loss():
    assert set(LOSSES) == {CROSS_ENTROPY, *DIVERGENCES, *STATES}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(name):
    teacher, student = 3 * torch.randn(2, N, V, dtype=torch.float64)
    got = DIVERGENCES[name](*(log_probabilities(values, 1.0) for values in (teacher, student)))
    expected = [reference(name, teacher[i].numpy(), student[i].numpy()) for i in range(N)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_cross_entropy():
    logits, targets = 3 * torch.randn(N, V, dtype=torch.float64), torch.randint(0, V, (N,))
    targets[2] = IGNORED
    rows = zip(logits.numpy(), targets.tolist(), strict=True)
    expected = [0.0 if target == -100 else -math.log(probabilities(row)[target]) for row, target in rows]
    np.testing.assert_allclose(cross_entropy(logits, targets).numpy(), expected, rtol=1e-12, atol=1e-14)


def test_half_precision_is_summed_in_single():
    logits = torch.randn(2, V).bfloat16()
    assert cross_entropy(logits, torch.tensor([1, 2])).dtype == log_probabilities(logits, 1.0).dtype == torch.float32


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
def test_classes_and_the_rest(k):
    logits = 3 * torch.randn(N, V, dtype=torch.float64)
    ids = torch.stack([torch.randperm(V)[:k] for _ in range(N)])
    got = log_probabilities(logits, 2.0, ids).numpy()
    for row in range(N):
        p = probabilities(logits[row].numpy(), 2.0)
        chosen = [p[v] for v in ids[row].tolist()]
        rest = [sum(p[v] for v in range(V) if v not in ids[row].tolist())] if k < V else []
        np.testing.assert_allclose(got[row], np.log(chosen + rest), rtol=1e-10)


def seen(layers=3, batch=2, length=5, width=4, heads=2):
    scores = torch.randn(layers, batch, heads, length, length, dtype=torch.float64)
    blind = torch.triu(torch.ones(length, length), 1).bool()
    return SimpleNamespace(
        hidden_states=torch.randn(layers + 1, batch, length, width, dtype=torch.float64).unbind(),
        attentions=scores.masked_fill(blind, -torch.inf).softmax(-1).unbind(),
    )


def relative(student, teacher, kept):
    wrong = right = 0.0
    for b, t in np.argwhere(kept.numpy()):
        for e, f in zip(student[b, t].tolist(), teacher[b, t].tolist(), strict=True):
            wrong, right = wrong + (e - f) ** 2, right + f**2
    return wrong / right


def states_reference(name, student, teacher, layers, kept):
    if name == "embedding":
        return relative(student.hidden_states[0], teacher.hidden_states[0], kept)
    if name == "hidden":
        parts = [relative(student.hidden_states[i + 1], teacher.hidden_states[j + 1], kept) for i, j in layers]
        return sum(parts) / len(parts)
    parts = [
        divergence(teacher.attentions[j][b, head, t].tolist(), student.attentions[i][b, head, t].tolist())
        for i, j in layers
        for head in range(2)
        for b, t in np.argwhere(kept.numpy())
    ]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("name", STATES)
def test_losses_of_states(name):
    student, teacher, layers = seen(2), seen(4), [[0, 1], [1, 3]]
    kept = torch.ones(2, 5, dtype=torch.bool)
    kept[1, 3:] = False
    got = STATES[name](student, teacher, layers, kept)
    assert float(got) == pytest.approx(states_reference(name, student, teacher, layers, kept), rel=1e-10)
    assert float(STATES[name](teacher, teacher, [[1, 1]], kept)) == pytest.approx(0, abs=1e-15)


def test_an_attention_that_vanishes_costs_no_infinity():
    student, teacher = seen(1), seen(1)
    student.attentions[0][0, 0, 4, 1] = 0.0
    got = losses.attention(student, teacher, [[0, 0]], torch.ones(2, 5, dtype=torch.bool))
    assert math.isfinite(float(got))
