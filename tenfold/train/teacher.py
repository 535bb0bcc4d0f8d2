"""The teacher of a healing: where it comes from, whether it fits the student, and what makes it this one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.atomic_io import open_safetensors
from tenfold.models.auto import load_model, load_tokenizer, read_config
from tenfold.models.lazy_checkpoint import weight_files
from tenfold.models.text_mode import is_causal_lm

Teacher = PreTrainedModel | str | Path


def load_teacher(teacher: Teacher, device: torch.device) -> PreTrainedModel:
    """The model itself, or the one of this folder or name in single precision, on ``device`` and ready to evaluate."""
    if not isinstance(teacher, PreTrainedModel):
        teacher = load_model(teacher, torch.float32)
    return teacher.to(device).eval()


def check_vocabulary(model: PreTrainedModel, teacher: Teacher, tokenizer) -> None:
    """Refuse a teacher that reads other tokens than the student, from its configuration and its tokenizer.

    Raises:
        ValueError: the sizes differ, or a token of the student's has another number, or none, in the teacher's.
    """
    named = not isinstance(teacher, PreTrainedModel)
    config = read_config(teacher) if named else teacher.config
    own, other = (c.get_text_config().vocab_size for c in (model.config, config))
    if own != other:
        raise ValueError(
            f"the student predicts {own:,} tokens and the teacher {other:,}: their distributions can't be compared; "
            "take as teacher the model that the student was folded from"
        )
    theirs = load_tokenizer(teacher) if named else None
    if theirs is None:
        return
    known = theirs.get_vocab()
    for token, number in tokenizer.get_vocab().items():
        if known.get(token) != number:
            raise ValueError(
                f"token {token!r} is number {number} for the student and {known.get(token, 'no token')} for the teacher: "
                "their tokenizers differ; take as teacher the model that the student was folded from"
            )


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, losses: Iterable[str]) -> None:
    """Refuse a teacher that ``losses`` can't compare the student with.

    Raises:
        ValueError: one is causal and the other is not, or widths or heads differ where they are compared.
    """
    if is_causal_lm(model) != is_causal_lm(teacher):
        raise ValueError(
            f"the student is a {type(model).__name__} and the teacher a {type(teacher).__name__}: one predicts the next "
            "token and the other masked ones; take a teacher of the student's kind"
        )
    asked, (own, other) = set(losses), (m.config.get_text_config() for m in (model, teacher))
    if asked & {"hidden", "embedding"} and own.hidden_size != other.hidden_size:
        raise ValueError(
            f"the student's hidden states have {own.hidden_size} dimensions and the teacher's {other.hidden_size}, which "
            f"{' and '.join(sorted(asked & {'hidden', 'embedding'}))} can't compare; leave it out"
        )
    if "attention" in asked and own.num_attention_heads != other.num_attention_heads:
        raise ValueError(
            f"the student has {own.num_attention_heads} attention heads and the teacher {other.num_attention_heads}, "
            "which the loss attention can't compare; leave it out"
        )


def layer_map(
    layers: Sequence[Sequence[int]] | None, model: PreTrainedModel, teacher: PreTrainedModel
) -> list[list[int]]:
    """Pairs of a student's and a teacher's layer, both counted from 0; without ``layers`` those of one relative depth.

    Layer ``i`` of ``n`` goes with the layer of ``m`` that is nearest to ``(i + 1) m / n - 1``, the later one of two.

    Raises:
        ValueError: there is no such layer.
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
def eager(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Attention that returns its probabilities, in ``models``; afterwards what they had."""
    before = [(model, model.config._attn_implementation) for model in models]
    for model, _ in before:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, kind in before:
            model.set_attn_implementation(kind)


def weights_digest(teacher: Teacher) -> str:
    """A fingerprint of the weights: whatever their names, order, ties and precision on disk.

    Those of a folder or a name are read tensor by tensor. A model in memory has the same fingerprint where its tensors are
    those of its files: not so where transformers fuses experts, or old files hold masks.
    """
    files = [] if isinstance(teacher, PreTrainedModel) else weight_files(teacher)
    if not files:
        model = load_teacher(teacher, torch.device("cpu")) if not isinstance(teacher, PreTrainedModel) else teacher
        return _digest(model.state_dict().values())
    return _digest(_stored(files))


def _stored(files: list[Path]) -> Iterator[Tensor]:
    for file in files:
        with open_safetensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - a handle, not a mapping
                yield stored.get_tensor(name)


def _digest(tensors: Iterable[Tensor]) -> str:
    parts = set()
    for tensor in tensors:
        digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().float().contiguous().reshape(-1).numpy())
        parts.add(digest.hexdigest())
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:16]
