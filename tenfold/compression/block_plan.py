"""Plan of a compression block by block, and the run that carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from tenfold.compression.actions import make_actions
from tenfold.compression.activations import Activations, group_by_block
from tenfold.compression.block import Action
from tenfold.compression.calibration import Batch
from tenfold.compression.progress import Progress, no_progress
from tenfold.compression.resume_state import ResumeState
from tenfold.compression.tensor_store import TensorStore
from tenfold.compression.weight_source import Weights
from tenfold.models.config import Calibrate
from tenfold.models.recipe import Recipe
from tenfold.models.sites import Site, find_sites


@dataclass
class BlockPlan:
    """Actions in one block."""

    path: str
    sites: list[Site]
    actions: list[Action]


@dataclass
class CompressionRun:
    """Compression of one model, block by block.

    Args:
        batches: calibration tokens of all processes.
        weights: source of the weights of a block.
        state: what an earlier run has reached.
        folder: of hidden states; None: they are in memory.
    """

    model: PreTrainedModel
    plans: list[BlockPlan]
    batches: list[Batch]
    settings: Calibrate
    weights: Weights
    state: ResumeState
    folder: Path | None = None
    progress: Progress = no_progress

    def open_activations(self, batches: list[Batch], store: TensorStore, precision: str | None = None) -> Activations:
        """Return the activations of ``batches`` in front of the first block."""
        paths, settings = [plan.path for plan in self.plans], self.settings
        with self.weights.outside():
            return Activations(self.model, paths, batches, store, settings.skip_first, precision or settings.precision)


def plan_blocks(model: PreTrainedModel, recipe: Recipe) -> list[BlockPlan]:
    """Return the actions of every block; the first rule that matches a site wins.

    Raises:
        ValueError: a rule matches nothing in the blocks.
    """
    used, plans = set(), []
    for path, sites in group_by_block(find_sites(model)).items():
        matched: dict[int, list[Site]] = {}
        for site in sites:
            number = next((k for k, rule in enumerate(recipe.replace) if rule.matches(site)), None)
            if number is not None:
                matched.setdefault(number, []).append(site)
        used |= matched.keys()
        actions = [a for k, found in matched.items() for a in make_actions(model, recipe.replace[k], found, sites)]
        # what experts read comes first, so that one pass collects the inputs of all their output matrices
        actions.sort(
            key=lambda action: all(site.expert is not None and site.role == "mlp.out" for site in action.sites)
        )
        plans.append(BlockPlan(path, sites, actions))
    for k, rule in enumerate(recipe.replace):
        if k not in used:
            raise ValueError(
                f"no matrix in the blocks of this {model.config.model_type} matches role {rule.role or rule.prune}"
            )
    return plans
