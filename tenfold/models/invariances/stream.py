"""Residual stream of a pre-norm model: its norms, and the parameters with an axis that runs over it.

Where only norms read the stream and only matrices and embeddings add to it, its basis is free. ``Architecture.norms`` says where
that is so; any other architecture, and a model with parts that have no role, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.architectures import ARCHITECTURES
from tenfold.models.sites import FACTORIZED, LINEAR, PathPatterns, base_path, find_sites
from tenfold.nn import TiedEmbedding, TiedHead

READS = ("attn.q", "attn.k", "attn.v", "attn.qkv", "mlp.in", "mlp.gate", "mlp.in_gate", "head")
WRITES = ("attn.out", "mlp.out")
LARGEST_SHIFT = 1e4  # of b / g: beyond it too many digits are lost


@dataclass(frozen=True)
class PreNorm:
    """Norm of the stream, ``gain * n(x) + shift``, and the paths of the matrices that read its output."""

    path: str
    module: Any
    readers: tuple[str, ...]

    @property
    def mean(self) -> bool:
        """Tell whether ``n`` subtracts the mean (LayerNorm) or not (RMSNorm)."""
        return isinstance(self.module, nn.LayerNorm)

    @property
    def gain(self) -> Tensor:
        """Return a copy of ``g (width,)`` in float64."""
        return self.module.weight.detach().to(torch.float64, copy=True)

    @property
    def shift(self) -> Tensor | None:
        """Return ``b (width,)`` in float64, None where there is none."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().double()

    @property
    def is_uneven(self) -> bool:
        """Tell whether the gains differ, so that they do not commute with a rotation."""
        return bool((self.gain != self.gain[0]).any())


def prenorms(model: PreTrainedModel) -> list[PreNorm]:
    """Return the norms of the stream in the model's order, each with its readers.

    Raises:
        ValueError: the basis of the stream is not free, or the model is compressed or not in memory; the message says why.
    """
    check_dense(model.named_modules())
    sites, table, found = find_sites(model), ARCHITECTURES[model.config.model_type].norms, []
    patterns, missing = PathPatterns({path: path for path in table}, base_path(model)), set(table)
    for path, module in model.named_modules():
        layer, pattern = patterns.match(path)
        if pattern is not None:
            missing.discard(pattern)
            readers = (site.path for site in sites if site.layer == layer and site.role in table[pattern])
            found.append(PreNorm(path, module, tuple(readers)))
    known = {site.path for site in sites if site.role in (*READS, *WRITES, "embed")}
    strange = [path for path, m in model.named_modules() if isinstance(m, LINEAR) and path not in known]
    unread = [norm.path for norm in found if not norm.readers]
    if not table:
        reason = "its table in tenfold/models/architectures.py names no norms before all that reads the stream"
    elif missing:
        reason = f"it has no norm at {missing.pop()}"
    elif strange or unread:
        reason = f"no role says what {strange[0]} does" if strange else f"no matrix reads {unread[0]}"
    else:
        reason = next(filter(None, (_describe_lost_shift(model, norm) for norm in found)), None)
    if reason:
        raise ValueError(
            f"the residual stream of this {model.config.model_type} can't be rotated: {reason}; take a pre-norm model with "
            "its head"
        )
    return found


def _describe_lost_shift(model: PreTrainedModel, norm: PreNorm) -> str | None:
    """Say why the shift of a norm can't be moved, None where it can."""
    bare = [path for path in norm.readers if model.get_submodule(path).bias is None]
    if norm.shift is None or not bare or not norm.is_uneven:
        return None
    wrong = int((norm.shift.abs() > LARGEST_SHIFT * norm.gain.abs()).sum())
    return f"{wrong} gains of {norm.path} are nearly zero where it shifts, and {bare[0]} has no bias" if wrong else None


@torch.no_grad()
def transform_stream(
    model: PreTrainedModel, change: Callable[[Tensor, int], Tensor], only_written: bool = False
) -> None:
    """Replace every parameter ``p`` whose axis ``dim`` runs over the stream by ``change(p, dim)``, a tied one once.

    Args:
        only_written: what is added to the stream (rows, biases, embeddings), not what reads it, nor shifts of norms.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    axes = [(module.weight, 1, True) for module in modules.values() if isinstance(module, nn.Embedding)]
    axes += [(getattr(norm.module, "bias", None), 0, False) for norm in prenorms(model)]
    for site in find_sites(model):
        module, written = modules[site.path], site.role in WRITES
        if site.role != "embed":
            axes.append((module.weight, int(written == isinstance(module, Conv1D)), written))
        if written:
            axes.append((module.bias, 0, True))
    for parameter, dim, written in {id(axis[0]): axis for axis in reversed(axes)}.values():
        if parameter is not None and (written or not only_written):
            parameter.copy_(change(parameter, dim))


def check_dense(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError for a layer that is factorised, or not in memory."""
    for path, module in modules:
        if isinstance(module, (*FACTORIZED, TiedHead, TiedEmbedding)):
            raise ValueError(
                f"{path} is factorised: change the basis before compression, or make it dense first (densify)"
            )
        if any(p.is_meta for p in module.parameters(recurse=False)):
            raise ValueError(f"the weight of {path} is not in memory (meta device or offloaded); load it first")
