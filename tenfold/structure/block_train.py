"""Block tensor trains: two block-diagonal factors with a permutation between them (Monarch has rank one)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, Structure
from tenfold.structure.linalg import roots, truncate
from tenfold.structure.scattered import ScatteredEinsum, einsum


@dataclass(frozen=True, kw_only=True)
class BlockTensorTrain(Structure, kind="block_train"):
    """``W[a b, c d] = sum_r left[b, a, c, r] right[c, b, d, r]``.

    Every sub-matrix ``W[:, b, c, :] (a x d)`` has rank ``rank``. Rank one is Monarch (Dao et al. 2022, arXiv
    2204.00595), any rank BTT (Qiu et al. 2024, arXiv 2406.06248). It costs ``r a b c + r b c d`` multiply-adds.

    Instead of ``outs`` and ``ins`` a recipe may give ``blocks``, that is ``b`` and ``c``, for a matrix of any size.
    """

    outs: tuple[int, int]  # ``(a, b)``
    ins: tuple[int, int]  # ``(c, d)``
    rank: int
    grows, optimal = "rank", True

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
        if not 1 <= self.rank <= (bound := self.bound(self)):
            raise ValueError(f"rank {self.rank} must be from 1 to {bound}, the side of a block")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        sizes = dict(zip("abcdr", (*self.outs, *self.ins, self.rank), strict=True))
        return einsum("a b", "c d", {"left": "b a c r", "right": "c b d r"}, sizes)

    @classmethod
    def bound(cls, smallest) -> int:
        return min(smallest.outs[0], smallest.ins[1])

    def closed_form(self, weight: Float[Tensor, "out inner"]) -> Factors:
        """Return the truncated SVD of every block: optimal, because blocks share no parameters."""
        blocks = weight.reshape(*self.outs, *self.ins).permute(1, 2, 0, 3)  # (b, c, a, d)
        return self._factors(*truncate(blocks, self.rank))

    def metric_form(self, weight: Float[Tensor, "out inner"], inputs: Tensor, outputs: Tensor) -> Factors:
        """Return the optimum for every block in its own diagonal blocks of the metrics: coupling of blocks is ignored."""
        (a, b), (c, d) = self.outs, self.ins
        row, row_inverse = _block_roots(outputs.reshape(a, b, a, b).diagonal(dim1=1, dim2=3).permute(2, 0, 1))
        column, column_inverse = _block_roots(inputs.reshape(c, d, c, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        blocks = weight.double().reshape(*self.outs, *self.ins).permute(1, 2, 0, 3)
        left, right = truncate(row[:, None] @ blocks @ column, self.rank)
        return self._factors(row_inverse[:, None] @ left, right @ column_inverse)

    @staticmethod
    def _factors(left: Tensor, right: Tensor) -> Factors:
        """Return the factors from ``left (b, c, a, r)`` and ``right (b, c, r, d)``."""
        return {"left": left.permute(0, 2, 1, 3), "right": right.permute(1, 0, 3, 2)}


def _block_roots(blocks: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [roots(block) for block in blocks]
    return torch.stack([root for root, _ in pairs]), torch.stack([inverse for _, inverse in pairs])
