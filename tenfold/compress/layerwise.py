"""The compressor that reads activations: block by block, every site fitted to what the original model would say there.

1. One backward pass over the calibration text finds how much every output matters (:mod:`tenfold.compress.sensitivity`).
2. One pass of the original model, block by block, finds what every item would lose at every size.
3. The budget is shared out so that the losses add up to the least (:mod:`tenfold.compress.allocate`).
4. Block by block, on the outputs of the blocks compressed so far, the sites are fitted and put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.compress.actions import Action, Fold, actions_for
from tenfold.compress.allocate import Curve, allocate, uniform
from tenfold.compress.block import Block
from tenfold.compress.calibration import Calibration
from tenfold.compress.sensitivity import sensitivities
from tenfold.compress.streams import Streams, blocks_of, twin
from tenfold.models.recipe import Calibrate, Recipe
from tenfold.models.replace import finish
from tenfold.models.sites import Site, dtype_of, find_sites

Progress = Callable[[Iterable], Iterable]


@dataclass
class Work:
    """What is to be done in one block."""

    path: str
    sites: list[Site]
    actions: list[Action]


def compress_blocks(
    model: PreTrainedModel,
    recipe: Recipe,
    text: Calibration,
    progress: Progress = iter,
    announce: Callable[[list[dict]], None] = lambda choices: None,
) -> dict[str, Any]:
    """Compress the blocks of ``model`` in place as ``recipe`` says, guided by the calibration ``text``.

    Args:
        announce: is told the choices before the work starts.

    Returns:
        ``choices``: per item what was chosen, its parameters and the loss that was foreseen, in nats a token.

    Raises:
        ValueError: the blocks are no chain, a rule matches nothing, or the budget can't be met.
    """
    with _in_float32(model):
        return _compress_blocks(model, recipe, text, progress, announce)


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Half precision is too coarse for statistics, and slow on a CPU; afterwards every tensor has its own type again."""
    types, usual = {name: p.dtype for name, p in model.named_parameters()}, dtype_of(model)
    model.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(types.get(name, usual))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(usual)


def _compress_blocks(
    model: PreTrainedModel, recipe: Recipe, text: Calibration, progress: Progress, announce
) -> dict[str, Any]:
    settings = recipe.calibrate or Calibrate()
    works = plan_work(model, recipe)
    streams = Streams(model, [work.path for work in works], text.batches)
    streams.check_chain()
    matters: dict[str, Tensor] = {}
    if settings.outputs != "none":
        sites = [site for work in works for action in work.actions for site in action.sites]
        matters = sensitivities(model, sites, text.batches, settings.seed, progress)
    was = model.training
    model.eval()
    with torch.no_grad():
        curves = survey(model, works, streams, settings, matters, progress)
        chosen = choose(model, recipe, settings, works, curves)
        choices = [_choice(curve, chosen[curve.name]) for curve in curves]
        announce(choices)
        streams.rewind()
        for number, work in enumerate(progress(works)):
            original = twin(model.get_submodule(work.path))
            block = Block(model, work.path, work.sites, streams, number, settings, matters, original)
            for action in work.actions:
                action.apply(block, chosen)
            streams.advance(number, original)
    finish(model.train(was), recipe.name)
    return {"choices": choices}


def plan_work(model: PreTrainedModel, recipe: Recipe) -> list[Work]:
    """The actions of every block; of several rules the first that matches a site wins.

    Raises:
        ValueError: a rule matches nothing in the blocks.
    """
    blocks, used, works = blocks_of(find_sites(model)), set(), []
    for path, sites in blocks.items():
        matched: dict[int, list[Site]] = {}
        for site in sites:
            number = next((k for k, rule in enumerate(recipe.replace) if rule.matches(site)), None)
            if number is not None:
                matched.setdefault(number, []).append(site)
        used |= matched.keys()
        works.append(
            Work(path, sites, [a for k, found in matched.items() for a in actions_for(model, recipe.replace[k], found)])
        )
    for k, rule in enumerate(recipe.replace):
        if k not in used:
            raise ValueError(
                f"no matrix in the blocks of this {model.config.model_type} matches role {rule.role or rule.narrow}"
            )
    return works


def survey(model, works: list[Work], streams: Streams, settings, matters, progress: Progress) -> list[Curve]:
    """What every item could become, judged by the original model."""
    curves = []
    still = settings.model_copy(update={"refit": False})
    for number, work in enumerate(progress(works)):
        block = Block(model, work.path, work.sites, streams, number, still, matters, None)
        curves += [curve for action in work.actions for curve in action.curves(block)]
        streams.advance(number)
    return curves


def choose(model, recipe: Recipe, settings: Calibrate, works: list[Work], curves: list[Curve]) -> dict[str, Any]:
    """An option for every item, within the budget of the recipe."""
    whole = sum(curve.whole for curve in curves)
    if recipe.budget is None:
        return {curve.name: curve.options[0] for curve in curves if len(curve.options) == 1} | _kept(works, curves)
    if recipe.budget.of == "sites":
        allowed = recipe.budget.keep * whole
    else:
        total = sum(p.numel() for p in model.parameters())
        allowed = whole - (1 - recipe.budget.keep) * total
    if allowed < sum(int(curve.costs[0]) for curve in curves):
        least = total - whole + sum(int(c.costs[0]) for c in curves) if recipe.budget.of == "model" else 0
        raise ValueError(
            f"keep {recipe.budget.keep} of the {recipe.budget.of} can't be met: the smallest that these rules reach is "
            f"{least:,} parameters"
        )
    return uniform(curves, allowed / whole) if settings.allocate == "uniform" else allocate(curves, allowed)


def _kept(works: list[Work], curves: list[Curve]) -> dict[str, Any]:
    """Without a budget: what the rules themselves keep."""
    keeps = {a.site.path: a.rule.keep for work in works for a in work.actions if isinstance(a, Fold) and a.rule.keep}
    found = {}
    for curve in curves:
        if len(curve.options) > 1:
            if curve.name not in keeps:
                raise ValueError(f"nothing says how much of {curve.name} to keep; give the recipe a budget, or --keep")
            found |= uniform([curve], keeps[curve.name])
    return found


def _choice(curve: Curve, option: Any) -> dict[str, Any]:
    number = next(k for k, other in enumerate(curve.options) if other is option or other == option)
    shown = option.to_json() if hasattr(option, "to_json") else option
    return {
        "item": curve.name,
        "chosen": shown,
        "parameters": int(curve.costs[number]),
        "of": curve.whole,
        "loss": float(curve.losses[number]),
    }
