"""One block while it is compressed: moments of its inputs, targets of its sites, and the changes to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.compression.activations import Activations
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.divergence import Trial
from tenfold.compression.evidence import Evidence, fisher_losses
from tenfold.compression.moments import Moments, reduce_moments
from tenfold.models.config import Calibrate
from tenfold.models.experts import expert_of
from tenfold.models.plan import SitePlan
from tenfold.models.sites import Site, weight_of
from tenfold.models.surgery import install, install_together, set_matrix
from tenfold.nn import FactorizedLinear
from tenfold.structure import Dense, Factors, Structure
from tenfold.structure.linalg import solve_symmetric


@dataclass
class Target:
    """Target of one site: ``minimise ||outputs^(1/2) (weight - What) inputs^(1/2)||``.

    Args:
        weight: ``(out, in)``: the best dense matrix for the inputs that the site now gets.
        inputs: their damped metric ``(in, in)``.
        outputs: the metric of the outputs ``(out, out)``.
    """

    weight: Tensor
    inputs: Tensor
    outputs: Tensor

    def loss(self, near: Tensor) -> float:
        """Return the loss of the matrix ``near``, in nats a token where ``outputs`` is a Fisher information."""
        rest = self.weight - near
        return float((rest * (self.outputs @ rest @ self.inputs)).sum()) / 2


class Block:
    """Block of a model with its original and its compressed activations.

    Args:
        activations: in front of the block.
        number: of the block.
        sites: all matrices in it.
        fisher: ``{path: G}``; without an entry every output of a site counts alike.
        original: the block as it was; None while statistics of the original model are collected.
        moments: known already, ``{number of an input group: moments}``.
        evidence: ``{path: [(inputs, gradients at the outputs)]}``, one pair per batch.
    """

    def __init__(
        self,
        activations: Activations,
        number: int,
        sites: list[Site],
        settings: Calibrate,
        fisher: dict[str, Tensor],
        original: nn.Module | None = None,
        moments: dict[int, Moments] | None = None,
        evidence: Evidence | None = None,
    ):
        self.activations, self.number, self.model = activations, number, activations.model
        self.sites, self.settings, self.fisher = {site.path: site for site in sites}, settings, fisher
        self.original, self.evidence = original, evidence or {}
        self.input_groups = activations.find_input_groups(number, sites)
        self.ratios: list[float] = []  # of errors: the loss of all tokens together to that of each alone
        self.changed_before: set[str] = set()  # sites that read what the matrices of their own action make
        self.factors: dict[str, Factors] = {}  # fitted ahead, by several processes
        self.fits: dict[str, dict] = {}  # how the fit of a site ended
        self.orders: dict[str, Tensor] = {}  # of items: the order, or the basis, in which they lose dimensions
        self._moments: dict[int, Moments] = moments or {}
        self._targets: dict[str, Target] = {}

    def input_group(self, path: str) -> int:
        """Return the number of the input group of the site ``path``."""
        return next(k for k, group in enumerate(self.input_groups) if path in group)

    def moments(self, path: str) -> Moments:
        """Return the moments of the inputs of a site as the block now is, collected once for its input group."""
        number = self.input_group(path)
        if number in self._moments:
            return self._moments[number]
        is_expert = expert_of(path) is not None
        if self.original is not None:  # the groups before it are done
            self._moments = {k: known for k, known in self._moments.items() if k > number or is_expert}
        groups, block = {number: self.input_groups[number][0]}, self.activations.blocks[self.number]
        mixture: tuple[Any, ...] = ()
        if is_expert:  # all experts in one pass
            firsts = {k: group[0] for k, group in enumerate(self.input_groups) if k not in self._moments}
            groups = {k: first for k, first in firsts.items() if expert_of(first) is not None}
        elif self.original is not None and not self.settings.refit:
            block = self.original
        elif self.original is not None:
            local = self.original if path in self.changed_before else None
            mixture = (local, self.original, self.settings.original_share)
        paths = [self._inside(first) for first in groups.values()]
        sums = self.activations.sum_moments(self.number, block, paths, *mixture)
        found = reduce_moments(dict(zip(groups.values(), sums, strict=True)))
        self._moments |= dict(zip(groups, found, strict=True))
        return self._moments[number]

    def _inside(self, path: str) -> str:
        return path.removeprefix(f"{self.activations.paths[self.number]}.")

    def _original_module(self, path: str) -> Any:
        return (self.original or self.activations.blocks[self.number]).get_submodule(self._inside(path))

    def weight(self, path: str) -> Tensor:
        """Return ``W (out, in)`` of the original model, in float64."""
        return weight_of(self._original_module(path)).detach().double()

    def bias(self, path: str) -> Tensor | None:
        """Return the bias of the original model, in float64."""
        bias = self._original_module(path).bias
        return None if bias is None else bias.detach().double()

    def needs_refit(self, path: str) -> bool:
        """Return whether the site should reproduce outputs for other inputs than it gets."""
        apart = self.settings.original_share > 0 or path in self.changed_before
        return self.settings.refit and self.original is not None and apart and expert_of(path) is None

    def target(self, path: str) -> Target:
        """Return the target of the site ``path`` for its inputs as the block now is."""
        if path not in self._targets:  # two are cached, which heads ask for repeatedly; more would take too much memory
            self._targets = dict([*self._targets.items()][-1:])
            weight, second = self.refitted_weight(path), self.input_covariance(path)
            metric = with_ridge(second, self.damping(second))
            if self.settings.input_metric != "second":
                diagonal = (
                    metric.diagonal() if self.settings.input_metric == "diagonal" else metric.new_ones(len(metric))
                )
                metric = torch.diag(diagonal**self.settings.power)
            self._targets[path] = Target(weight, metric, self.output_metric(path))
        return self._targets[path]

    def refitted_weight(self, path: str) -> Tensor:
        """Return the best dense matrix ``(out, in)`` for the inputs that the site now gets.

        With ``C`` their second moment that is ``(W mean(x z^T) + ridge W) (C + ridge 1)^-1``, drawn towards the original ``W``.
        """
        weight = self.weight(path)
        if not self.needs_refit(path):
            return weight
        second, goal = self.input_covariance(path), self.cross_covariance(path)
        ridge = max(self.damping(second), 2.0**-23 * float(second.diagonal().sum()))  # the error of products in float32
        return solve_symmetric(with_ridge(second, ridge), goal.add(weight, alpha=ridge))

    def input_covariance(self, path: str) -> Tensor:
        """Return the second moment of the inputs, about their mean where the bias absorbs that."""
        moments = self.moments(path)
        return moments.second - torch.outer(moments.mean, moments.mean) if self.centers(path) else moments.second

    def cross_covariance(self, path: str) -> Tensor:
        """Return ``W mean(x z^T) (out, in)``, about the means where the bias absorbs them."""
        moments, weight = self.moments(path), self.weight(path)
        found = weight @ moments.cross
        return found - torch.outer(weight @ moments.mean_original, moments.mean) if self.centers(path) else found

    def centers(self, path: str) -> bool:
        """Return whether the bias of the site absorbs the mean of its inputs."""
        return self.settings.bias_correction and self.sites[path].bias

    def damping(self, second: Tensor) -> float:
        """Return the ridge that is added to the diagonal of a second moment."""
        return self.settings.damping * float(second.diagonal().mean().clamp_min(1e-12))

    def output_metric(self, path: str) -> Tensor:
        """Return the metric of the outputs of a site."""
        known = self.fisher.get(path)
        if known is None or self.settings.output_metric == "none":
            return torch.eye(self.sites[path].shape[0], dtype=torch.float64)
        if self.settings.output_metric == "row":
            return torch.diag(known.diagonal().clamp_min(1e-6 * float(known.diagonal().mean())))
        damping = self.settings.output_damping or self.settings.damping
        return with_ridge(known, damping * float(known.diagonal().mean().clamp_min(1e-12)))

    def evidence_loss(self, path: str, error: Tensor, columns: Tensor | None = None) -> float:
        """Return the loss of an error of a site in nats a token by its evidence; see ``tenfold.compression.evidence``.

        A bias that absorbs means absorbs that of the error.

        Args:
            error: ``(out, in)``, or of the ``columns`` only, all others being correct.
        """
        pairs = [(z if columns is None else z[:, columns], g) for z, g in self.evidence.get(path, ())]
        mean = self.moments(path).mean
        shift = -error @ (mean if columns is None else mean[columns]) if self.centers(path) else None
        alone, together = fisher_losses(pairs, error, shift, self.activations.num_tokens)
        if alone > 0:
            self.ratios.append(together / alone)
        return alone

    def corrected_bias(self, path: str, near: Tensor) -> Tensor | None:
        """Return the bias with which the mean of the outputs is correct when the matrix is ``near``."""
        bias = self.bias(path)
        if bias is None or not self.centers(path):
            return bias
        moments = self.moments(path)
        return bias + self.weight(path) @ moments.mean_original - near @ moments.mean

    def set_dense(self, path: str, matrix: Tensor, bias: Tensor | None = None) -> None:
        """Give the site a dense matrix of any size and this bias; ``corrected_bias`` unless given."""
        module, bias = self.model.get_submodule(path), self.corrected_bias(path, matrix) if bias is None else bias
        out, inner = matrix.shape
        other = isinstance(module, FactorizedLinear) and not isinstance(module.structure, Dense)
        if other or (out, inner) != self.sites[path].shape:
            return self.install(path, Dense(out_features=out, in_features=inner), {"matrix": matrix}, bias)
        set_matrix(module, matrix, bias)
        return self._invalidate(path)

    def refit_dense(self, path: str) -> None:
        """Give the site the best dense matrix for the inputs that it now gets, if that is another one."""
        if self.needs_refit(path):
            self.set_dense(path, self.refitted_weight(path))

    def install(self, path: str, structure: Structure, factors: Factors, bias: Tensor | None) -> None:
        """Give the site a structure."""
        install(self.model, SitePlan(self.sites[path], structure, bias is not None), factors, bias)
        self._invalidate(path)

    def install_shared(self, changes: list[tuple[SitePlan, Factors, Tensor | None]]) -> None:
        """Give sites their structures, some factors of which they share."""
        install_together(self.model, changes)
        for entry, _, _ in changes:
            self._invalidate(entry.site.path)

    def _invalidate(self, path: str) -> None:
        """Forget what is known of the inputs behind the input group of ``path``."""
        here, expert = self.input_group(path), expert_of(path)

        def stays(number: int) -> bool:
            beside = expert_of(self.input_groups[number][0]) not in (None, expert) and expert is not None
            return number <= here or beside  # experts do not read one another

        self._targets = {path: found for path, found in self._targets.items() if stays(self.input_group(path))}
        self._moments = {number: known for number, known in self._moments.items() if stays(number)}


class Action:
    """One item of a block, or several, that can be compressed: price the options, then carry one out.

    ``curves`` and ``apply`` have to be defined, the other methods where they say anything.
    """

    sites: list[Site]
    fisher_paths: Sequence[str] = ()  # sites whose Fisher information the curves need
    evidence_paths: Sequence[str] = ()  # sites whose gradients are kept token by token
    loss_unit: str | None = None  # of the curves, where it is not that of the run

    def curves(self, block: Block) -> list[TradeoffCurve]:
        """Return the options of every item, judged by the original model."""
        raise NotImplementedError

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        """Carry out the options that were chosen, by the names of the curves."""
        raise NotImplementedError

    def trials(self, block: Block, sizes: Mapping[str, Any]) -> list[Trial]:
        """Return errors of the block at these sizes, whose divergence is to be measured."""
        return []

    def count_bytes(self, chosen: dict[str, Any]) -> tuple[int, int] | None:
        """Return the bytes of what was chosen and of the dense matrix, where what is stored dense counts as less."""
        return None


def with_ridge(second: Tensor, ridge: float) -> Tensor:
    """Return ``second + ridge * 1``."""
    damped = second.clone()
    damped.diagonal().add_(ridge)
    return damped
