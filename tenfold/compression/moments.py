"""Second moments of the inputs of a site."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.models.distributed import all_reduce, all_reduce_number


class Moments:
    """Moments of the inputs of a site: those that it gets, ``z``, and those whose outputs it should reproduce, ``x``.

    ``second`` is the mean of ``z z^T (in, in)``, ``cross`` that of ``x z^T``, ``mean`` that of ``z (in,)`` and ``mean_original``
    that of ``x``, in float64, of ``tokens`` vectors; sums until ``reduce`` makes means of them.

    Args:
        width: number of inputs.
        same: ``x`` is ``z``, so that two are the same tensors as the others.
    """

    def __init__(self, width: int, same: bool):
        self.second, self.mean = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.cross, self.mean_original = (self.second, self.mean) if same else (self.second.clone(), self.mean.clone())
        self.same, self.tokens = same, 0

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add rows of ``x`` and ``z (n, in)``, whose products are in float32."""
        with torch.autocast(z.device.type, enabled=False):  # hooks run inside the autocast of a block
            self.second += (z.T @ z).to(self.second.device)
            self.mean += z.sum(0).to(self.mean)
            if not self.same:
                self.cross += (x.T @ z).to(self.cross.device)
                self.mean_original += x.sum(0).to(self.mean_original)
            self.tokens += len(z)

    def reduce(self, path: str) -> Moments:
        """Return the means over all processes, in place; raise ValueError unless those of the site ``path`` are finite."""
        self.second, self.mean = all_reduce(self.second), all_reduce(self.mean)
        self.tokens = int(all_reduce_number(self.tokens))
        if self.same:
            self.cross, self.mean_original = self.second, self.mean
        else:
            self.cross, self.mean_original = all_reduce(self.cross), all_reduce(self.mean_original)
        for value in {id(v): v for v in (self.second, self.cross, self.mean, self.mean_original)}.values():
            value /= max(1, self.tokens)
        check_finite(self.second + self.cross, path)
        return self


def check_finite(values: Tensor, where: str) -> None:
    """Raise ValueError unless ``values`` of the inputs of a site are finite."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the inputs of {where} hold NaN or Inf; try --dtype float32 or other text")


def reduce_moments(sums: dict[str, Moments]) -> list[Moments]:
    """Reduce the moments of sites; experts that saw no token get the mean of the others."""
    moments = [one.reduce(path) for path, one in sums.items()]
    seen = [m for m in moments if m.tokens]
    for one in (m for m in moments if seen and not m.tokens):
        alike = [m.mean for m in seen if len(m.mean) == len(one.mean)]
        one.second = one.cross = mean_of_others([m.second for m in seen], len(one.mean))
        one.mean = one.mean_original = torch.stack(alike).mean(0) if alike else one.mean
    return moments


def mean_of_others(seen: list[Tensor], size: int) -> Tensor:
    """Return the mean of the matrices of this ``size``; without any, the identity times the mean of all diagonals."""
    if alike := [value for value in seen if len(value) == size]:
        return torch.stack(alike).mean(0)
    return sum(float(value.diagonal().mean()) for value in seen) / len(seen) * torch.eye(size, dtype=torch.float64)
