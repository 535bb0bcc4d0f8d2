"""Block influence: how much a block changes the hidden states, by which layers are dropped and budgets allocated.

``s = 1 - mean over tokens of cos(x, y)``, ``x`` the hidden state in front of the block and ``y`` the one behind it.

Reference: ShortGPT (arXiv 2403.03853) for the measure, MoDeGPT (arXiv 2408.09632, section 3.3) for the allocation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_distance(before: Tensor, after: Tensor, mask: Tensor) -> float:
    """Return the sum over tokens of ``1 - cos(x, y)``; ``before, after (batch, tokens, width)``, ``mask (batch * tokens,)``."""
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
    return float((1 - cosine)[mask.to(cosine.device)].double().sum())
