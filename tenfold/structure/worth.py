"""What it is worth, in FLOPs of large matrix products in the same time, to move or to copy a number, and to begin a product.

Plans that are carried out are priced by what was measured on the machine (:mod:`tenfold.nn.worth`), and by what is shipped where
nothing was. Plans that are only counted (FLOPs of ``inspect``, of recipes) are the shipped ones' on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass


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


CPU = Worth(20.0, 100.0, 5e5)  # two cores with AVX-512, float32
SHIPPED = {"cpu": CPU, "cuda": Worth(500.0, 1500.0, 4e9)}  # bfloat16: 800 TFLOP/s, 3.3 TB/s, 5 microseconds


MEASURED: dict[str, Worth] = {}


def worth_of(kind: str) -> Worth:
    """Of ``cpu``, ``cuda``, ...: measured, or shipped; other accelerators are taken for ``cuda``."""
    return MEASURED.get(kind) or SHIPPED.get(kind, SHIPPED["cuda"])
