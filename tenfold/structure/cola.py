"""CoLA: two factors with a non-linearity between them, so the layer has no matrix and is no ``Structure``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.structure.base import Factors, FactorSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class Cola(FactorSpec, kind="cola"):
    """``y = up @ activation(down @ x)`` with ``down (rank, in)`` and ``up (out, rank)``, described by integers and a name.

    It has the interface of a structure that layers, plans, checkpoints and counts use; what needs a matrix raises.

    Raises:
        ValueError: the rank is not between 1 and the smaller side, or the activation is unknown.

    Reference: CoLA, arXiv 2502.10940.
    """

    matrices: ClassVar[None] = None

    out_features: int
    in_features: int
    rank: int
    activation: str = "silu"

    def __post_init__(self):
        if not isinstance(self.rank, int) or not 1 <= self.rank <= min(self.shape):
            out, inner = self.shape
            raise ValueError(f"rank {self.rank} of a {out}x{inner} CoLA layer must be from 1 to {min(out, inner)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")

    @classmethod
    def for_shape(cls, out: int, inner: int, spec: dict) -> Cola:
        """Return the layer of a recipe's ``spec``; the rank is a quarter of the smaller side unless given."""
        fields = {"out_features": out, "in_features": inner, "rank": max(1, min(out, inner) // 4)} | spec
        layer = cls.from_fields({name: value for name, value in fields.items() if name != "kind"})
        if layer.shape != (out, inner):
            raise ValueError(f"{layer} has other sides than {(out, inner)} (out, in): leave them out")
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"up": (self.out_features, self.rank), "down": (self.rank, self.in_features)}

    def axes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        return dict.fromkeys(self.factor_shapes(), ((), (0,), (1,)))

    def fans(self) -> dict[str, tuple[int, int]]:
        return {name: (inner, out) for name, (out, inner) in self.factor_shapes().items()}

    def last_factors(self) -> set[str]:
        return {"up"}

    def flops(self, rows: int = 1) -> int:
        """Return the FLOPs for ``rows`` vectors, the activation left out."""
        return 2 * rows * self.numel

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """Return the authors' initial factors, whatever ``std``: of standard deviation ``((in + out) rank)^(-1/4)``."""
        scale = (sum(self.shape) * self.rank) ** -0.25
        shapes = self.factor_shapes().items()
        return {name: torch.randn(shape, generator=generator, dtype=dtype) * scale for name, shape in shapes}

    def _apply(
        self, factors: Factors, x: Float[Tensor, "*rows inner"], bias: Float[Tensor, "out"] | None = None
    ) -> Float[Tensor, "*rows out"]:
        hidden = ACTIVATIONS[self.activation](torch.nn.functional.linear(x, factors["down"]))
        return torch.nn.functional.linear(hidden, factors["up"], bias)

    def dense(self, factors: Factors | None = None) -> NoReturn:
        """Raise ValueError: there is no matrix."""
        raise ValueError(
            f"a CoLA layer has {self.activation} between its factors, so no matrix stands for it; keep the model as it is, "
            "or train a low-rank one"
        )
