"""Folding: one site in a structure, or several that share a factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tenfold.compress.allocate import Curve
from tenfold.compress.block import Block, Target
from tenfold.models.plan import Entry, plain
from tenfold.models.recipe import Rule
from tenfold.models.sites import Site
from tenfold.models.starts import factors_from
from tenfold.structure import Factors, LowRank, Structure


@dataclass
class Fold:
    """One site in a structure, at any size that the rule leaves open."""

    site: Site
    rule: Rule

    @property
    def sites(self) -> list[Site]:
        return [self.site]

    def curves(self, block: Block) -> list[Curve]:
        target, (out, inner) = block.target(self.site.path), self.site.shape
        spec = self.rule.structure
        assert spec is not None
        family = Structure.family(spec["kind"])
        if not family.is_open(spec):
            fixed = Structure.for_shape(out, inner, spec)
            return [Curve(self.site.path, np.array([fixed.numel]), np.array([0.0]), [fixed], settled=out * inner)]
        sizes = family.sizes(target.weight, spec, target.inputs, target.outputs)
        costs = [structure.numel for structure, _ in sizes] + [out * inner]
        losses = [loss / 2 for _, loss in sizes] + [0.0]
        options = [structure for structure, _ in sizes] + [None]
        within = lambda cost: Structure.within(out, inner, spec, cost)  # noqa: E731
        curve = Curve(self.site.path, np.array(costs), np.array(losses), options, within)
        if self.rule.keep is None:
            return [curve]
        k = curve.fitting(self.rule.keep * out * inner)
        alone = slice(k, k + 1)
        return [Curve(curve.name, curve.costs[alone], curve.losses[alone], curve.options[alone], settled=out * inner)]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        path, structure = self.site.path, chosen[self.site.path]
        target = block.target(path)
        if structure is None:
            return block.put(path, target.weight, block.new_bias(path, target.weight))
        factors = self._factors(block, structure, target)
        bias = block.new_bias(path, structure.dense(factors)) if self.rule.bias == "keep" else None
        return block.fold(path, structure, factors, bias)

    def _factors(self, block: Block, structure: Structure, target: Target) -> Factors:
        """Fitted in the metrics; where there are none, from the start that the rule names."""
        start, settings = self.rule.start, block.settings
        if settings.inputs == "none" and settings.outputs == "none":
            return factors_from(structure, target.weight, start.fit, start.norm, start.options)
        outputs = None if settings.outputs == "none" else target.outputs
        return structure.fit(target.weight, target.inputs, outputs, **start.options)


@dataclass
class FoldTogether:
    """Several sites that read the same in low rank with one right factor: the joint rank-k approximation.

    ``minimise sum_s ||G_s^(1/2) (W_s - left_s right) L||^2`` is the truncated SVD of the matrices one below the other.
    """

    sites: list[Site]
    rule: Rule

    def __post_init__(self):
        share, spec = self.rule.share, self.rule.structure
        if share is None or share.factors != ["right"] or spec is None or spec["kind"] != "low_rank":
            raise ValueError(
                f"{self.rule.structure} can't share {share and share.factors} across roles when it is fitted to activations; "
                "take kind low_rank and share its factor right"
            )
        self.name = self.sites[0].path + "".join(f"+{site.path.rpartition('.')[2]}" for site in self.sites[1:])
        self.heights = [site.shape[0] for site in self.sites]

    def curves(self, block: Block) -> list[Curve]:
        target, inner = self._stacked(block), self.sites[0].shape[1]
        most = min(*self.heights, inner)
        sizes = LowRank.sizes(target.weight, {"kind": "low_rank"}, target.inputs, target.outputs)[:most]
        costs = [structure.numel for structure, _ in sizes] + [sum(self.heights) * inner]
        losses = [loss / 2 for _, loss in sizes] + [0.0]
        return [Curve(self.name, np.array(costs), np.array(losses), [*range(1, len(sizes) + 1), None])]

    def _stacked(self, block: Block) -> Target:
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
            entry = Entry(site, structure, site.bias, shared={"right": f"{plain(self.name)}_right"})
            changes.append((entry, made, block.new_bias(site.path, structure.dense(made))))
        block.fold_together(changes)
