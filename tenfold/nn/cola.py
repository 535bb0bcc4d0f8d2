"""CoLA: two factors with a non-linearity between them. No matrix stands for such a layer, so it is no structure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tenfold.nn.layers import FactorizedLinear
from tenfold.structure import Factors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class Cola:
    """``y = up @ activation(down @ x)`` with ``down (rank, in)`` and ``up (out, rank)``, described by integers and a name.

    It answers what layers, plans, checkpoints and counts ask of a structure. What needs a matrix is refused.

    Raises:
        ValueError: a rank that is not between 1 and the smaller side, or an activation that is not known.

    Reference: CoLA, arXiv 2502.10940.
    """

    kind: ClassVar[str] = "cola"
    matrices: ClassVar[None] = None

    out_features: int
    in_features: int
    rank: int
    activation: str = "silu"

    def __post_init__(self):
        if not isinstance(self.rank, int) or not 1 <= self.rank <= min(self.shape):
            raise ValueError(
                f"rank {self.rank} of a {self.out_features}x{self.in_features} CoLA layer must be from 1 to {min(self.shape)}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")

    @classmethod
    def for_shape(cls, out: int, inner: int, spec: dict) -> Cola:
        """That of a recipe's ``spec`` for ``in -> out`` features; the rank is a quarter of the smaller side unless given."""
        fields = {"out_features": out, "in_features": inner, "rank": max(1, min(out, inner) // 4)}
        made = cls.from_json(fields | spec)
        if made.shape != (out, inner):
            raise ValueError(f"{made} has other sides than {(out, inner)} (out, in): leave them out")
        return made

    @classmethod
    def from_json(cls, data: dict) -> Cola:
        """What :meth:`to_json` wrote."""
        fields = {key: value for key, value in data.items() if key != "kind"}
        names = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                raise ValueError(f"cola has no field {name!r}; its fields are {', '.join(names)}")
        return cls(**fields)

    def to_json(self) -> dict:
        """The fields and the kind, as plain JSON."""
        return {"kind": self.kind} | dataclasses.asdict(self)

    @classmethod
    def is_open(cls, spec: dict) -> bool:
        """No budget sets its rank: what a rank loses is known of matrices only."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``"""
        return self.out_features, self.in_features

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``up (out, rank)`` and ``down (rank, in)``."""
        return {"up": (self.out_features, self.rank), "down": (self.rank, self.in_features)}

    def index_shapes(self) -> dict[str, tuple[int]]:
        """None."""
        return {}

    def axes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """``{factor: its axes as (batch, out, in)}``, as of a structure."""
        return dict.fromkeys(self.factor_shapes(), ((), (0,), (1,)))

    def fans(self) -> dict[str, tuple[int, int]]:
        """``{factor: (fan in, fan out)}``"""
        return {name: (inner, out) for name, (out, inner) in self.factor_shapes().items()}

    def last(self) -> set[str]:
        """``up``, which is applied last."""
        return {"up"}

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.factor_shapes().values())

    def flops(self, rows: int = 1) -> int:
        """FLOPs for ``rows`` vectors, the activation left out."""
        return 2 * rows * self.numel

    def init(self, std: float, generator: torch.Generator | None = None, dtype=torch.float32) -> Factors:
        """The authors' start, whatever ``std``: entries of standard deviation ``((in + out) rank)^(-1/4)``."""
        size = (sum(self.shape) * self.rank) ** -0.25
        shapes = self.factor_shapes().items()
        return {name: torch.randn(shape, generator=generator, dtype=dtype) * size for name, shape in shapes}

    def check_factors(self, factors: Factors) -> None:
        """Raise ValueError for a factor that is missing or has another shape."""
        for name, shape in self.factor_shapes().items():
            if name not in factors or tuple(factors[name].shape) != shape:
                raise ValueError(f"factor {name!r} of {self} has to be given with shape {shape}")

    def _apply(
        self,
        factors: Factors,
        x: Float[Tensor, "*rows inner"],
        bias: Float[Tensor, "out"] | None = None,
    ) -> Float[Tensor, "*rows out"]:
        hidden = ACTIVATIONS[self.activation](functional.linear(x, factors["down"]))
        return functional.linear(hidden, factors["up"], bias)

    def dense(self, factors: Factors | None = None) -> NoReturn:
        """Refused: there is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"a CoLA layer has {self.activation} between its factors, so no matrix stands for it; keep the model as it is, "
            "or train a low-rank one"
        )


class ColaLinear(FactorizedLinear):
    """``y = up @ activation(down @ x) + bias``: a :class:`FactorizedLinear` whose parts no matrix stands for.

    Args:
        structure: its sizes and its activation.
        other arguments: as for :class:`FactorizedLinear`.

    Reference: CoLA, arXiv 2502.10940.
    """

    def __init__(self, structure: Cola, bias: bool = True, shared=None, frozen=(), device=None, dtype=None):
        super().__init__(structure, bias, shared, frozen, device, dtype)  # type: ignore[arg-type]
