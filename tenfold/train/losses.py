"""The losses of healing, by name: what a recipe's ``heal: {losses: {kl: 1.0, hidden: 0.1}}`` weighs and adds up.

``p`` is the teacher's and ``q`` the student's distribution over the vocabulary at temperature ``T``, ``softmax(logits / T)``.
Divergences carry ``T^2``, so that their gradients are of one size at any temperature (Hinton et al., arXiv 1503.02531).
``LOGITS`` are losses of a row, one position of one sequence; ``STATES`` compare what is inside the two models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the label of a position that cross entropy leaves out
TINY = 1e-9  # attention probabilities below count as this much in logarithms


@dataclass
class LossInputs:
    """Some positions of a batch, as the losses of ``LOGITS`` see them.

    Args:
        logits: the student's ``(n, vocabulary)``.
        targets: the true tokens ``(n,)``, ``IGNORED`` where there is none.
        student: ``log q (n, classes)``, where a divergence is asked for.
        teacher: ``log p (n, classes)``, likewise.
        temperature: ``T``.
    """

    logits: Tensor
    targets: Tensor
    student: Tensor | None = None
    teacher: Tensor | None = None
    temperature: float = 1.0


def cross_entropy(rows: LossInputs) -> Tensor:
    """``-log softmax(logits)[target]`` of every row, at temperature 1; 0 where there is no target."""
    return torch.nn.functional.cross_entropy(wide(rows.logits), rows.targets, reduction="none", ignore_index=IGNORED)


def kl(rows: LossInputs) -> Tensor:
    """``T^2 sum_v p_v log(p_v / q_v)``: the student covers all that the teacher finds likely."""
    return rows.temperature**2 * _kl(rows.teacher, rows.student)


def reverse_kl(rows: LossInputs) -> Tensor:
    """``T^2 sum_v q_v log(q_v / p_v)``: the student stays where the teacher is (MiniLLM, arXiv 2306.08543)."""
    return rows.temperature**2 * _kl(rows.student, rows.teacher)


def jensen_shannon(rows: LossInputs) -> Tensor:
    """``T^2 (KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``: symmetric, at most ``T^2 log 2`` (arXiv 2306.13649)."""
    middle = torch.logaddexp(rows.teacher, rows.student) - math.log(2)
    return rows.temperature**2 * (_kl(rows.teacher, middle) + _kl(rows.student, middle)) / 2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_probabilities(logits: Tensor, temperature: float, ids: Tensor | None = None) -> Tensor:
    """``log softmax(logits / T)``; with ``ids (n, k)`` that of these classes, and of one class for the rest in the last column.

    If ``k`` is the whole vocabulary there is no rest, and no column for it.
    """
    values = torch.log_softmax(wide(logits) / temperature, -1)
    if ids is None:
        return values
    chosen = values.gather(-1, ids)
    if ids.shape[-1] == values.shape[-1]:
        return chosen
    rest = values.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], -1)


def hidden(student, teacher, layers: Sequence[Sequence[int]], kept: Tensor) -> Tensor:
    """Mean over the pairs ``(i, j)`` of ``layers`` of ``mean (h_i - g_j)^2 / mean g_j^2``.

    Args:
        student: output of a base model, with ``hidden_states``; ``h_i (batch, length, width)`` is what block ``i`` hands on,
            that of the last block as most models return it: behind the final norm.
        teacher: likewise, ``g_j``.
        kept: the positions that count ``(batch, length)``.
    """
    pairs = ((student.hidden_states[i + 1], teacher.hidden_states[j + 1]) for i, j in layers)
    return torch.stack([_relative(h[kept], g[kept]) for h, g in pairs]).mean()


def embedding(student, teacher, layers, kept: Tensor) -> Tensor:
    """``mean (e - f)^2 / mean f^2`` of what enters the first block (KnGPT2, arXiv 2110.08152)."""
    return _relative(student.hidden_states[0][kept], teacher.hidden_states[0][kept])


def attention(student, teacher, layers: Sequence[Sequence[int]], kept: Tensor) -> Tensor:
    """Mean over ``layers``, heads and queries of ``sum_keys A log(A / B)``: teacher's probabilities ``A``, student's ``B``.

    Args:
        student, teacher: outputs of base models, with ``attentions (batch, heads, queries, keys)`` of every layer.
        kept: the queries that count ``(batch, queries)``.
    """
    pairs = ((student.attentions[i], teacher.attentions[j]) for i, j in layers)
    return torch.stack([_attention(b.transpose(1, 2)[kept], a.transpose(1, 2)[kept]) for b, a in pairs]).mean()


def _attention(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = wide(student), wide(teacher)
    return (teacher * (teacher.clamp(min=TINY).log() - student.clamp(min=TINY).log())).sum(-1).mean()


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = wide(student), wide(teacher)
    return (student - teacher).square().mean() / teacher.square().mean()


def wide(values: Tensor) -> Tensor:
    """In single precision at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


LOGITS: dict[str, Callable[[LossInputs], Tensor]] = {
    "cross_entropy": cross_entropy,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
STATES: dict[str, Callable[..., Tensor]] = {"hidden": hidden, "attention": attention, "embedding": embedding}
WITHOUT_TEACHER = {"cross_entropy"}
