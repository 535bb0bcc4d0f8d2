"""Second moments of the inputs of a site."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenfold.models.distributed import all_reduce, all_reduce_number


@dataclass
class Moments:
    """Moments of the inputs of a site: those that it gets, ``z``, and those whose outputs it should reproduce, ``x``.

    Args:
        second: mean of ``z z^T (in, in)``, in float64 like all of them.
        cross: mean of ``x z^T (in, in)``; the same tensor as ``second`` where ``x`` is ``z``.
        mean: mean of ``z (in,)``.
        mean_original: mean of ``x (in,)``.
        tokens: number of vectors.
        projected: ``{path of a site: W cross}``, computed on demand.
    """

    second: Tensor
    cross: Tensor
    mean: Tensor
    mean_original: Tensor
    tokens: int
    projected: dict[str, Tensor] = field(default_factory=dict)


class MomentAccumulator:
    """Sums over rows of ``x`` and ``z (n, in)``: products in float32, sums in float64.

    Args:
        width: number of inputs.
        same: ``x`` is ``z``.
    """

    def __init__(self, width: int, same: bool):
        self.second, self.mean = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.cross, self.mean_original = (self.second, self.mean) if same else (self.second.clone(), self.mean.clone())
        self.same, self.tokens = same, 0

    def add(self, x: Tensor, z: Tensor) -> None:
        with torch.autocast(z.device.type, enabled=False):  # hooks run inside the autocast of a block
            self.second += (z.T @ z).to(self.second.device)
            self.mean += z.sum(0).to(self.mean)
            if not self.same:
                self.cross += (x.T @ z).to(self.cross.device)
                self.mean_original += x.sum(0).to(self.mean_original)
            self.tokens += len(z)

    def reduce(self, path: str, block: int) -> Moments:
        """Return the moments over all processes.

        Raises:
            ValueError: those of the site ``path`` in ``block`` are not finite.
        """
        second, mean, tokens = all_reduce(self.second), all_reduce(self.mean), int(all_reduce_number(self.tokens))
        cross, original = (second, mean) if self.same else (all_reduce(self.cross), all_reduce(self.mean_original))
        for value in {id(v): v for v in (second, cross, mean, original)}.values():
            value /= max(1, tokens)
        check_moments(second, path, block)
        check_moments(cross, path, block)
        return Moments(second, cross, mean, original, tokens)


def check_moments(moment: Tensor, path: str, block: int | str) -> None:
    """Raise ValueError unless a moment of the inputs of the site ``path`` in ``block`` is finite."""
    if not bool(torch.isfinite(moment).all()):
        raise ValueError(f"the inputs of {path} in block {block} hold NaN or Inf; try --dtype float32 or other text")


def fill_unseen_experts(moments: list[Moments]) -> list[Moments]:
    """Give experts that saw no token the mean moments of the others, in place; return the list."""
    seen = [m for m in moments if m.tokens]
    for k, one in enumerate(moments):
        if one.tokens or not seen:
            continue
        others = [m for m in seen if len(m.mean) == len(one.mean)]
        if others:
            second, mean = sum(m.second for m in others) / len(others), sum(m.mean for m in others) / len(others)
        else:  # no other expert is as wide: the same variance in every direction
            size = sum(float(m.second.diagonal().mean()) for m in seen) / len(seen)
            second, mean = size * torch.eye(len(one.mean)).to(one.second), one.mean
        moments[k] = Moments(second, second, mean, mean, 0)
    return moments
