"""Block influence: how much a block changes what passes through it; layers are dropped and shares given out by it.

``s = 1 - mean over tokens of cos(x, y)``, ``x`` the hidden state in front of the block and ``y`` the one behind it.

Reference: ShortGPT (arXiv 2403.03853) for the measure, MoDeGPT (arXiv 2408.09632, section 3.3) for the shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tenfold.compress.allocate import Curve
from tenfold.compress.streams import Streams
from tenfold.models.ranks import total_number


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
    return total_number(turned) / max(1, total_number(tokens))


def influence_shares(
    curves: Sequence[Curve], influence: Mapping[str, float], budget: float, temperature: float
) -> dict[str, float]:
    """``{name of an item: share of it that stays}``: what a block loses goes with ``softmax(-s / temperature)``.

    All items of a block keep the same share. A block can't lose more than it has; what it can't lose the others do.

    Args:
        influence: ``{path of a block: s}``; an item lies in the block that its name begins with.
        budget: parameters of all items together.
    """
    block_of = {curve.name: next(path for path in influence if curve.name.startswith(f"{path}.")) for curve in curves}
    paths = list(dict.fromkeys(block_of.values()))
    whole = np.array([sum(c.whole for c in curves if block_of[c.name] == path) for path in paths], float)
    least = np.array([sum(c.costs[0] for c in curves if block_of[c.name] == path) for path in paths], float)
    scores = -np.array([influence[path] for path in paths]) / temperature
    weights = np.exp(scores - scores.max())
    low, high, most = 0.0, 1e12, whole - least
    for _ in range(200):
        middle = np.sqrt(max(low, 1e-12) * high)
        enough = np.minimum(middle * weights * whole, most).sum() >= whole.sum() - budget
        low, high = (low, middle) if enough else (middle, high)
    keeps = 1 - np.minimum(high * weights * whole, most) / whole
    return {curve.name: float(keeps[paths.index(block_of[curve.name])]) for curve in curves}
