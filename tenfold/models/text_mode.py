"""Text that a model reads: one long stream or document by document, and its largest length."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED


def positions_of(model: PreTrainedModel) -> int | None:
    """Return the number of positions of ``model``, None where its configuration does not say."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    table = next((m for name, m in model.named_modules() if name.endswith("embeddings.position_embeddings")), None)
    before = getattr(table, "padding_idx", None)  # RoBERTa counts its positions from behind the padding index
    return longest if longest is None or before is None else longest - before - 1


def known_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``forward`` of ``model`` takes of a tokenizer's ``batch``, which may have more, such as token types."""
    takes = signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in takes}


def context_of(model: PreTrainedModel) -> int:
    """Return the number of positions of ``model``, 1,024 where its configuration does not say."""
    return positions_of(model) or 1024


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Tell whether ``model`` is a causal language model, with or without its head, which is trained on one long stream."""
    names, kind = {type(model).__name__, *(model.config.architectures or ())}, model.config.model_type
    return bool(names & {*CAUSAL.values(), *WITH_IMAGES.values()}) or (kind in CAUSAL and kind not in MASKED)


def is_masked_lm(model: PreTrainedModel) -> bool:
    """Tell whether ``model`` is a masked language model, which also sees the tokens after a position."""
    return type(model).__name__ in {*MASKED.values()} - {*CAUSAL.values()}
