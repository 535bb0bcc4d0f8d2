"""Symmetries: changes of a network's weights that leave its function as it is, in place and at no cost at run time.

A structure fits better after the right one; :mod:`tenfold.models.invariances.choice` chooses. With a permutation ``order``
the new unit ``k`` is the old ``order[k]``; with a rotation ``Q`` a vector ``x`` of the stream becomes ``Q^T x``.

| what | what is free | why |
|---|---|---|
| hidden units of an MLP | a permutation | the activation works unit by unit |
| the residual stream | a permutation | so do norms, gains and biases |
| .. RMSNorm before every reader (llama, qwen3) | any rotation | ``n(Q^T x) = Q^T n(x)``, gains moved to the readers |
| .. LayerNorm before every reader (gpt2, opt, phi, gpt_neox) | rotations with ``Q 1 = 1`` | .. if the mean stays, too |
| .. norm behind the sum or the writer (bert, gemma3) | a permutation | its gain stands in the stream |
| values of a head | any basis | the output matrix follows |
| queries and keys of a head (gpt2, opt, bert) | any basis | only ``q^T k`` counts |
| .. with rotary positions | turns and scales of each pair | they commute with the rotation by position |
| .. with a norm per head (qwen3, gemma3) | nothing | a norm and its gain stand in between |

Keys and values serve a whole group of query heads, so bases are per group. The gain of the last norm can't be moved into a
head that is tied to the embedding: such a model is rotated with ``untie=True``, and then has one more matrix.

References: SliceGPT (arXiv 2401.15024) for rotations, ProcrustesGPT (arXiv 2506.02818) for rotations towards a structure,
Git Re-Basin (arXiv 2209.04836) for permutations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.invariances.blocks import checked_order, groups_of, heads_at
from tenfold.models.invariances.blocks import hidden_weights as hidden_weights
from tenfold.models.invariances.blocks import permute_hidden as permute_hidden
from tenfold.models.invariances.blocks import turn_heads as turn_heads
from tenfold.models.invariances.stream import Feed, Stream, trace
from tenfold.models.plan import Plan
from tenfold.models.sites import base_model, head_path, is_tied, weight_of
from tenfold.models.surgery import set_matrix, untie

LARGEST_SHIFT = 1e4  # of b / g: beyond it too many digits are lost
KINDS = ("reads", "writes", "gain", "shift")


def free_symmetries(model: PreTrainedModel) -> dict[str, str]:
    """What may be changed in ``model``: the table of this module for one model.

    Returns:
        ``hidden``: ``permutation`` or ``none``.
        ``residual``: ``rotation``, ``rotation that keeps ones`` (``Q 1 = 1``), ``permutation`` or ``none``.
        ``head``: ``untie`` where a rotation needs that, else ``keep``.
        ``values``: ``basis`` or ``none``.
        ``queries``: ``basis``, ``pairs`` or ``none``.
        ``because``: why the stream is no freer, a sentence, or nothing.
    """
    attentions = [heads_at(model, sites) for sites in groups_of(model, "attn.").values()]
    known = bool(attentions) and None not in attentions
    kinds = {heads.freedom for heads in attentions if heads is not None}
    free = {"hidden": "permutation" if groups_of(model, "mlp.") else "none", "residual": "none", "head": "keep"}
    free |= {"values": "basis" if known else "none", "queries": kinds.pop() if known and len(kinds) == 1 else "none"}
    try:
        stream = Stream(model)
        free["residual"] = "permutation"
        feeds = stream.feeds()
        _check_feeds(model, feeds)
    except ValueError as reason:
        return free | {"because": str(reason)}
    free["residual"] = "rotation that keeps ones" if any(feed.mean for feed in feeds) else "rotation"
    return free | {"head": "untie" if _tied_feed(model, feeds) else "keep", "because": ""}


# the residual stream ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def permute_residual(model: PreTrainedModel, order: Tensor | Sequence[int]) -> PreTrainedModel:
    """One permutation of the residual stream, ``x_new[k] = x[order[k]]``: embeddings, norms, all that reads or writes it.

    What a model without an output head makes of it, its hidden states and pooled states, comes in the new order.

    Raises:
        ValueError: ``order`` is no permutation of the stream, or the model has something else at the width of the stream
            (and is left as it was).
    """
    stream = Stream(model)
    index = checked_order(order, stream.width, "the residual stream")
    stream.move(lambda p, dim: p.index_select(dim, index.to(p.device)), KINDS)
    after, expected = trace(model)[1], stream.output
    if base_model(model) is model and after.shape[-1] == stream.width:
        expected = expected.index_select(-1, index.to(after.device))
    if float((after - expected).norm() / expected.norm()) > 3 * torch.finfo(after.dtype).eps ** 0.5:
        back = index.argsort()
        stream.move(lambda p, dim: p.index_select(dim, back.to(p.device)), KINDS)
        raise ValueError(
            f"something in this {model.config.model_type} uses the residual stream and has no role, so that it can't be "
            f"permuted; its matrices without a role are {_strangers(stream)}"
        )
    return model


def fuse_norms(model: PreTrainedModel, untie: bool = False) -> PreTrainedModel:
    """Move the gain ``g`` and shift ``b`` of every norm of a pre-norm model into the matrices that read it.

    ``W (g n(x) + b) = W' (n(x) + b')`` with ``W' = W diag(g)`` and ``b' = b / g``; where all readers have a bias, it
    takes ``W b`` up instead and ``b' = 0``. A norm whose gains are all the same is left alone.

    Args:
        untie: give a tied head a matrix of its own if its norm is one of them.

    Raises:
        ValueError: the model is no pre-norm model, its head is tied, or ``b / g`` is too large for a reader without bias.
    """
    _fuse(model, Stream(model).feeds(), untie)
    return model


def rotate_residual(model: PreTrainedModel, rotation: Tensor, untie: bool = False) -> PreTrainedModel:
    """A rotation ``Q`` of the residual stream: ``W Q`` for all that reads it, ``Q^T W`` and ``Q^T b`` for all that writes.

    The norms are fused first (:func:`fuse_norms`); their shifts become ``Q^T b'``. Best done in float32 or better.

    Args:
        rotation: ``Q (width, width)``, orthogonal; for LayerNorm models with ``Q 1 = 1``.
        untie: give a tied head a matrix of its own.

    Raises:
        ValueError: ``Q`` is no such matrix, or the model can't be rotated; the sentence says why.
    """
    stream = Stream(model)
    feeds = stream.feeds()
    turn = _rotation(rotation, stream.width, any(feed.mean for feed in feeds))
    _fuse(model, feeds, untie)

    def turned(p: Tensor, dim: int) -> Tensor:
        return torch.tensordot(p.double(), turn.to(p.device), ([dim], [0])).movedim(-1, dim)

    stream.move(turned, ("reads", "writes", "shift"))
    return model


def center_residual(model: PreTrainedModel, untie: bool = False) -> PreTrainedModel:
    """Take the mean away from all that is written to the stream: ``(1 - 11^T / n) W``. LayerNorm does so in any case.

    After it and a rotation from ``pca_rotation(..., layer_norm=True)`` the last coordinates of the stream are nearly zero.

    Raises:
        ValueError: the model's norms keep the mean, it is no pre-norm model, or its head is tied.
    """
    stream = Stream(model)
    feeds = stream.feeds()
    if not all(feed.mean for feed in feeds):
        raise ValueError(
            "the norms of this model keep the mean (RMSNorm): there is no mean to take away, only rotations"
        )
    if path := _tied_feed(model, feeds, fusing=False):
        _untie(model, path, untie)
    stream.move(lambda p, dim: p - p.double().mean(dim, keepdim=True).to(p), ("writes",))
    return model


@torch.no_grad()
def _fuse(model: PreTrainedModel, feeds: list[Feed], own_head: bool) -> None:
    feeds = [feed for feed in feeds if _uneven(feed)]
    _check_feeds(model, feeds)
    if path := _tied_feed(model, feeds):
        _untie(model, path, own_head)
    for feed in feeds:
        gain, shift, moved = feed.gain, feed.shift, not _bare(model, feed)
        assert gain is not None
        for path in feed.readers:
            reader = model.get_submodule(path)
            matrix, bias = weight_of(reader).double(), None
            if shift is not None and moved:
                bias = reader.bias.double() + matrix @ shift
            set_matrix(reader, matrix * gain, bias)
        feed.module.weight.fill_(feed.unit)
        if shift is not None:
            left = torch.zeros_like(shift) if moved else torch.where(shift == 0, 0.0, shift / gain)
            feed.module.bias.copy_(left)


def _uneven(feed: Feed) -> bool:
    """Whether the norm has gains that differ, so that they do not commute with a rotation."""
    return feed.gain is not None and bool((feed.gain != feed.gain[0]).any())


def _bare(model: PreTrainedModel, feed: Feed) -> list[str]:
    """The readers of a norm without a bias."""
    return [path for path in feed.readers if model.get_submodule(path).bias is None]


def _check_feeds(model: PreTrainedModel, feeds: list[Feed]) -> None:
    """Raise ValueError for gains and shifts that can't be moved."""
    for feed in filter(_uneven, feeds):
        gain, shift, bare = feed.gain, feed.shift, _bare(model, feed)
        assert gain is not None
        if not feed.readers:
            raise ValueError(
                f"no matrix of this model reads {feed.path}, so that its gains have nowhere to go; give it with its head"
            )
        wrong = 0 if shift is None else int((shift.abs() > LARGEST_SHIFT * gain.abs()).sum())
        if wrong and bare:
            raise ValueError(
                f"{wrong} gains of {feed.path} are zero or nearly so where it shifts, and {bare[0]} has no bias to take this "
                "up; give it one, or leave the stream as it is"
            )


