"""SliceGPT: rotate the residual stream so that few coordinates carry most of it, and remove the others.

One rotation serves all blocks: the paper rotates every block by itself and puts matrices on the residual connections, which
an ordinary checkpoint can't hold. Matrices at the stream lose columns or rows (``Scattered`` at the first ones); the norms keep
their width and see zeros, so that an RMSNorm divides by the same value as before.

LayerNorm models keep their norms, which subtract the mean: the paper turns them into RMSNorms. So the rotation fixes the vector
of ones, what is written to the stream is centred, and one more coordinate is needed; see ``pca_rotation``. A tied head gets a
matrix of its own where the gains of the last norm are absorbed by it.

Reference: SliceGPT, arXiv 2401.15024.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.compression.calibration import Calibration
from tenfold.models.invariances.residual_rotation import (
    center_residual,
    fuse_norms,
    pca_rotation,
    rotate_residual,
)
from tenfold.models.invariances.stream import READS, WRITES, prenorms
from tenfold.models.plan import SitePlan
from tenfold.models.recipe import Recipe
from tenfold.models.sites import Site, base_model, count_parameters, find_sites, shape_of, weight_of
from tenfold.models.surgery import finish, install
from tenfold.structure import Dense, Scattered


def slice_stream(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Slice the residual stream of ``model``, in place, so that the budget is met.

    Returns:
        ``width`` of the stream, and ``left``: how many coordinates stay.

    Raises:
        ValueError: the stream can't be rotated, there is no budget, or it leaves no coordinate.
    """
    if recipe.budget is None:
        raise ValueError(f"nothing says how much recipe {recipe.name} shall slice; give it a budget, or --keep")
    of, width = recipe.budget.of.replace("sites", "blocks"), shape_of(model.get_input_embeddings())[1]
    centred, before = prenorms(model)[0].mean, count_parameters(model, of)
    fuse_norms(model)
    if centred:
        center_residual(model)
    rotate_residual(model, pca_rotation(stream_moment(model, text), centred))
    left = sliced_width(model, of, recipe.budget.keep * before)
    slice_coordinates(model, left)
    finish(model, recipe.name)
    return {"width": width, "left": left}


@torch.no_grad()
def stream_moment(model: PreTrainedModel, text: Calibration) -> Tensor:
    """Return the mean of ``n(x) n(x)^T (width, width)``, ``n(x)`` the output of a norm of the stream before its gains."""
    feeds, training, tokens = prenorms(model), model.training, 0
    total = torch.zeros([shape_of(model.get_input_embeddings())[1]] * 2, dtype=torch.float64, device=model.device)
    mask = torch.empty(0)

    def add(module, arguments, centred: bool) -> None:
        x = arguments[0].flatten(0, -2)[mask].double()
        x = x - x.mean(-1, keepdim=True) if centred else x
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        total.add_(x.T @ x)

    model.eval()
    with ExitStack() as hooks:
        hooks.callback(model.train, training)
        for feed in feeds:
            hooks.callback(feed.module.register_forward_pre_hook(partial(add, centred=feed.mean)).remove)
        for batch in text.batches:
            mask = batch["attention_mask"].flatten().bool().to(model.device)
            tokens += int(mask.sum())
            base_model(model)(**{name: value.to(model.device) for name, value in batch.items()})
    return (total / max(1, tokens * len(feeds))).cpu()


def sliced_width(model: PreTrainedModel, of: str, budget: float) -> int:
    """Return the largest width of the stream with which the part ``of`` the model has at most ``budget`` parameters."""
    outside = {"model": (), "without_head": ("head",), "blocks": ("embed", "head")}[of]
    width, sites = shape_of(model.get_input_embeddings())[1], _sites_at_stream(model)
    sliced = sum(site.shape[0] * site.shape[1] for site in sites if site.role not in outside)
    fixed = count_parameters(model, of) - sliced
    left = int((budget - fixed) * width / sliced + 1e-9)
    if left < 1:
        raise ValueError(
            f"{int(budget):,} parameters leave no coordinate of a stream of {width}; keep {fixed + sliced // width:,} of them"
        )
    return min(left, width)


@torch.no_grad()
def slice_coordinates(model: PreTrainedModel, left: int) -> None:
    """Keep the first ``left`` coordinates of the stream."""
    width, sites = shape_of(model.get_input_embeddings())[1], _sites_at_stream(model)
    if left == width:
        return
    feeds, paths = prenorms(model), {site.path for site in sites}
    shifts = {path: feed.shift[left:] for feed in feeds if feed.shift is not None for path in feed.readers}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path not in paths and module.weight.shape[1] == width:
            module.weight[:, left:] = 0.0  # of positions
    for site in sites:
        module, (out, inner), writes = model.get_submodule(site.path), site.shape, site.role in WRITES
        weight, small = weight_of(module).detach(), (left, inner) if writes else (out, left)
        base = Dense(out_features=small[0], in_features=small[1])
        structure = Scattered(base=base, out_features=out, in_features=inner, map_rows=False, map_columns=False)
        bias = getattr(module, "bias", None)
        if bias is not None and writes:
            bias = torch.cat([bias[:left], torch.zeros_like(bias[left:])])
        elif (shift := shifts.get(site.path)) is not None and bool((shift != 0).any()):
            fixed = weight[:, left:] @ shift.to(weight)  # which a norm adds at the coordinates that go
            bias = fixed if bias is None else bias + fixed
        matrix = weight[: small[0], : small[1]]
        install(model, SitePlan(site, structure, bias is not None), {"matrix": matrix}, bias)


def _sites_at_stream(model: PreTrainedModel) -> list[Site]:
    return [site for site in find_sites(model) if site.role in (*READS, *WRITES, "embed")]
