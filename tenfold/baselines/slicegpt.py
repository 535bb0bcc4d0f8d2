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
from tenfold.models.sites import base_model, count_parameters, find_sites, weight_of
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
    centred, before = prenorms(model)[0].mean, count_parameters(model, recipe.budget.of.replace("sites", "blocks"))
    fuse_norms(model)
    if centred:
        center_residual(model)
    rotate_residual(model, pca_rotation(stream_moment(model, text), centred))
    width = model.get_input_embeddings().weight.shape[1]
    left = slice_coordinates(model, sliced_width(model, recipe.budget.of, recipe.budget.keep * before))
    finish(model, recipe.name)
    return {"width": width, "left": left}


@torch.no_grad()
def stream_moment(model: PreTrainedModel, text: Calibration) -> Tensor:
    """Return the mean of ``n(x) n(x)^T (width, width)``, ``n(x)`` the output of a norm of the stream before its gains."""
    feeds, total, masks = prenorms(model), 0, {}

    def hook(feed):
        def add(module, arguments) -> None:
            nonlocal total
            x = arguments[0].flatten(0, -2)[masks["batch"]].double()
            x = x - x.mean(-1, keepdim=True) if feed.mean else x
            x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            total = total + x.T @ x

        return add

    hooks, tokens = [feed.module.register_forward_pre_hook(hook(feed)) for feed in feeds], 0
    training = model.training
    model.eval()
    try:
        for batch in text.batches:
            masks["batch"] = batch["attention_mask"].flatten().bool().to(model.device)
            tokens += int(masks["batch"].sum())
            base_model(model)(**{name: value.to(model.device) for name, value in batch.items()})
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    assert isinstance(total, Tensor)
    return (total / max(1, tokens * len(feeds))).cpu()


def sliced_width(model: PreTrainedModel, of: str, budget: float) -> int:
    """Return the largest width of the stream with which the model, or its blocks, have at most ``budget`` parameters."""
    of = of.replace("sites", "blocks")
    outside = {"model": (), "without_head": ("head",), "blocks": ("embed", "head")}[of]
    sites = [site for site in find_sites(model) if site.role in (*READS, *WRITES, "embed")]
    width = model.get_input_embeddings().weight.shape[1]
    sliced = sum(site.shape[0] * site.shape[1] for site in sites if site.role not in outside)
    fixed = count_parameters(model, of) - sliced
    left = int((budget - fixed) * width / sliced + 1e-9)
    if left < 1:
        raise ValueError(
            f"{int(budget):,} parameters leave no coordinate of a stream of {width}; keep {fixed + sliced // width:,} of them"
        )
    return min(left, width)


@torch.no_grad()
def slice_coordinates(model: PreTrainedModel, left: int) -> int:
    """Keep the first ``left`` coordinates of the stream, and return their number."""
    width = model.get_input_embeddings().weight.shape[1]
    if left == width:
        return left
    sites = [site for site in find_sites(model) if site.role in (*READS, *WRITES, "embed")]
    paths = {site.path for site in sites}
    feeds = prenorms(model)
    shifts = {path: feed.shift[left:] for feed in feeds if feed.shift is not None for path in feed.readers}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path not in paths and module.weight.shape[1] == width:
            module.weight[:, left:] = 0.0  # of positions
    for site in sites:
        module, (out, inner) = model.get_submodule(site.path), site.shape
        weight = weight_of(module).detach()
        writes = site.role in WRITES
        small = (left, inner) if writes else (out, left)
        structure = Scattered(
            base=Dense(out_features=small[0], in_features=small[1]),
            out_features=out,
            in_features=inner,
            map_rows=False,
            map_columns=False,
        )
        bias = getattr(module, "bias", None)
        if bias is not None and writes:
            bias = torch.cat([bias[:left], torch.zeros_like(bias[left:])])
        elif (shift := shifts.get(site.path)) is not None and bool((shift != 0).any()):
            fixed = weight[:, left:] @ shift.to(weight)  # which a norm adds at the coordinates that go
            bias = fixed if bias is None else bias + fixed
        matrix = weight[: small[0], : small[1]]
        install(model, SitePlan(site, structure, bias is not None), {"matrix": matrix}, bias)
    return left
