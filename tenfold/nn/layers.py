"""The layers: a structure, its factors as parameters, and a bias."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn.functional import linear

from tenfold.nn.quantized import dequantized, is_quantized
from tenfold.structure import Factors, Structure
from tenfold.structure.cost_model import hardware_costs
from tenfold.structure.matmul import BUCKETS, bucket, counts_of, is_traced

FEW = 128  # rows of a call


@torch.compiler.assume_constant_result
def _chained(structure: Structure, kind: str) -> bool:
    """Whether the product of the matrices of ``structure`` is wanted for no number of rows, for code that is compiled."""
    (place,) = structure.normal_form()
    return all(counts_of(place.diagram, rows, hardware_costs(kind))[1] for rows in BUCKETS)


class SharedFactors(nn.Module):
    """Factors that several layers use, registered once on the base model.

    Layers hold it in a plain list and fetch a factor by calling it, so that hooks of offloading and of FSDP fire.

    Args:
        shapes: ``{key: shape}``, a key for every group of layers and factor.
        masks: ``{key: probability}`` with which one use of a factor gives it no gradient, in training only: what is updated
            by many experts is updated too often. Every use, that of an expert in a step, draws for itself, from torch's
            generator, and all uses compute the same.

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
        """The factor of this key."""
        factor = getattr(self, key)
        if key in self.masks and self.training and torch.is_grad_enabled():
            kept = torch.rand((), device=factor.device) >= self.masks[key]
            return torch.where(kept, factor, factor.detach())  # no branch, so that a graph can be compiled
        return factor


class _Factorized(nn.Module):
    """What the layers have in common: a structure, its factors, and a ``weight`` that only tells shape and dtype."""

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
        """Take the shared factors from ``container``."""
        self._container[:] = [container]

    @property
    def mask(self) -> float:
        """The probability with which the gradient of its shared factors is dropped."""
        masks = self._container[0].masks if self._container else {}
        return max((masks.get(key, 0.0) for key in self.shared.values()), default=0.0)

    def freeze(self) -> None:
        """Take what ``frozen`` names out of training; again after a load, which makes new parameters."""
        for name in self.frozen:
            owner, key = (self._container[0], self.shared[name]) if name in self.shared else (self, name)
            getattr(owner, key).requires_grad_(False)

    def factors(self) -> Factors:
        """The factors by name, shared ones fetched from their container, quantised ones as the numbers that they stand for."""
        return {name: dequantized(value) for name, value in self._stored().items()}

    def _stored(self) -> Factors:
        shared = {name: self._container[0](key).to(self.dtype) for name, key in self.shared.items()}
        return {name: getattr(self, name) for name in self._names if name not in shared} | shared

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Copy ``factors`` into the parameters and index maps of this layer, the shared ones left out.

        Raises:
            ValueError: a factor is missing or has another shape.
        """
        self.structure.check_factors(factors)
        for name in self._names:
            if name not in self.shared:
                getattr(self, name).copy_(factors[name])

    def dense(self) -> Float[Tensor, "out inner"]:
        """``W (out, in)``"""
        return self.structure.dense(self.factors())

    @property
    def weight(self) -> Tensor:
        """A meta tensor ``(out, in)`` for code that peeks at shape and dtype; arithmetic on it fails loudly.

        Initialisers of transformers leave it alone, because it says that it is initialised.
        """
        weight = torch.empty(self.structure.shape, dtype=self.dtype, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    @property
    def like(self) -> Tensor:
        """A factor, for its type and its device: one of its own, or a shared one if it has none."""
        own = next(self.parameters(), None)
        return next(self._container[0].parameters()) if own is None else own

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors; in half precision T5 keeps some layers in float32, but not what they share."""
        return self.like.dtype

    def extra_repr(self) -> str:
        return repr(self.structure)


