"""Second moments of the inputs of a site, and what is not known of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenfold.models.distributed import all_reduce, all_reduce_number


@dataclass
class Moments:
    """What is known of the inputs of one site, those that it now gets, ``z``, and those that it is to answer to, ``x``.

    Args:
        second: mean of ``z z^T (in, in)``, in float64 as all of them.
        cross: mean of ``x z^T (in, in)``; ``second`` itself where both are one.
        mean: mean of ``z (in,)``.
        mean_original: mean of ``x (in,)``.
        tokens: how many vectors were seen.
        crossed: ``{path of a site: W cross}``, once it was asked for.
    """

    second: Tensor
    cross: Tensor
    mean: Tensor
    mean_original: Tensor
    tokens: int
    crossed: dict[str, Tensor] = field(default_factory=dict)


class MomentAccumulator:
    """Sums over rows of ``x`` and ``z (n, in)``: products in float32, sums in float64."""

    def __init__(self, width: int, one: bool):
        self.second, self.mean = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.cross, self.other = (self.second, self.mean) if one else (self.second.clone(), self.mean.clone())
        self.one, self.tokens = one, 0

    def add(self, x: Tensor, z: Tensor) -> None:
        with torch.autocast(z.device.type, enabled=False):  # hooks run while a block does
            self.second += (z.T @ z).to(self.second.device)
            self.mean += z.sum(0).to(self.mean)
            if not self.one:
                self.cross += (x.T @ z).to(self.cross.device)
                self.other += x.sum(0).to(self.other)
            self.tokens += len(z)

    def of_all(self) -> MomentAccumulator:
        """Those of all processes added up."""
        self.second, self.mean = all_reduce(self.second), all_reduce(self.mean)
        self.cross, self.other = (
            (self.second, self.mean) if self.one else (all_reduce(self.cross), all_reduce(self.other))
        )
        self.tokens = int(all_reduce_number(self.tokens))
        return self

    def moments(self) -> Moments:
        """Means instead of sums."""
        for value in {id(v): v for v in (self.second, self.cross, self.mean, self.other)}.values():
            value /= max(1, self.tokens)
        return Moments(self.second, self.cross, self.mean, self.other, self.tokens)


def like_others(moments: list[Moments]) -> list[Moments]:
    """An expert that saw no token gets the mean of the others' moments."""
    for k, one in enumerate(moments):
        seen = [m for m in moments if m.tokens]
        others = [m for m in seen if len(m.mean) == len(one.mean)]
        if not one.tokens and others:
            second, mean = sum(m.second for m in others) / len(others), sum(m.mean for m in others) / len(others)
            moments[k] = Moments(second, second, mean, mean, 0)
        elif not one.tokens and seen:  # none of its width: as much in every direction
            size = sum(float(m.second.diagonal().mean()) for m in seen) / len(seen)
            second = size * torch.eye(len(one.mean)).to(one.second)
            moments[k] = Moments(second, second, one.mean, one.mean, 0)
    return moments


def check_finite(x: Tensor, z: Tensor, path: str, number: int, batch: int) -> None:
    """Raise ValueError unless the inputs of the site ``path`` are finite in both streams."""
    if not bool(torch.isfinite(x.sum() + z.sum())):
        raise ValueError(
            f"the inputs of {path} in block {number}, batch {batch} of the calibration text, hold NaN or Inf; try --dtype "
            "float32 or other text"
        )


def checked(moments: Moments, path: str, number: int | str) -> Moments:
    """``moments``, or ValueError if they are not finite."""
    if bool(torch.isfinite(moments.second).all() & torch.isfinite(moments.cross).all()):
        return moments
    raise ValueError(f"the inputs of {path} in block {number} hold NaN or Inf; try --dtype float32 or other text")
