"""The teacher of a distillation: load it, check that it fits the student, and identify its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.atomic_io import open_safetensors
from tenfold.models.auto import load_model, load_tokenizer, read_config
from tenfold.models.text_mode import is_causal_lm
from tenfold.models.weight_files import weight_files

Teacher = PreTrainedModel | str | Path


def load_teacher(teacher: Any, device: torch.device) -> Any:
    """Return a model, or load one from a folder or name in single precision, in evaluation mode on ``device``."""
    model: Any = teacher if isinstance(teacher, PreTrainedModel) else load_model(teacher, torch.float32)
    return model.to(device).eval()


def check_vocabulary(model: PreTrainedModel, teacher: Teacher, tokenizer) -> None:
    """Raise ValueError if the teacher's vocabulary is not the student's, by its configuration and its tokenizer."""
    loaded = isinstance(teacher, PreTrainedModel)
    config = teacher.config if loaded else read_config(teacher)
    size, teacher_size = (c.get_text_config().vocab_size for c in (model.config, config))
    if size != teacher_size:
        raise ValueError(
            f"the student predicts {size:,} tokens and the teacher {teacher_size:,}: their distributions can't be compared; "
            "take as teacher the model that the student was compressed from"
        )
    other = None if loaded else load_tokenizer(teacher)
    known = other.get_vocab() if other else {}
    for token, number in tokenizer.get_vocab().items() if other else ():
        if known.get(token) != number:
            raise ValueError(
                f"token {token!r} is number {number} for the student and {known.get(token, 'no token')} for the teacher: "
                "their tokenizers differ; take as teacher the model that the student was compressed from"
            )


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, losses: Iterable[str]) -> None:
    """Raise ValueError if ``losses`` can't compare the student with the teacher."""
    if is_causal_lm(model) != is_causal_lm(teacher):
        raise ValueError(
            f"the student is a {type(model).__name__} and the teacher a {type(teacher).__name__}: one predicts the next "
            "token and the other masked ones; take a teacher of the student's kind"
        )
    losses, (own, other) = set(losses), (m.config.get_text_config() for m in (model, teacher))
    if (wide := losses & {"hidden", "embedding"}) and own.hidden_size != other.hidden_size:
        raise ValueError(
            f"the student's hidden states have {own.hidden_size} dimensions and the teacher's {other.hidden_size}, which "
            f"{' and '.join(sorted(wide))} can't compare; leave it out"
        )
    if "attention" in losses and own.num_attention_heads != other.num_attention_heads:
        raise ValueError(
            f"the student has {own.num_attention_heads} attention heads and the teacher {other.num_attention_heads}, "
            "which the loss attention can't compare; leave it out"
        )


def pair_layers(
    layers: Sequence[Sequence[int]] | None, model: PreTrainedModel, teacher: PreTrainedModel
) -> list[list[int]]:
    """Return pairs of student and teacher layers, counted from 0: ``layers``, or those of the same relative depth.

    Layer ``i`` of ``n`` is paired with the layer of ``m`` nearest to ``(i + 1) m / n - 1``, the later one of two.
    """
    own, other = (m.config.get_text_config().num_hidden_layers for m in (model, teacher))
    if layers is None:
        return [[i, max(0, (2 * (i + 1) * other + own) // (2 * own) - 1)] for i in range(own)]
    for i, j in layers:
        if not (0 <= i < own and 0 <= j < other):
            raise ValueError(
                f"layers has the pair [{i}, {j}], but the student's layers are 0 to {own - 1} and the teacher's 0 to {other - 1}"
            )
    return [list(pair) for pair in layers]


@contextmanager
def eager_attention(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Use the attention implementation that returns its probabilities within the context."""
    before: list[Any] = [(model, model.config._attn_implementation) for model in models]
    for model, _ in before:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, implementation in before:
            model.set_attn_implementation(implementation)


def weights_digest(model: Any) -> str:
    """Return a fingerprint of a model's weights, whatever their names, order, ties and stored precision.

    A folder or name is read tensor by tensor. A model in memory has the same fingerprint if its tensors are those of its files:
    not where transformers fuses experts, or old files hold masks.
    """
    if not isinstance(model, PreTrainedModel):
        if files := weight_files(model):
            return _digest(_read_tensors(files))
        model = load_teacher(model, torch.device("cpu"))
    return _digest(model.state_dict().values())


def _read_tensors(files: list[Path]) -> Iterator[Tensor]:
    for file in files:
        with open_safetensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - a handle, not a mapping
                yield stored.get_tensor(name)


def _digest(tensors: Iterable[Tensor]) -> str:
    parts = set()
    for tensor in tensors:
        digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().float().contiguous().reshape(-1).numpy().data)
        parts.add(digest.hexdigest())
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:16]