def _tied_feed(model: PreTrainedModel, feeds: list[Feed], fusing: bool = True) -> str | None:
    """The norm whose gains stand before a tied head, if there is one."""
    if not is_tied(model):
        return None
    head = head_path(model)
    return next((feed.path for feed in feeds if head in feed.readers and (_uneven(feed) or not fusing)), None)


def _untie(model: PreTrainedModel, norm: str, own_head: bool) -> None:
    if not own_head:
        raise ValueError(
            f"the head of this model is tied to its embedding, but only the head reads what {norm} makes; untie=True gives it "
            f"a matrix of its own, {model.get_output_embeddings().weight.numel():,} parameters more"
        )
    untie(model, Plan({}, untie=True))


def _rotation(rotation: Tensor, width: int, keeps_ones: bool) -> Tensor:
    """``Q`` in float64, checked."""
    if tuple(rotation.shape) != (width, width):
        raise ValueError(
            f"the rotation has shape {tuple(rotation.shape)}, but the residual stream needs {(width, width)}"
        )
    turn = rotation.detach().double()
    identity = torch.eye(width, dtype=turn.dtype, device=turn.device)
    if not float(off := (turn.T @ turn - identity).abs().max()) < 1e-5:
        raise ValueError(
            f"the rotation is not orthogonal: Q^T Q differs from the identity by {off:.2g}; torch.linalg.qr makes it so"
        )
    if keeps_ones and float(off := (turn.sum(1) - 1).abs().max()) > 1e-5:
        raise ValueError(
            "the norms of this model take the mean away (LayerNorm), so that only rotations with Q 1 = 1 are free, but here "
            f"Q 1 differs from 1 by {off:.2g}; pca_rotation and best_rotation make one with layer_norm=True"
        )
    return turn


def _strangers(stream: Stream) -> str:
    paths = dict.fromkeys(axis.path for axis in stream.axes if axis.kind in ("reads", "writes"))
    return ", ".join(path for path in paths if path not in stream.roles) or "none"
