"""Layout of the heads of an attention: their rows in its matrices, and the freedom of their basis.

A head computes ``softmax(q k^T) v`` for the output matrix. Its values may have any basis, if the columns of the output matrix
follow. So may its queries and keys together, unless something stands between the matrix and the product: rotary positions,
which leave pairs of dimensions only, or a norm per head, which leaves nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.models.architectures import ARCHITECTURES


@dataclass(frozen=True)
class Heads:
    """Heads of one attention module.

    Args:
        query: the number of query heads.
        groups: the number of key and value heads; each serves ``query / groups`` query heads.
        size: dimensions per head.
        freedom: of queries and keys: ``basis`` (any), ``pairs`` (of rotary positions) or ``none``.
        rotary: how many of the dimensions are rotated, the first ones; dimension ``i`` goes with ``i + rotary / 2``.
        interleaved: whether a fused matrix holds query, key and value of head 0, then those of head 1, ...
    """

    query: int
    groups: int
    size: int
    freedom: Literal["basis", "pairs", "none"]
    rotary: int = 0
    interleaved: bool = False

    @property
    def each(self) -> int:
        """Return the number of query heads per group."""
        return self.query // self.groups

    def rows(self, which: str, head: int, fused: bool) -> Tensor:
        """Return the rows of head ``head`` of ``which`` (``q``, ``k``, ``v``) in its own matrix or in the fused one."""
        inside, number = torch.arange(self.size), "qkv".index(which)
        if not fused:
            return head * self.size + inside
        if self.interleaved:
            return (3 * head + number) * self.size + inside
        return (0, self.query, self.query + self.groups)[number] * self.size + head * self.size + inside

    def units(self) -> list[list[int]]:
        """Return groups of dimensions of a head's queries and keys that can only be pruned together."""
        half = self.rotary // 2
        return [[i, i + half] for i in range(half)] + [[i] for i in range(self.rotary, self.size)]


def heads_of(model: PreTrainedModel, attention: nn.Module) -> Heads | None:
    """Return the heads of a module with query, key and value matrices, None where the configuration has no number of heads."""
    config = model.config.get_text_config()
    query = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    if query is None:
        return None
    groups = getattr(config, "num_key_value_heads", None) or query
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // query
    freedom, rotary = "basis", 0
    if given := getattr(config, "rope_parameters", None):
        kinds = [value for value in given.values() if isinstance(value, dict)] or [given]  # one per kind of layer
        whole = getattr(config, "partial_rotary_factor", None) or 1.0
        ratios = [kind.get("partial_rotary_factor") or whole for kind in kinds]
        rotary = 2 * int(size * min(ratios) / 2)
        freedom = "pairs" if len(set(ratios)) == 1 else "none"
    if any(re.match(r"(q|k|query|key)\w*norm", name.lower()) for name, _ in attention.named_children()):
        freedom = "none"
    interleaved = "attn.qkv" in ARCHITECTURES[model.config.model_type].interleaved
    return Heads(query, groups, size, freedom, rotary, interleaved)
