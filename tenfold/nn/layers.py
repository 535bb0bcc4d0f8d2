"""The layers: a structure, its factors as parameters, and a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenfold.structure import Factors, Structure


class SharedFactors(nn.Module):
    """Factors that several layers use, registered once on the base model.

    Layers hold it in a plain list and fetch a factor by calling it, so that hooks of offloading and of FSDP fire.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device=None, dtype=None):
        super().__init__()
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def forward(self, key: str) -> Tensor:
        return getattr(self, key)


class _Factorized(nn.Module):
    """What the layers have in common: a structure, its factors, and a ``weight`` that only tells shape and dtype."""

    def __init__(self, structure: Structure, shared: dict[str, str] | None = None, device=None, dtype=None):
        super().__init__()
        self.structure, self.shared = structure, dict(shared or {})
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

    def factors(self) -> Factors:
        """The factors by name, shared ones fetched from their container."""
        return {
            name: self._container[0](self.shared[name]) if name in self.shared else getattr(self, name)
            for name in self._names
        }

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Copy ``factors`` into the parameters and index maps of this layer, the shared ones left out."""
        self.structure.check_factors(factors)
        for name in self._names:
            if name not in self.shared:
                getattr(self, name).copy_(factors[name])

    def dense(self) -> Tensor:
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
    def dtype(self) -> torch.dtype:
        holder = next(self.parameters(), None)
        return next(self._container[0].parameters()).dtype if holder is None else holder.dtype

    def extra_repr(self) -> str:
        return repr(self.structure)


class FactorizedLinear(_Factorized):
    """``y = x @ W.T + bias`` with ``W (out, in)`` in a structure.

    Args:
        structure: the structure of ``W``.
        bias: whether there is a bias ``(out,)``.
        shared: ``{factor name: key}`` of the factors that a :class:`SharedFactors` holds; call :meth:`attach` then.
    """

    def __init__(self, structure: Structure, bias: bool = True, shared=None, device=None, dtype=None):
        super().__init__(structure, shared, device, dtype)
        self.out_features, self.in_features = structure.shape
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.structure._apply(self.factors(), x)
        return y if self.bias is None else y + self.bias


class FactorizedEmbedding(_Factorized):
    """``W[ids] * scale`` with ``W (vocabulary, width)`` in a structure, looked up without ``W``.

    Args:
        structure: the structure of ``W``.
        padding_idx: kept for tools that read it; the row of padding is trained like any other.
        scale: what the model multiplies its embeddings by (Gemma), 1 elsewhere.
    """

    def __init__(self, structure: Structure, padding_idx=None, scale: float = 1.0, shared=None, device=None, dtype=None):
        super().__init__(structure, shared, device, dtype)
        self.num_embeddings, self.embedding_dim = structure.shape
        self.padding_idx, self.scale = padding_idx, scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.structure._rows(self.factors(), ids)
        return rows if self.scale == 1.0 else rows * self.scale

    def logits(self, states: Tensor) -> Tensor:
        """``states @ W.T``: the tied output head."""
        return self.structure._apply(self.factors(), states)


class TiedEmbedding(nn.Module):
    """A second name of a folded embedding (T5's encoder and decoder): it has no parameters and asks the first."""

    def __init__(self, embedding: FactorizedEmbedding):
        super().__init__()
        self._embedding = [embedding]

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        return self._embedding[0](ids)


class TiedHead(nn.Module):
    """The output head of a folded, tied embedding: it has no matrix and asks the embedding.

    Args:
        embedding: the folded embedding.
        bias: the head's own bias, where it has one (BERT).
    """

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None):
        super().__init__()
        self._embedding = [embedding]
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, states: Tensor) -> Tensor:
        logits = self._embedding[0].logits(states)
        return logits if self.bias is None else logits + self.bias
