"""Dense matrices, and products of a tall and a wide one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.einsum_spec import EinsumSpec
from tenfold.structure.linalg import halves, roots
from tenfold.structure.scattered import ScatteredEinsum


@dataclass(frozen=True, kw_only=True)
class Dense(Structure, kind="dense"):
    """``W = matrix (o i)``: the identity among the structures, for sums and for joint plans."""

    out_features: int
    in_features: int

    @property
    def optimal(self) -> bool:
        return True

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        sizes = (("o", self.out_features), ("i", self.in_features))
        return (ScatteredEinsum(EinsumSpec(("o",), ("i",), (("matrix", ("o", "i")),), sizes)),)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Exact."""
        return {"matrix": weight.clone()}

    @property
    def optimal_in_metric(self) -> bool:
        return True

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors:
        """Exact."""
        return self.closed_form(weight)


@dataclass(frozen=True, kw_only=True)
class LowRank(Structure, kind="low_rank"):
    """``W[o, i] = sum_r left[o, r] right[r, i]``

    Raises:
        ValueError: the rank is above the smaller side, where a dense matrix is smaller.
    """

    out_features: int
    in_features: int
    rank: int
    grows = "rank"

    def check(self) -> None:
        if not 1 <= self.rank <= min(self.out_features, self.in_features):
            raise ValueError(
                f"rank {self.rank} of a {self.out_features}x{self.in_features} matrix must be from 1 to "
                f"{min(self.out_features, self.in_features)}"
            )

    @classmethod
    def sizes(
        cls, weight: Tensor, spec: dict, inputs: Tensor, outputs: Tensor, fitted: bool = True
    ) -> list[tuple[Structure, float]]:
        """Every rank that is smaller than the dense matrix, from one decomposition."""
        (out, inner), (row, _), (column, _) = weight.shape, roots(outputs), roots(inputs)
        squares = torch.linalg.svdvals(row @ weight.double() @ column).square()
        left = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        ranks = range(1, max(2, -(-out * inner // (out + inner))))
        return [(cls(out_features=out, in_features=inner, rank=rank), left[rank]) for rank in ranks]

    @property
    def optimal(self) -> bool:
        return True

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        sizes = (("o", self.out_features), ("i", self.in_features), ("r", self.rank))
        factors = (("left", ("o", "r")), ("right", ("r", "i")))
        return (ScatteredEinsum(EinsumSpec(("o",), ("i",), factors, sizes)),)

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Optimal in the Frobenius norm (truncated SVD, Eckart-Young 1936)."""
        left, right = halves(weight, self.rank)
        return {"left": left, "right": right}

    @property
    def optimal_in_metric(self) -> bool:
        return True

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors:
        """Optimal: the truncated SVD of the weight between the roots of both metrics, taken back through them."""
        (row, row_back), (column, column_back) = roots(outputs), roots(inputs)
        left, right = halves(row @ weight.double() @ column, self.rank)
        return {"left": row_back @ left, "right": right @ column_back}
