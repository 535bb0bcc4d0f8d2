"""One block while it is compressed: the moments of its inputs, what its sites should become, and putting that in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.compress.activations import Streams
from tenfold.compress.evidence import Evidence, fisher_losses
from tenfold.compress.moments import Moments
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
    """What one site should become: ``minimise ||outputs^(1/2) (weight - What) inputs^(1/2)||``.

    Args:
        weight: ``(out, in)``: the best dense matrix for the inputs that the site now gets.
        inputs: their damped metric ``(in, in)``.
        outputs: the metric of the outputs ``(out, out)``.
    """

    weight: Tensor
    inputs: Tensor
    outputs: Tensor

    def loss(self, near: Tensor) -> float:
        """Nats a token, where ``outputs`` is a Fisher information."""
        rest = self.weight - near
        return float((rest * (self.outputs @ rest @ self.inputs)).sum()) / 2


class Block:
    """Block ``number`` of ``model`` in both streams.

    Args:
        path: of the block.
        sites: all matrices in it.
        sensitivity: ``{path: G}``; a site without one counts every output alike.
        original: the block as it was; None while the original model is surveyed.
        known: moments that were found already, ``{number of a stage: moments}``.
        evidence: of the survey, ``{path: [(inputs, gradients at the outputs)]}``, one pair a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        sites: list[Site],
        streams: Streams,
        number: int,
        settings: Calibrate,
        sensitivity: dict[str, Tensor],
        original: nn.Module | None,
        known: dict[int, Moments] | None = None,
        evidence: Evidence | None = None,
    ):
        self.model, self.path, self.sites = model, path, {site.path: site for site in sites}
        self.streams, self.number, self.settings, self.sensitivity = streams, number, settings, sensitivity
        self.original = original
        self.stages = stages_of(path, sites, streams, number)
        self._known: dict[int, Moments] = known or {}
        self.evidence = evidence or {}
        self.ratios: list[float] = []  # of errors: what tokens cost together, by what each costs alone
        self.changed_before: set[str] = set()  # sites that read what the matrices of their own action make
        self._targets: dict[str, Target] = {}
        self.fitted: dict[str, Factors] = {}  # of sites that are next, by several processes
        self.fits: dict[str, dict] = {}  # how the fit of a site ended
        self.orders: dict[str, Tensor] = {}  # of items: in which order, or in which basis, they lose dimensions

    def role(self, *roles: str) -> list[Site]:
        """The sites of these roles."""
        return [site for site in self.sites.values() if site.role in roles]

    def stage(self, path: str) -> int:
        """The number of the stage in which the site ``path`` runs."""
        return next(k for k, stage in enumerate(self.stages) if path in stage)

    def moments(self, path: str) -> Moments:
        """Of the inputs of a site as the block now is; of sites that read the same, once."""
        stage = self.stage(path)
        if stage not in self._known:
            if self.original is not None:  # the stages before it are done
                self._known = {k: known for k, known in self._known.items() if k > stage or expert_of(path) is not None}
            inner = self.stages[stage][0].removeprefix(f"{self.path}.")
            here = self.streams.blocks[self.number]
            if expert_of(path) is not None:
                self._experts(here)
                return self._known[stage]
            if not self.settings.refit or self.original is None:
                self._known[stage] = self.streams.moments(self.number, self.original or here, inner)
            else:
                local = self.original if path in self.changed_before else None
                given = (local, self.original, self.settings.original_share)
                self._known[stage] = self.streams.moments(self.number, here, inner, *given)
        return self._known[stage]

    def _experts(self, here: torch.nn.Module) -> None:
        """The moments of all experts that are not known, in one pass."""
        first = {
            k: stage[0]
            for k, stage in enumerate(self.stages)
            if expert_of(stage[0]) is not None and k not in self._known
        }
        inner = [path.removeprefix(f"{self.path}.") for path in first.values()]
        self._known |= dict(zip(first, self.streams.expert_moments(self.number, here, inner), strict=True))

    def refits(self, path: str) -> bool:
        """Whether the site is to answer to other inputs than it gets."""
        apart = self.settings.original_share > 0 or path in self.changed_before
        return self.settings.refit and self.original is not None and apart and expert_of(path) is None

    def weight(self, path: str) -> Tensor:
        """``W (out, in)`` of the original model, in float64."""
        block = self.original or self.streams.blocks[self.number]
        return weight_of(block.get_submodule(path.removeprefix(f"{self.path}."))).detach().double()

    def bias(self, path: str) -> Tensor | None:
        """The bias of the original model."""
        block = self.original or self.streams.blocks[self.number]
        bias = block.get_submodule(path.removeprefix(f"{self.path}.")).bias
        return None if bias is None else bias.detach().double()

    def target(self, path: str) -> Target:
        """What the site should become, from the moments of its inputs as the block now is."""
        if path not in self._targets:  # heads ask for the same two again and again; more would be too much memory
            self._targets = dict([*self._targets.items()][-1:])
            self._targets[path] = self._found(path)
        return self._targets[path]

    def take(self, path: str) -> Target:
        """As :meth:`target`; the caller may overwrite it."""
        target = self.target(path)
        del self._targets[path]
        return target

    def _found(self, path: str) -> Target:
        weight = self.refitted(path)
        second = self.second(path)
        return Target(weight, self.metric(with_ridge(second, self.damping(second))), self.outputs(path))

    def refitted(self, path: str) -> Tensor:
        """The best dense matrix ``(out, in)`` for the inputs that the site now gets; the original one unless it refits."""
        if not self.refits(path):
            return self.weight(path)
        second, goal = self.second(path), self.crossed(path)
        return regressed(self.weight(path), second, goal, self.damping(second))

    def second(self, path: str) -> Tensor:
        """The second moment of the inputs, about their mean where the bias takes that up."""
        moments = self.moments(path)
        return moments.second - torch.outer(moments.mean, moments.mean) if self.centres(path) else moments.second

    def crossed(self, path: str) -> Tensor:
        """``W mean(x z^T)`` ``(out, in)``, about the means likewise; the cross moment goes when no other site asks for it."""
        moments, weight = self.moments(path), self.weight(path)
        if path not in moments.crossed:
            moments.crossed[path] = weight @ moments.cross
            if len(self.stages[self.stage(path)]) == 1:
                moments.cross = moments.cross.new_empty(0)
        found = moments.crossed[path]
        return found - torch.outer(weight @ moments.mean_original, moments.mean) if self.centres(path) else found

    def centres(self, path: str) -> bool:
        """Whether the mean of the inputs is left to the bias."""
        return self.settings.center and self.sites[path].bias

    def damping(self, second: Tensor) -> float:
        """What is added to the diagonal of a second moment."""
        return self.settings.damping * float(second.diagonal().mean().clamp_min(1e-12))

    def metric(self, damped: Tensor) -> Tensor:
        """The metric of inputs with this second moment."""
        if self.settings.inputs == "second":
            return damped
        diagonal = damped.diagonal() if self.settings.inputs == "diagonal" else torch.ones(len(damped)).to(damped)
        return torch.diag(diagonal**self.settings.power)

    def outputs(self, path: str) -> Tensor:
        """The metric of the outputs of a site."""
        known = self.sensitivity.get(path)
        if known is None or self.settings.outputs == "none":
            return torch.eye(self.sites[path].shape[0], dtype=torch.float64)
        if self.settings.outputs == "row":
            return torch.diag(known.diagonal().clamp_min(1e-6 * float(known.diagonal().mean())))
        share = self.settings.output_damping or self.settings.damping
        return with_ridge(known, share * float(known.diagonal().mean().clamp_min(1e-12)))

    def cost(self, path: str, error: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> float:
        """Return what an error of a site costs in nats a token, by the evidence; see :mod:`tenfold.compress.evidence`.

        A bias that takes up means takes up that of the error.

        Args:
            error: ``(out, in)``, or of the ``rows`` and ``columns`` only, all others being none.
        """
        pairs = [
            (z if columns is None else z[:, columns], g if rows is None else g[:, rows])
            for z, g in self.evidence.get(path, ())
        ]
        mean = self.moments(path).mean
        shift = -error @ (mean if columns is None else mean[columns]) if self.centres(path) else None
        alone, together = fisher_losses(pairs, error, shift, self.tokens)
        if alone > 0:
            self.ratios.append(together / alone)
        return alone

    @property
    def tokens(self) -> int:
        """How many tokens of the text this process reads."""
        return sum(int(kept.sum()) for kept in self.streams.kept)

    def new_bias(self, path: str, near: Tensor) -> Tensor | None:
        """The bias that makes the mean of the outputs right when the matrix is ``near``."""
        bias = self.bias(path)
        if bias is None or not self.centres(path):
            return bias
        moments = self.moments(path)
        return bias + self.weight(path) @ moments.mean_original - near @ moments.mean

    def put(self, path: str, matrix: Tensor, bias: Tensor | None) -> None:
        """Give the site a dense matrix of its own size."""
        module = self.model.get_submodule(path)
        if isinstance(module, FactorizedLinear) and not isinstance(module.structure, Dense):
            out, inner = matrix.shape
            return self.fold(path, Dense(out_features=out, in_features=inner), {"matrix": matrix}, bias)
        set_matrix(module, matrix, bias)
        return self._changed(path)

    def fold(self, path: str, structure: Structure, factors: Factors, bias: Tensor | None) -> None:
        """Give the site a structure."""
        install(self.model, SitePlan(self.sites[path], structure, bias is not None), factors, bias)
        self._changed(path)

    def fold_together(self, changes: list[tuple[SitePlan, Factors, Tensor | None]]) -> None:
        """Give sites their structures, some factors of which they share."""
        install_together(self.model, changes)
        for entry, _, _ in changes:
            self._changed(entry.site.path)

    def _changed(self, path: str) -> None:
        """What runs behind the stage of ``path`` gets other inputs now."""
        here, expert = self.stage(path), expert_of(path)

        def stays(stage: int) -> bool:
            beside = expert_of(self.stages[stage][0]) not in (None, expert) and expert is not None
            return stage <= here or beside  # experts do not read one another

        self._targets = {path: found for path, found in self._targets.items() if stays(self.stage(path))}
        self._known = {stage: known for stage, known in self._known.items() if stays(stage)}


def regressed(weight: Tensor, second: Tensor, goal: Tensor, share: float) -> Tensor:
    """``(goal + share W) (second + share 1)^-1``, ``goal = W mean(x z^T)``.

    What makes of ``z`` what ``W`` makes of ``x``, drawn towards ``W``. The share is never less than what products in float32 may
    be wrong by.
    """
    share = max(share, 2.0**-23 * float(second.diagonal().sum()))
    return solve_symmetric(with_ridge(second, share), goal.add(weight, alpha=share))


def with_ridge(second: Tensor, share: float) -> Tensor:
    """``second + share * 1``."""
    damped = second.clone()
    damped.diagonal().add_(share)
    return damped


def stages_of(path: str, sites: list[Site], streams: Streams, number: int) -> list[list[str]]:
    """The sites of block ``number`` in the order in which they run, those that read the same together."""
    inner = {site.path.removeprefix(f"{path}."): site.path for site in sites}
    return [[inner[p] for p in stage] for stage in streams.stages(number, list(inner))]
