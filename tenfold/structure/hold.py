"""What a call may hold on to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Hold:
    """What is kept from the way forward to the way back beside the input and the factors, and what memory is worth.

    Args:
        matrices: where every ``W`` that a plan makes is kept, by diagram and addresses of the factors; what is here of the same
            factors is used. None: none is kept.
        between: what lies between two products is kept, where it is no larger than the input.
        little: memory is worth more than time: what is made on the way takes no more than ``W``, as far as that can be.
    """

    matrices: dict[tuple, Tensor] | None = None
    between: bool = False
    little: bool = False


NOTHING = Hold()
