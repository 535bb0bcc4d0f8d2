"""Layers: a structure, its factors as parameters, and a bias."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from tenfold.nn.quantized import dequantize, is_quantized
from tenfold.structure import Factors, Structure
from tenfold.structure.cost_model import hardware_costs
from tenfold.structure.few_rows import is_traced, linear
from tenfold.structure.matmul import BUCKETS, bucket, counts_of

FEW = 128  # rows of a call up to which the overhead of planning exceeds the cost of plain products


@torch.compiler.assume_constant_result
def _is_always_chain(structure: Structure, device_type: str) -> bool:
    """Return whether the product of the matrices of ``structure`` is the cheapest plan for every number of rows."""
    (einsum,) = structure.normal_form()
    return all(counts_of(einsum.spec, rows, hardware_costs(device_type))[1] for rows in BUCKETS)


class SharedFactors(nn.Module):
    """Factors that several layers use, registered once on the base model.

    Layers hold it in a plain list and read a factor by calling it, so that hooks of offloading and of FSDP fire.

    Args:
        shapes: ``{key: shape}``, one key for every group of layers and factor.
        masks: ``{key: probability}`` with which one use of a factor gets no gradient, in training only, because factors shared
            by many experts are updated too often. Every use draws for itself from torch's generator; outputs do not change.

    Reference: MPOE, arXiv 2203.01104 (the mask).
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], masks: dict[str, float] | None = None, device=None, dtype=None
    ):
        super().__init__()
        self.masks = dict(masks or {})
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def forward(self, key: str) -> Tensor:
        """Return the factor of this key."""
        factor = getattr(self, key)
        if key in self.masks and self.training and torch.is_grad_enabled():
            has_gradient = torch.rand((), device=factor.device) >= self.masks[key]
            return torch.where(has_gradient, factor, factor.detach())  # no branch, so that a graph can be compiled
        return factor


class _Factorized(nn.Module):
    """A layer with a structure, its factors, and a ``weight`` that only has a shape and a dtype."""

    def __init__(self, structure: Structure, shared=None, frozen: Sequence[str] = (), device=None, dtype=None):
        super().__init__()
        self.structure, self.shared, self.frozen = structure, dict(shared or {}), tuple(frozen)
        self._container: list[SharedFactors] = []  # a list, so that the container is not registered here too
        self._names = (*structure.factor_shapes(), *structure.index_shapes())
        for name, shape in structure.factor_shapes().items():
            if name not in self.shared:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        for name, shape in structure.index_shapes().items():
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=torch.int32))

    def attach(self, container: SharedFactors) -> None:
        """Read the shared factors from ``container``."""
        self._container[:] = [container]

    @property
    def mask(self) -> float:
        """The probability with which the gradient of its shared factors is dropped."""
        masks = self._container[0].masks if self._container else {}
        return max((masks.get(key, 0.0) for key in self.shared.values()), default=0.0)

    def freeze(self) -> None:
        """Exclude the parameters named in ``frozen`` from training; repeat it after a load, which creates new parameters."""
        for name in self.frozen:
            owner, key = (self._container[0], self.shared[name]) if name in self.shared else (self, name)
            getattr(owner, key).requires_grad_(False)

    def factors(self) -> Factors:
        """Return the factors by name, shared and index maps included, quantised ones dequantised."""
        return {name: dequantize(value) for name, value in self._raw_factors().items()}

    def _raw_factors(self) -> Factors:
        shared = {name: self._container[0](key).to(self.dtype) for name, key in self.shared.items()}
        return {name: getattr(self, name) for name in self._names if name not in shared} | shared

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Copy ``factors`` into the parameters and index maps of this layer, except the shared ones."""
        self.structure.check_factors(factors)
        for name in self._names:
            if name not in self.shared:
                getattr(self, name).copy_(factors[name])

    def dense(self) -> Float[Tensor, "out inner"]:
        return self.structure.dense(self.factors())

    @property
    def weight(self) -> Tensor:
        """A tensor ``(out, in)`` of one NaN for code that reads shape, dtype and device; what is computed from it is NaN.

        It is marked as initialised, so that transformers does not initialise it.
        """
        weight = torch.full((), torch.nan, dtype=self.dtype, device=self.like.device).expand(self.structure.shape)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    @property
    def like(self) -> Tensor:
        """A factor, for its dtype and its device: one of its own, or a shared one if it has none."""
        own = next(self.parameters(), None)
        return next(self._container[0].parameters()) if own is None else own

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its own factors; T5 in half precision keeps some layers in float32, but not what they share."""
        return self.like.dtype

    def extra_repr(self) -> str:
        return repr(self.structure)


