"""Block influence: how much a block changes what passes through it; layers are dropped and shares given out by it.

``s = 1 - mean over tokens of cos(x, y)``, ``x`` the hidden state in front of the block and ``y`` the one behind it.

Reference: ShortGPT (arXiv 2403.03853) for the measure, MoDeGPT (arXiv 2408.09632, section 3.3) for the shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.compress.activations import Streams
from tenfold.models.distributed import all_reduce_number


def cosine_distance(before: Tensor, after: Tensor, kept: Tensor) -> float:
    """The sum over tokens of ``1 - cos(x, y)``; ``before, after (batch, tokens, width)``, ``kept (batch * tokens,)``."""
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
    return float((1 - cosine)[kept.to(cosine.device)].double().sum())


@torch.no_grad()
def block_influence(streams: Streams, number: int) -> float:
    """``s`` of block ``number``, after the survey went through it: what was in front of it is still on the shelf."""
    turned = sum(
        cosine_distance(streams.shelf.get(f"before-{number}-{k}"), streams.states(k)[0].cpu(), kept)
        for k, kept in enumerate(streams.kept)
    )
    tokens = sum(int(kept.sum()) for kept in streams.kept)
    return all_reduce_number(turned) / max(1, all_reduce_number(tokens))
