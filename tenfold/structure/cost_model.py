"""Prices of contractions: FLOPs, and what memory traffic, copies and calls cost beside them.

Constants are shipped per device type: measured once on two cores (float32) and taken from the data sheet of an H100 (bfloat16).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class HardwareCosts:
    """Non-FLOP costs of a device type, in FLOPs of large matrix products that take the same time."""

    moved: float  # per element that is read or written in order
    copied: float  # per element that is copied into another memory order, on top of ``moved``
    call: float  # per contraction


@dataclass(frozen=True)
class OpCounts:
    """Operation counts of one or several contractions: FLOPs, elements moved, elements copied, calls.

    A multiply-add is two FLOPs, a product that is not summed one, as in opt_einsum.
    """

    flops: int = 0
    moved: int = 0
    copied: int = 0
    calls: int = 0

    def __add__(self, other: OpCounts) -> OpCounts:
        return OpCounts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def price(self, costs: HardwareCosts) -> float:
        """Return the expected time in equivalent FLOPs."""
        return self.flops + costs.moved * self.moved + costs.copied * self.copied + costs.call * self.calls


CPU = HardwareCosts(moved=20.0, copied=120.0, call=5e5)
CUDA = HardwareCosts(moved=500.0, copied=1500.0, call=4e9)


def hardware_costs(device_type: str) -> HardwareCosts:
    """Return the costs of ``cpu``; those of ``cuda`` for every other device type."""
    return CPU if device_type == "cpu" else CUDA


def matmul_counts(rows: int, out: int, inner: int) -> OpCounts:
    """Return the counts of ``x (rows, inner) @ W.T`` with a dense ``W (out, inner)``."""
    return OpCounts(2 * rows * out * inner, rows * (out + inner) + out * inner, 0, 1)