class FactorizedLinear(_Factorized):
    """``y = x @ W.T + bias`` with ``W (out, in)`` in a structure.

    Args:
        structure: the structure of ``W``.
        bias: whether there is a bias ``(out,)``.
        shared: ``{factor name: key}`` of the factors in a ``SharedFactors``; requires a call of ``attach``.
        frozen: names of factors that are not trained, and ``bias``; takes effect with ``freeze``.
    """

    def __init__(self, structure: Structure, bias: bool = True, shared=None, frozen=(), device=None, dtype=None):
        super().__init__(structure, shared, frozen, device, dtype)
        self.out_features, self.in_features = structure.shape
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.cached_rows: frozenset[int] = frozenset()  # buckets of rows that use a cached W: tenfold.nn.dense_cache
        self.cached: Tensor | None = None

    def forward(self, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows out"]:
        """Return ``y (..., out)`` for ``x (..., in)``."""
        if x.shape[-1] != self.in_features:  # reshaping could hide it
            raise ValueError(f"the layer reads {self.in_features} numbers a row, the input has {tuple(x.shape)}")
        factors = self._raw_factors()
        quantised = any(map(is_quantized, factors.values()))
        if (names := self.structure.matrices) is not None and (quantised or self._skip_plan(x, len(names))):
            return self.structure._apply_matrices(factors, x, self.bias)
        if quantised:
            factors = self.factors()
        elif self.cached_rows and (w := self._cached_weight(x, factors)) is not None:
            return linear(x, w, self.bias)
        return self.structure._apply(factors, x, self.bias)

    def _skip_plan(self, x: Tensor, matrices: int) -> bool:
        """Return whether to multiply by the matrices without planning: for few rows planning takes longer."""
        if matrices == 1:
            return True
        if torch.compiler.is_compiling():  # independent of the number of rows, so that there is one graph
            return _is_always_chain(self.structure, x.device.type)
        rows = x.numel() // self.in_features
        return rows <= FEW and not torch.is_grad_enabled() and bucket(rows) not in self.cached_rows

    def _cached_weight(self, x: Tensor, factors: Factors) -> Tensor | None:
        """Return the cached ``W`` if it may be used: without gradients, and for this number of rows."""
        plain = not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))
        if not plain or is_traced() or bucket(x.numel() // self.in_features) not in self.cached_rows:
            return None
        if self.cached is None:
            self.cached = self.structure.dense(factors)
        return self.cached

    def _apply(self, *arguments, **keywords):  # nn.Module's: a change of device or dtype
        self.cached = None
        return super()._apply(*arguments, **keywords)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"cached_rows": frozenset(), "cached": None}


class FactorizedEmbedding(_Factorized):
    """``W[ids] * scale`` with ``W (vocabulary, width)`` in a structure, looked up without making ``W``.

    Args:
        structure: the structure of ``W``.
        padding_idx: kept for tools that read it; the row of padding is trained like any other.
        scale: by which the model multiplies its embeddings (Gemma); not applied in the tied head.
        shared, frozen: as in ``FactorizedLinear``.
    """

    def __init__(
        self, structure: Structure, padding_idx=None, scale=1.0, shared=None, frozen=(), device=None, dtype=None
    ):
        super().__init__(structure, shared, frozen, device, dtype)
        self.num_embeddings, self.embedding_dim = structure.shape
        self.padding_idx, self.multiplier = padding_idx, scale

    def forward(self, x: Num[Tensor, "*rows"], as_head: bool = False) -> Float[Tensor, "..."]:
        """Return the rows of the ids ``x (...)``; with ``as_head`` the logits ``x @ W.T`` of states ``x (..., width)``.

        A tied head calls the module, too, so that hooks of offloading and of FSDP fire.
        """
        if as_head:
            raw = self._raw_factors()
            if self.structure.matrices is not None and any(map(is_quantized, raw.values())):
                return self.structure._apply_matrices(raw, x)
            return self.structure._apply({name: dequantize(value) for name, value in raw.items()}, x)
        cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if cast else nullcontext():  # as nn.Embedding
            rows = self._look_up(x)
        # the scale is rounded to the dtype, as in transformers' Gemma
        return rows if self.multiplier == 1.0 else rows * rows.new_full((), self.multiplier)

    def _look_up(self, ids: Tensor) -> Tensor:
        """Return ``W[ids]``; of the first quantised factor only the rows that are read are dequantised."""
        raw, names = self._raw_factors(), self.structure.matrices
        if names is None or self.structure.index_shapes() or not any(map(is_quantized, raw.values())):
            return self.structure.rows({name: dequantize(value) for name, value in raw.items()}, ids)
        rows = nn.functional.embedding(ids, raw[names[0]])
        for name in names[1:]:
            rows = rows @ dequantize(raw[name])
        return rows


class _Tied(nn.Module):
    """A second use of a factorised embedding: it has no matrix and calls the embedding."""

    def __init__(self, embedding: FactorizedEmbedding):
        super().__init__()
        self.attach(embedding)

    def attach(self, embedding: FactorizedEmbedding) -> None:
        self._embedding = [embedding]  # a list, so that the embedding is not registered here too

    @property
    def structure(self) -> Structure:
        return self._embedding[0].structure

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def dense(self) -> Float[Tensor, "out inner"]:
        return self._embedding[0].dense()


class TiedEmbedding(_Tied):
    """A second embedding with the matrix of a factorised one (T5's encoder and decoder)."""

    def forward(self, ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        return self._embedding[0](ids)


class TiedHead(_Tied):
    """The output head of a factorised, tied embedding.

    Args:
        embedding: the factorised embedding.
        bias: the head's own bias, where it has one (BERT).
    """

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None):
        super().__init__(embedding)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    def forward(self, states: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits ``(..., vocabulary)`` of ``states (..., width)``."""
        logits = self._embedding[0](states, as_head=True)
        return logits if self.bias is None else logits + self.bias
