"""What it is worth, in FLOPs of large matrix products in the same time, to move or to copy a number, and to begin a product.

Plans that are carried out are priced by what was measured on the machine (:mod:`tenfold.nn.worth`), and by what is shipped where
nothing was. Plans that are only counted (FLOPs of ``inspect``, of recipes) are the shipped ones' on every machine.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Worth:
    """FLOPs in the time of what else a plan does.

    Args:
        moved: of a number that is read or written in order.
        copied: of a number that is put into another order in memory, beside its being moved.
        call: of a contraction's beginning.
        narrow: of a number that a product reads or writes, beside its being moved. A product is slower where a side is short:
            of the FLOPs that sum over ``k`` numbers, or make ``k`` columns, this adds about the share ``narrow / 2 k``.
    """

    moved: float
    copied: float
    call: float
    narrow: float = 0.0


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
            self.flops
            + (worth.moved + worth.narrow) * self.moved
            + worth.copied * (self.copied + self.skinny)
            + worth.call * self.calls
        )


CPU = Worth(20.0, 120.0, 5e5)  # two cores, float32
NARROW = 40.0  # on a CPU: batches of 24 to 96 products with sides of 16 to 64, in turns with large ones
SHIPPED = {
    "cpu": replace(CPU, narrow=NARROW),
    "cuda": Worth(500.0, 1500.0, 4e9),
}  # bfloat16: 800 TFLOP/s, 3.3 TB/s, 5 microseconds


MEASURED: dict[str, Worth] = {}


def worth_of(kind: str) -> Worth:
    """Of ``cpu``, ``cuda``, ...: measured, or shipped; other accelerators are taken for ``cuda``."""
    return MEASURED.get(kind) or SHIPPED.get(kind, SHIPPED["cuda"])
