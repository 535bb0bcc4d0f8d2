"""Actions that factorise: one site in a structure, or several sites that share factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Action, Block, Target
from tenfold.models.distributed import gather_results, num_processes, shard_items
from tenfold.models.initializers import QUICK, check_fit_options, initialize
from tenfold.models.plan import SitePlan, build_structure, parameter_name
from tenfold.models.recipe import Rule
from tenfold.models.sites import Site
from tenfold.structure import Factors, LowRank, Structure


@dataclass
class FactorizeSite(Action):
    """One site in a structure, at any size that the rule leaves open."""

    site: Site
    rule: Rule

    def __post_init__(self):
        self.sites, self.fisher_paths = [self.site], [self.site.path]

    def curves(self, block: Block) -> list[TradeoffCurve]:
        (out, inner), specs = self.site.shape, self.rule.structures
        if len(specs) == 1 and not _is_open(specs[0]):
            return [TradeoffCurve.settle(self.site, build_structure(self.site, specs[0]))]
        by_losses = block.settings.allocate not in ("uniform", "influence")
        need_losses, priced = len(specs) > 1 or (self.rule.keep is None and by_losses), []
        target = block.target(self.site.path)
        for spec in specs:
            if _is_open(spec):
                try:
                    family = Structure.family(spec["kind"])
                    priced += family.errors_by_size(target.weight, spec, target.inputs, target.outputs, need_losses)
                except ValueError as reason:
                    raise ValueError(f"{self.site.path} ({out}x{inner}): {reason}") from None
            else:
                fixed = build_structure(self.site, spec)
                priced.append((fixed, 2 * target.loss(fixed.dense(self._fit(fixed, target, sweeps=3)))))
        priced.sort(key=lambda pair: pair[0].numel)
        options = [structure for structure, _ in priced]
        curve = TradeoffCurve(
            self.site.path,
            np.array([option.numel for option in options] + [out * inner]),
            np.array([loss / 2 for _, loss in priced] + [0.0]),  # NaN unless needed
            [*options, None],
            within=(out, inner, specs[0]) if len(specs) == 1 else None,
            indices=np.array([option.index_numel for option in options] + [0]),
            calls=self.site.calls,
        )
        if self.rule.keep is None:
            return [curve]
        return [TradeoffCurve.settle(self.site, curve.options[curve.add_within(self.rule.keep * out * inner)])]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        path, structure = self.site.path, chosen[self.site.path]
        if structure is None:
            return block.set_dense(path, block.target(path).weight)
        factors = block.factors.pop(path, None) or self.fit(block, structure)
        bias = block.corrected_bias(path, structure.dense(factors)) if self.rule.bias == "keep" else None
        return block.install(path, structure, factors, bias)

    def fit(self, block: Block, structure: Structure) -> Factors:
        """Return the factors fitted in the metrics; where there are none, from the start that the rule names."""
        start, settings, target = self.rule.start, block.settings, block.target(self.site.path)
        if settings.input_metric == "none" and settings.output_metric == "none":
            return initialize(structure, target.weight, start)
        log = block.fits[self.site.path] = {}
        return self._fit(structure, target, settings.output_metric != "none", log=log)

    def _fit(self, structure: Structure, target: Target, outputs: bool = True, **more: Any) -> Factors:
        metric = target.outputs if outputs else None
        return structure.fit(target.weight, target.inputs, metric, **check_fit_options(self.rule.start.options) | more)


@dataclass
class FactorizeStack(Action):
    """Several sites that read the same input, in low rank with a common right factor: the joint rank-k approximation.

    ``minimise sum_s ||G_s^(1/2) (W_s - left_s right) L||^2`` is the truncated SVD of the stacked matrices.
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
        self.fisher_paths, self.heights = [site.path for site in self.sites], [site.shape[0] for site in self.sites]

    def curves(self, block: Block) -> list[TradeoffCurve]:
        target, inner, height = self._stacked_target(block), self.sites[0].shape[1], sum(self.heights)
        sizes = LowRank.errors_by_size(target.weight, {"kind": "low_rank"}, target.inputs, target.outputs)
        sizes = sizes[: min(*self.heights, inner)]
        costs = np.array([structure.numel for structure, _ in sizes] + [height * inner])
        losses = np.array([loss / 2 for _, loss in sizes] + [0.0])
        ranks = range(1, len(sizes) + 1)
        per_rank = height + len(self.sites) * inner  # every site multiplies by the shared factor itself
        products = np.array([per_rank * rank for rank in ranks] + [height * inner])
        calls = self.sites[0].calls
        return [TradeoffCurve(self.name, costs, losses, [*ranks, None], products=products, calls=calls)]

    def _stacked_target(self, block: Block) -> Target:
        if len({block.input_group(site.path) for site in self.sites}) > 1:
            paths = ", ".join(site.path for site in self.sites)
            raise ValueError(
                f"{paths} do not read the same, so that they can't share a factor; share among those that do"
            )
        targets = [block.target(site.path) for site in self.sites]
        outputs = torch.block_diag(*(target.outputs for target in targets))
        return Target(torch.cat([target.weight for target in targets]), targets[0].inputs, outputs)

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        target, rank = self._stacked_target(block), chosen[self.name]
        if rank is None:
            for site, part in zip(self.sites, target.weight.split(self.heights), strict=True):
                block.set_dense(site.path, part)
            return
        whole = LowRank(out_features=len(target.weight), in_features=target.weight.shape[1], rank=rank)
        factors = whole.fit(target.weight, target.inputs, target.outputs)
        changes = []
        for site, left in zip(self.sites, factors["left"].split(self.heights), strict=True):
            structure = LowRank(out_features=site.shape[0], in_features=site.shape[1], rank=rank)
            own: Factors = {"left": left, "right": factors["right"]}
            entry = SitePlan(site, structure, site.bias, shared={"right": f"{parameter_name(self.name)}_right"})
            changes.append((entry, own, block.corrected_bias(site.path, structure.dense(own))))
        block.install_shared(changes)


