"""Block tensor trains: two block-diagonal factors with a permutation between them (Monarch is rank one)."""

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
class BlockTensorTrain(Structure, kind="block_train"):
    """``W[a b, c d] = sum_r left[b, a, c, r] right[c, b, d, r]``

    Every sub-matrix ``W[:, b, c, :] (a x d)`` has rank ``rank``. Rank one is Monarch (Dao et al. 2022, arXiv
    2204.00595), any rank BTT (Qiu et al. 2024, arXiv 2406.06248). It costs ``r a b c + r b c d`` multiply-adds.

    Args:
        outs: ``(a, b)``.
        ins: ``(c, d)``.

    A recipe may give ``blocks`` instead of ``outs`` and ``ins``: ``b`` and ``c``, for a matrix of any size.
    """

    outs: tuple[int, int]
    ins: tuple[int, int]
    rank: int
    grows = "rank"

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        blocks = spec.get("blocks")
        if blocks is None:
            return super().complete(out, inner, spec)
        rest = {key: value for key, value in spec.items() if key != "blocks"}
        return {"outs": (out // blocks, blocks), "ins": (blocks, inner // blocks)} | rest

    def check(self) -> None:
        if len(self.outs) != 2 or len(self.ins) != 2:
            raise ValueError(f"outs {self.outs} and ins {self.ins} of a block train are two numbers each")
        if not 1 <= self.rank <= min(self.outs[0], self.ins[1]):
            raise ValueError(
                f"rank {self.rank} must be from 1 to {min(self.outs[0], self.ins[1])}, the side of a block"
            )

    @property
    def optimal(self) -> bool:
        return True

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        (a, b), (c, d) = self.outs, self.ins
        sizes = (("a", a), ("b", b), ("c", c), ("d", d), ("r", self.rank))
        factors = (("left", ("b", "a", "c", "r")), ("right", ("c", "b", "d", "r")))
        return (ScatteredEinsum(EinsumSpec(("a", "b"), ("c", "d"), factors, sizes)),)

    @classmethod
    def bound(cls, smallest) -> int:
        return min(smallest.outs[0], smallest.ins[1])

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Optimal: the blocks do not share parameters, and each is a truncated SVD."""
        blocks = weight.reshape(*self.outs, *self.ins).permute(1, 2, 0, 3)  # (b, c, a, d)
        return self._named(*halves(blocks, self.rank))  # (b, c, a, r), (b, c, r, d)

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors:
        """A start: every block in its own diagonal blocks of the metrics, what couples blocks left out."""
        (a, b), (c, d) = self.outs, self.ins
        row, row_back = _block_roots(outputs.reshape(a, b, a, b).diagonal(dim1=1, dim2=3).permute(2, 0, 1))
        column, column_back = _block_roots(inputs.reshape(c, d, c, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        blocks = weight.double().reshape(*self.outs, *self.ins).permute(1, 2, 0, 3)
        left, right = halves(row[:, None] @ blocks @ column, self.rank)
        return self._named(row_back[:, None] @ left, right @ column_back)

    @staticmethod
    def _named(left: Tensor, right: Tensor) -> Factors:
        return {"left": left.permute(0, 2, 1, 3), "right": right.permute(1, 0, 3, 2)}


def _block_roots(blocks: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [roots(block) for block in blocks]
    return torch.stack([root for root, _ in pairs]), torch.stack([back for _, back in pairs])
