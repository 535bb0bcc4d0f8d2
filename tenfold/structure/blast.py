"""BLAST: bases shared along rows and columns of blocks, with a diagonal coupling per block."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.structure.base import Structure
from tenfold.structure.scattered import ScatteredEinsum, einsum


@dataclass(frozen=True, kw_only=True)
class Blast(Structure, kind="blast"):
    """``W[p a, q c] = sum_r left[p, a, r] coupling[p, q, r] right[q, c, r]``.

    Reference: Lee et al. 2024, arXiv 2410.21262. No closed form is known; the fit alternates.
    """

    outs: tuple[int, int]  # ``(p, a)``, the number of blocks and their rows
    ins: tuple[int, int]  # ``(q, c)``
    rank: int
    grows = "rank"

    @classmethod
    def complete(cls, out: int, inner: int, spec: dict) -> dict:
        """Return all fields; instead of ``outs`` and ``ins`` a recipe may give ``blocks``, the number of blocks a side."""
        spec = dict(spec)
        blocks = spec.pop("blocks", 4)
        return {"outs": (blocks, out // blocks), "ins": (blocks, inner // blocks)} | spec

    def check(self) -> None:
        if len(self.outs) != 2 or len(self.ins) != 2:
            raise ValueError(f"outs {self.outs} and ins {self.ins} of a BLAST matrix are two numbers each")

    def normal_form(self) -> tuple[ScatteredEinsum, ...]:
        sizes = dict(zip("paqcr", (*self.outs, *self.ins, self.rank), strict=True))
        return einsum("p a", "q c", {"left": "p a r", "coupling": "p q r", "right": "q c r"}, sizes)
