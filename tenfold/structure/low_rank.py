"""Dense matrices, and products of a tall and a wide matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.linalg import roots, truncate
from tenfold.structure.scattered import ScatteredEinsum, einsum


@dataclass(frozen=True, kw_only=True)
class Dense(Structure, kind="dense"):
    """``W = matrix (o i)``: the identity among the structures, for sums and for joint plans."""

    out_features: int
    in_features: int
    optimal = optimal_in_metric = True

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        return einsum("o", "i", {"matrix": "o i"}, {"o": self.out_features, "i": self.in_features})

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        return {"matrix": weight.clone()}

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors:
        return self.closed_form(weight)


@dataclass(frozen=True, kw_only=True)
class LowRank(Structure, kind="low_rank"):
    """``W[o, i] = sum_r left[o, r] right[r, i]``."""

    out_features: int
    in_features: int
    rank: int
    grows = "rank"
    optimal = optimal_in_metric = True

    def check(self) -> None:
        out, inner = self.out_features, self.in_features
        if not 1 <= self.rank <= min(out, inner):
            raise ValueError(f"rank {self.rank} of a {out}x{inner} matrix must be from 1 to {min(out, inner)}")

    @classmethod
    def errors_by_size(
        cls, weight: Tensor, spec: dict, inputs: Tensor, outputs: Tensor, fitted: bool = True
    ) -> list[tuple[Structure, float]]:
        """Return every rank that is smaller than the dense matrix, with its error, from one decomposition."""
        (out, inner), (row, _), (column, _) = weight.shape, roots(outputs), roots(inputs)
        squares = torch.linalg.svdvals(row @ weight.double() @ column).square()
        errors = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        ranks = range(1, max(2, -(-out * inner // (out + inner))))
        return [(cls(out_features=out, in_features=inner, rank=rank), errors[rank]) for rank in ranks]

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        sizes = {"o": self.out_features, "i": self.in_features, "r": self.rank}
        return einsum("o", "i", {"left": "o r", "right": "r i"}, sizes)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Return the truncated SVD, the optimum in the Frobenius norm (Eckart-Young 1936)."""
        left, right = truncate(weight, self.rank)
        return {"left": left, "right": right}

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors:
        """Return the optimum: the truncated SVD of the whitened weight, whitening undone."""
        (row, row_inverse), (column, column_inverse) = roots(outputs), roots(inputs)
        left, right = truncate(row @ weight.double() @ column, self.rank)
        return {"left": row_inverse @ left, "right": right @ column_inverse}
