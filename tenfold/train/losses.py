"""The losses of distillation by name, as weighed by a recipe's ``heal: {losses: {kl: 1.0, hidden: 0.1}}``.

``p`` is the teacher's and ``q`` the student's distribution over the vocabulary at temperature ``T``, ``softmax(logits / T)``.
``cross_entropy`` and ``DIVERGENCES`` are losses of a row, one position of one sequence; divergences count ``T^2`` times, which
makes the size of their gradients independent of ``T`` (Hinton et al., arXiv 1503.02531). ``STATES`` compare hidden states and
attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

IGNORED = -100  # the label of a position without a target
MIN_ATTENTION = 1e-9  # lower bound of attention probabilities in logarithms
CROSS_ENTROPY = "cross_entropy"  # the loss without a teacher


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return ``-log softmax(logits)[target]`` of every row ``(n, vocabulary)``; 0 where the target is ``IGNORED``."""
    return torch.nn.functional.cross_entropy(upcast(logits), targets, reduction="none", ignore_index=IGNORED)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``sum_v p_v log(p_v / q_v)``: the student covers all that the teacher finds likely."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``sum_v q_v log(q_v / p_v)``: the student stays within the teacher's modes (MiniLLM, arXiv 2306.08543)."""
    return kl(log_q, log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``; at most ``log 2`` (arXiv 2306.13649)."""
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, middle) + kl(log_q, middle)) / 2


def log_probabilities(logits: Tensor, temperature: float, ids: Tensor | None = None) -> Tensor:
    """Return ``log softmax(logits / T)``, of the classes ``ids (n, k)`` only if they are given.

    All other classes together are one more column at the end, unless ``k`` is the size of the vocabulary.
    """
    values = torch.log_softmax(upcast(logits) / temperature, -1)
    if ids is None:
        return values
    chosen = values.gather(-1, ids)
    if ids.shape[-1] == values.shape[-1]:
        return chosen
    rest = values.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], -1)


def hidden(student, teacher, layers: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """Return the mean over the pairs ``(i, j)`` of ``layers`` of ``mean (h_i - g_j)^2 / mean g_j^2``.

    Args:
        student: output of a base model with ``hidden_states``; ``h_i (batch, length, width)`` is the output of block ``i``, for
            the last block usually after the final norm.
        teacher: likewise, with ``g_j``.
        mask: the positions that count ``(batch, length)``.
    """
    pairs = ((student.hidden_states[i + 1], teacher.hidden_states[j + 1]) for i, j in layers)
    return torch.stack([_relative_error(h[mask], g[mask]) for h, g in pairs]).mean()


def embedding(student, teacher, layers, mask: Tensor) -> Tensor:
    """Return ``mean (e - f)^2 / mean f^2`` of the inputs of the first block (KnGPT2, arXiv 2110.08152)."""
    return _relative_error(student.hidden_states[0][mask], teacher.hidden_states[0][mask])


def attention(student, teacher, layers: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """Return the mean over ``layers``, heads and queries of ``sum_keys A log(A / B)``, teacher ``A`` and student ``B``.

    Args:
        student, teacher: outputs of base models, with ``attentions (batch, heads, queries, keys)`` of every layer.
        mask: the queries that count ``(batch, queries)``.
    """
    pairs = ((student.attentions[i], teacher.attentions[j]) for i, j in layers)
    return torch.stack([_attention(b.transpose(1, 2)[mask], a.transpose(1, 2)[mask]) for b, a in pairs]).mean()


def _attention(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = upcast(student), upcast(teacher)
    log_ratio = teacher.clamp(min=MIN_ATTENTION).log() - student.clamp(min=MIN_ATTENTION).log()
    return (teacher * log_ratio).sum(-1).mean()


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = upcast(student), upcast(teacher)
    return (student - teacher).square().mean() / teacher.square().mean()


def upcast(values: Tensor) -> Tensor:
    """Convert to single precision, unless the values have more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
STATES: dict[str, Callable[..., Tensor]] = {"hidden": hidden, "attention": attention, "embedding": embedding}