@dataclass
class FactorizeExperts(Action):
    """One role of all experts of a block, which share factors: ``minimise sum_e ||G_e^(1/2) (W_e - What_e) C_e^(1/2)||^2``.

    The rule decides the size; shared factors count for the first expert.
    """

    sites: list[Site]
    rule: Rule

    def __post_init__(self):
        spec, (site, *others), share = self.rule.spec, self.sites, self.rule.share
        self.fisher_paths = [site.path for site in self.sites]
        if different := [other for other in others if other.shape != site.shape]:
            raise ValueError(
                f"{different[0].path} is {different[0].shape[0]}x{different[0].shape[1]} and {site.path} {site.shape[0]}x"
                f"{site.shape[1]}: experts of different widths can't share a factor"
            )
        if _is_open(spec) and self.rule.keep is None:
            raise ValueError(
                f"how much experts that share factors keep is not seen from activations: give the rule for role {self.rule.role} "
                "a keep or a size of its own"
            )
        if _is_open(spec):
            self.structure = Structure.within(*site.shape, spec, (self.rule.keep or 0) * site.shape[0] * site.shape[1])
        else:
            self.structure = build_structure(site, spec)
        self.shared = share.factors if share else []
        shapes = self.structure.factor_shapes()
        if unknown := [name for name in self.shared if name not in shapes]:
            raise ValueError(f"{site.path}: there is no factor {unknown[0]!r} to share; it has {', '.join(shapes)}")
        self.shared_numel = sum(math.prod(shapes[name]) for name in self.shared)

    def curves(self, block: Block) -> list[TradeoffCurve]:
        shared = [0] + [self.shared_numel] * (len(self.sites) - 1)
        return [TradeoffCurve.settle(site, self.structure, some) for site, some in zip(self.sites, shared, strict=True)]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        targets = [block.target(site.path) for site in self.sites]
        rows = None if block.settings.output_metric == "none" else [target.outputs for target in targets]
        weights, metrics = [target.weight for target in targets], [target.inputs for target in targets]
        options = QUICK | check_fit_options(self.rule.start.options)
        joint, changes = self.structure.fit(weights, metrics, rows, tuple(self.shared), **options), []
        keys = {name: f"{parameter_name(self.sites[0].path)}_{name}" for name in self.shared}
        for k, site in enumerate(self.sites):
            own = {name: value if name in self.shared else value[k] for name, value in joint.items()}
            bias = block.corrected_bias(site.path, self.structure.dense(own))
            changes.append((SitePlan(site, self.structure, site.bias, shared=keys), own, bias))
        block.install_shared(changes)


def apply_actions(actions: Sequence[Action], block: Block, chosen: dict[str, Any]) -> None:
    """Apply ``actions`` in their order; several processes share the fits of neighbours that do not change each other's inputs."""

    def key(action: Action) -> Any:
        if not isinstance(action, FactorizeSite):
            return id(action)
        return action.site.role if action.site.expert is not None else block.input_group(action.site.path)

    for _, some in groupby(actions, key=key):
        independent = list(some)
        if num_processes() > 1 and len(independent) > 1:
            _fit_in_parallel(independent, block, chosen)
        for action in independent:
            action.apply(block, chosen)


def _fit_in_parallel(actions: Sequence[Any], block: Block, chosen: dict[str, Any]) -> None:
    """Fit independent actions, each process its part; ``block`` then has the factors of all."""
    for action in actions:
        block.moments(action.site.path)  # all processes add these up together
    fitted, open_ones = {}, [action for action in actions if chosen[action.site.path] is not None]
    for k in shard_items(list(range(len(open_ones)))):
        path = open_ones[k].site.path
        fitted[k] = (path, open_ones[k].fit(block, chosen[path]), block.fits.get(path, {}))
    for path, factors, log in gather_results(fitted).values():
        block.factors[path], block.fits[path] = factors, log


def _is_open(spec: dict[str, Any]) -> bool:
    """Return whether a budget can set the size of the structure ``spec``."""
    return Structure.family(spec["kind"]).is_open(spec)
