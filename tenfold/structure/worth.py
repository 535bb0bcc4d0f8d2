"""What it is worth, in FLOPs of large matrix products in the same time, to move or to copy a number, and to begin a product.

Plans that are carried out are priced by what was measured on the machine (:mod:`tenfold.nn.worth`), and by what is shipped where
nothing was. Plans that are only counted (FLOPs of ``inspect``, of recipes) are the shipped ones' on every machine.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Worth:
    """FLOPs in the time of what else a plan does.

    Args:
        moved: of a number that is read or written in order.
        copied: of a number that is put into another order in memory, beside its being moved.
        call: of a contraction's beginning.
    """

    moved: float
    copied: float
    call: float


@dataclass(frozen=True)
class Cost:
    """Of one contraction or many: FLOPs by opt_einsum's count; numbers that are read and written, and those that are put into
    another order in memory; contractions; numbers that skinny products read and write, which costs as much as a copy.
    """

    flops: int = 0
    moved: int = 0
    copied: int = 0
    calls: int = 0
    skinny: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.moved + other.moved, self.copied + other.copied, self.calls + other.calls,
            self.skinny + other.skinny,
        )  # fmt: skip

    def times(self, number: int) -> Cost:
        return Cost(*(number * value for value in astuple(self)))

    def price(self, worth: Worth) -> float:
        """What it is expected to take, in FLOPs."""
        return (
            self.flops + worth.moved * self.moved + worth.copied * (self.copied + self.skinny) + worth.call * self.calls
        )


CPU = Worth(20.0, 120.0, 5e5)  # two cores, float32
SHIPPED = {"cpu": CPU, "cuda": Worth(500.0, 1500.0, 4e9)}  # bfloat16: 800 TFLOP/s, 3.3 TB/s, 5 microseconds


MEASURED: dict[str, Worth] = {}


def worth_of(kind: str) -> Worth:
    """Of ``cpu``, ``cuda``, ...: measured, or shipped; other accelerators are taken for ``cuda``."""
    return MEASURED.get(kind) or SHIPPED.get(kind, SHIPPED["cuda"])
