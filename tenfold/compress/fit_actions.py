"""Folding: one site in a structure, or several that share a factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from tenfold.compress.allocate import TradeoffCurve
from tenfold.compress.block import Block, Target
from tenfold.models.distributed import gather_results, num_processes, shard_items
from tenfold.models.initializers import QUICK, check_fit_options, initialize
from tenfold.models.plan import SitePlan, build_structure, parameter_name
from tenfold.models.recipe import Rule
from tenfold.models.sites import Site
from tenfold.structure import Factors, LowRank, Structure


@dataclass
class Fold:
    """One site in a structure, at any size that the rule leaves open."""

    site: Site
    rule: Rule

    @property
    def sites(self) -> list[Site]:
        return [self.site]

    def curves(self, block: Block) -> list[TradeoffCurve]:
        (out, inner), specs = self.site.shape, self.rule.structures
        if len(specs) == 1 and not _open(specs[0]):
            fixed = build_structure(self.site, specs[0])
            size = {"settled": out * inner, "calls": self.site.calls, "indices": np.array([fixed.index_numel])}
            return [TradeoffCurve(self.site.path, np.array([fixed.numel]), np.array([0.0]), [fixed], **size)]
        blind = block.settings.allocate in ("uniform", "influence")
        asked = len(specs) > 1 or (self.rule.keep is None and not blind)
        curve = self._curve(block.target(self.site.path), specs, asked)
        if self.rule.keep is None:
            return [curve]
        k = curve.fitting(self.rule.keep * out * inner)
        some = {name: getattr(curve, name)[k : k + 1] for name in ("costs", "losses", "options", "products", "indices")}
        return [TradeoffCurve(curve.name, **some, settled=out * inner, calls=self.site.calls)]

    def _curve(self, target: Target, specs: list[dict[str, Any]], asked: bool) -> TradeoffCurve:
        """Of all sizes of all structures, and the matrix as it is; unless losses are ``asked`` for, some may be NaN."""
        (out, inner), priced = self.site.shape, []
        for spec in specs:
            family = Structure.family(spec["kind"])
            if family.is_open(spec):
                try:
                    priced += family.sizes(target.weight, spec, target.inputs, target.outputs, asked)
                except ValueError as reason:
                    raise ValueError(f"{self.site.path} ({out}x{inner}): {reason}") from None
            else:
                fixed = build_structure(self.site, spec)
                priced.append((fixed, 2 * target.loss(fixed.dense(self._fitted(fixed, target, sweeps=3)))))
        priced.sort(key=lambda pair: pair[0].numel)
        options = [structure for structure, _ in priced]
        costs, losses = [s.numel for s in options] + [out * inner], [loss / 2 for _, loss in priced] + [0.0]
        maps = np.array([s.index_numel for s in options] + [0])
        alone = specs[0] if len(specs) == 1 else None
        rest = {"within": alone and (out, inner, alone), "indices": maps, "calls": self.site.calls}
        return TradeoffCurve(self.site.path, np.array(costs), np.array(losses), [*options, None], **rest)

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        path, structure = self.site.path, chosen[self.site.path]
        if structure is None:
            weight = block.target(path).weight
            return block.put(path, weight, block.new_bias(path, weight))
        factors = block.fitted.pop(path, None) or self.factors(block, structure)
        bias = block.new_bias(path, structure.dense(factors)) if self.rule.bias == "keep" else None
        return block.fold(path, structure, factors, bias)

    def factors(self, block: Block, structure: Structure) -> Factors:
        """Fitted in the metrics; where there are none, from the start that the rule names."""
        start, settings, target = self.rule.start, block.settings, block.target(self.site.path)
        if settings.inputs == "none" and settings.outputs == "none":
            return initialize(structure, target.weight, start.fit, start.norm, start.options)
        log = block.fits[self.site.path] = {}
        return self._fitted(structure, target, settings.outputs != "none", log=log)

    def _fitted(self, structure: Structure, target: Target, outputs: bool = True, **more: Any) -> Factors:
        metric = target.outputs if outputs else None
        return structure.fit(target.weight, target.inputs, metric, **check_fit_options(self.rule.start.options) | more)


@dataclass
class FoldTogether:
    """Several sites that read the same in low rank with one right factor: the joint rank-k approximation.

    ``minimise sum_s ||G_s^(1/2) (W_s - left_s right) L||^2`` is the truncated SVD of the matrices one below the other.
    """

    sites: list[Site]
    rule: Rule

    def __post_init__(self):
        share = self.rule.share
        if share is None or share.factors != ["right"] or self.rule.spec["kind"] != "low_rank":
            raise ValueError(
                f"{self.rule.structure} can't share {share and share.factors} across roles when it is fitted to activations; "
                "take kind low_rank and share its factor right"
            )
        self.name = self.sites[0].path + "".join(f"+{site.path.rpartition('.')[2]}" for site in self.sites[1:])
        self.heights = [site.shape[0] for site in self.sites]

    def curves(self, block: Block) -> list[TradeoffCurve]:
        target, inner = self._stacked(block), self.sites[0].shape[1]
        most = min(*self.heights, inner)
        sizes = LowRank.sizes(target.weight, {"kind": "low_rank"}, target.inputs, target.outputs)[:most]
        costs = [structure.numel for structure, _ in sizes] + [sum(self.heights) * inner]
        losses = [loss / 2 for _, loss in sizes] + [0.0]
        each = sum(self.heights) + len(self.sites) * inner  # every site multiplies by the shared factor itself
        products = np.array([each * rank for rank in range(1, len(sizes) + 1)] + [sum(self.heights) * inner])
        options, calls = [*range(1, len(sizes) + 1), None], self.sites[0].calls
        return [TradeoffCurve(self.name, np.array(costs), np.array(losses), options, products=products, calls=calls)]

    def _stacked(self, block: Block) -> Target:
        if len({block.stage(site.path) for site in self.sites}) > 1:
            paths = ", ".join(site.path for site in self.sites)
            raise ValueError(
                f"{paths} do not read the same, so that they can't share a factor; share among those that do"
            )
        targets = [block.target(site.path) for site in self.sites]
        outputs = torch.block_diag(*(target.outputs for target in targets))
        return Target(torch.cat([target.weight for target in targets]), targets[0].inputs, outputs)

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        target, rank = self._stacked(block), chosen[self.name]
        parts = target.weight.split(self.heights)
        if rank is None:
            for site, part in zip(self.sites, parts, strict=True):
                block.put(site.path, part, block.new_bias(site.path, part))
            return
        whole = LowRank(out_features=len(target.weight), in_features=target.weight.shape[1], rank=rank)
        factors = whole.fit(target.weight, target.inputs, target.outputs)
        lefts, changes = factors["left"].split(self.heights), []
        for site, left in zip(self.sites, lefts, strict=True):
            structure = LowRank(out_features=site.shape[0], in_features=site.shape[1], rank=rank)
            made: Factors = {"left": left, "right": factors["right"]}
            entry = SitePlan(site, structure, site.bias, shared={"right": f"{parameter_name(self.name)}_right"})
            changes.append((entry, made, block.new_bias(site.path, structure.dense(made))))
        block.fold_together(changes)


@dataclass
class FoldExperts:
    """One role of all experts of a block, which share factors: ``minimise sum_e ||G_e^(1/2) (W_e - What_e) C_e^(1/2)||^2``.

    The size is what the rule says; shared factors count for the first expert.
    """

    sites: list[Site]
    rule: Rule

    def __post_init__(self):
        spec, (site, *others), share = self.rule.spec, self.sites, self.rule.share
        if different := [other for other in others if other.shape != site.shape]:
            raise ValueError(
                f"{different[0].path} is {different[0].shape[0]}x{different[0].shape[1]} and {site.path} {site.shape[0]}x"
                f"{site.shape[1]}: experts of different widths can't share a factor"
            )
        if _open(spec) and self.rule.keep is None:
            raise ValueError(
                f"how much experts that share factors keep is not seen from activations: give the rule for role {self.rule.role} "
                "a keep or a size of its own"
            )
        size = site.shape[0] * site.shape[1]
        self.structure = (
            Structure.within(*site.shape, spec, self.rule.keep * size) if _open(spec) else build_structure(site, spec)
        )
        self.names = share.factors if share else []
        shapes = self.structure.factor_shapes()
        if unknown := [name for name in self.names if name not in shapes]:
            raise ValueError(f"{site.path}: there is no factor {unknown[0]!r} to share; it has {', '.join(shapes)}")
        self.common = sum(math.prod(shapes[name]) for name in self.names)

    def curves(self, block: Block) -> list[TradeoffCurve]:
        out, inner = self.sites[0].shape
        return [
            TradeoffCurve(
                site.path,
                np.array([self.structure.numel - (self.common if number else 0)]),
                np.array([0.0]),
                [self.structure],
                settled=out * inner,
                calls=site.calls,
                indices=np.array([self.structure.index_numel]),
            )
            for number, site in enumerate(self.sites)
        ]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        targets = [block.target(site.path) for site in self.sites]
        rows = None if block.settings.outputs == "none" else [target.outputs for target in targets]
        weights, metrics = [target.weight for target in targets], [target.inputs for target in targets]
        options = QUICK | check_fit_options(self.rule.start.options)
        joint, changes = self.structure.fit(weights, metrics, rows, tuple(self.names), **options), []
        for k, site in enumerate(self.sites):
            made = {name: value if name in self.names else value[k] for name, value in joint.items()}
            shared = {name: f"{parameter_name(self.sites[0].path)}_{name}" for name in self.names}
            bias = block.new_bias(site.path, self.structure.dense(made))
            changes.append((SitePlan(site, self.structure, site.bias, shared=shared), made, bias))
        block.fold_together(changes)


def independent(actions: Sequence[Any], block: Block) -> list[list[Any]]:
    """``actions`` in their order, folds side by side together where none of them changes what another one reads."""

    def place(action: Any) -> Any:
        if not isinstance(action, Fold):
            return id(action)
        return action.site.role if action.site.expert is not None else block.stage(action.site.path)

    return [list(some) for _, some in groupby(actions, key=place)]


def fit_apart(folds: Sequence[Any], block: Block, chosen: dict[str, Any]) -> None:
    """Each of several processes fits its share of independent ``folds``; ``block`` then has the factors of all."""
    if num_processes() == 1 or len(folds) == 1:
        return
    for fold in folds:
        block.moments(fold.site.path)  # all processes add these up together
    open_ones = [fold for fold in folds if chosen[fold.site.path] is not None]
    made = {}
    for k in shard_items(list(range(len(open_ones)))):
        path = open_ones[k].site.path
        made[k] = (path, open_ones[k].factors(block, chosen[path]), block.fits.get(path, {}))
    for path, factors, log in gather_results(made).values():
        block.fitted[path], block.fits[path] = factors, log


def _open(spec: dict[str, Any]) -> bool:
    """Whether a budget can set something in ``spec``."""
    return Structure.family(spec["kind"]).is_open(spec)