class FactorizedLinear(_Factorized):
    """``y = x @ W.T + bias`` with ``W (out, in)`` in a structure.

    Args:
        structure: the structure of ``W``.
        bias: whether there is a bias ``(out,)``.
        shared: ``{factor name: key}`` of the factors that a :class:`SharedFactors` holds; call :meth:`attach` then.
        frozen: names of factors that are not trained, and ``bias``; :meth:`freeze` carries it out.
    """

    def __init__(self, structure: Structure, bias: bool = True, shared=None, frozen=(), device=None, dtype=None):
        super().__init__(structure, shared, frozen, device, dtype)
        self.out_features, self.in_features = structure.shape
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.cached_rows: frozenset[int] = frozenset()  # buckets of rows that use a cached W: tenfold.nn.dense_cache
        self.cached: Tensor | None = None

    def forward(self, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows out"]:
        """``x (..., in) -> y (..., out)``"""
        if x.shape[-1] != self.in_features:  # else rows would be cut elsewhere, and fit by chance
            raise ValueError(f"the layer reads {self.in_features} numbers a row, the input has {tuple(x.shape)}")
        factors = self._stored()
        quantised = any(map(is_quantized, factors.values()))
        if (names := self.structure.matrices) is not None and (quantised or self._quick(x, len(names))):
            return self.structure._product(factors, x, self.bias)
        factors = self.factors() if quantised else factors
        if self.cached_rows and not quantised and (w := self._matrix(x, factors)) is not None:
            return linear(x, w, self.bias)
        return self.structure._apply(factors, x, self.bias)

    def _quick(self, x: Tensor, matrices: int) -> bool:
        """Whether plain products of matrices are all there is to do: for few rows what is around them takes longer than they."""
        if matrices == 1 or torch.compiler.is_compiling():
            return matrices == 1 or _chained(self.structure, x.device.type)  # whatever the number of rows: one graph
        rows = x.numel() // self.in_features
        return rows <= FEW and not torch.is_grad_enabled() and bucket(rows) not in self.cached_rows

    def _matrix(self, x: Tensor, factors: Factors) -> Tensor | None:
        """Return the cached ``W`` where it may be used: without gradients, and for this number of rows."""
        if self.training or is_traced() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        if bucket(x.numel() // self.in_features) not in self.cached_rows:
            return None
        if self.cached is None:
            self.cached = self.structure.dense(factors)
        return self.cached

    def _apply(self, *arguments, **keywords):  # to another device or type
        self.cached = None
        return super()._apply(*arguments, **keywords)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"cached_rows": frozenset(), "cached": None}


class FactorizedEmbedding(_Factorized):
    """``W[ids] * scale`` with ``W (vocabulary, width)`` in a structure, looked up without ``W``.

    Args:
        structure: the structure of ``W``.
        padding_idx: kept for tools that read it; the row of padding is trained like any other.
        scale: what the model multiplies its embeddings by (Gemma), 1 elsewhere; the tied head does without it.
        shared, frozen: as in :class:`FactorizedLinear`.
    """

    def __init__(
        self,
        structure: Structure,
        padding_idx=None,
        scale: float = 1.0,
        shared=None,
        frozen=(),
        device=None,
        dtype=None,
    ):
        super().__init__(structure, shared, frozen, device, dtype)
        self.num_embeddings, self.embedding_dim = structure.shape
        self.padding_idx, self.multiplier = padding_idx, scale

    def forward(self, x: Num[Tensor, "*rows"], as_head: bool = False) -> Float[Tensor, "..."]:
        """The rows of the ids ``x (...)``; ``as_head``: ``x @ W.T``, the logits of states ``x (..., width)``.

        A tied head calls the module, too, so that hooks of offloading and of FSDP fire.
        """
        if as_head:
            stored = self._stored()
            if self.structure.matrices is not None and any(map(is_quantized, stored.values())):
                return self.structure._product(stored, x)
            factors = {name: dequantized(value) for name, value in stored.items()}
            return self.structure._apply(factors, x)
        cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if cast else nullcontext():  # as nn.Embedding
            rows = self._rows(x)
        return (
            rows if self.multiplier == 1.0 else rows * rows.new_full((), self.multiplier)
        )  # rounded like a dense Gemma's

    def _rows(self, ids: Tensor) -> Tensor:
        """``W[ids]``; of a quantised factor no more than the rows that are looked up become numbers."""
        stored, names = self._stored(), self.structure.matrices
        quantised = any(map(is_quantized, stored.values()))
        if not quantised or names is None or self.structure.index_shapes():
            return self.structure._rows({name: dequantized(value) for name, value in stored.items()}, ids)
        rows = torch.nn.functional.embedding(ids, stored[names[0]])
        for name in names[1:]:
            rows = rows @ dequantized(stored[name])
        return rows


class _Tied(nn.Module):
    """A second name of a folded embedding: it has no matrix and asks the embedding."""

    def __init__(self, embedding: FactorizedEmbedding):
        super().__init__()
        self.attach(embedding)

    def attach(self, embedding: FactorizedEmbedding) -> None:
        """Ask ``embedding`` from now on."""
        self._embedding = [embedding]  # a list, so that the embedding is not registered here too

    @property
    def structure(self) -> Structure:
        """That of the embedding."""
        return self._embedding[0].structure

    @property
    def weight(self) -> Tensor:
        """That of the embedding: a meta tensor."""
        return self._embedding[0].weight

    def dense(self) -> Float[Tensor, "out inner"]:
        """``W (vocabulary, width)``"""
        return self._embedding[0].dense()


class TiedEmbedding(_Tied):
    """Another embedding that is the same as a folded one (T5's encoder and decoder)."""

    def forward(self, ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        """The rows of ``ids``."""
        return self._embedding[0](ids)


class TiedHead(_Tied):
    """The output head of a folded, tied embedding.

    Args:
        embedding: the folded embedding.
        bias: the head's own bias, where it has one (BERT).
    """

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None):
        super().__init__(embedding)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    def forward(self, states: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """``states (..., width) -> logits (..., vocabulary)``"""
        logits = self._embedding[0](states, as_head=True)
        return logits if self.bias is None else logits + self.bias
