"""Ordering: the hidden units of every MLP in the order in which its matrices are nearest to their structures.

The order is absorbed into both neighbours of the units, so that it costs nothing; the rules of the recipe then fold the model.
It is sought in the Frobenius norm (:func:`tenfold.models.invariances.hidden_units.order_hidden`).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tenfold.baselines.rotation import shaped
from tenfold.compress.calibration import Calibration
from tenfold.models.invariances.hidden_units import hidden_weights, mlp_sites, order_hidden, permute_hidden
from tenfold.models.recipe import Recipe, Rule
from tenfold.models.sites import Site

ROUNDS, STARTS = 10, 4  # of the search


def order_units(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Put the hidden units of ``model`` in order, in place, for the structures of the rules.

    Returns:
        ``ordered``: the paths of the MLPs that got another order.

    Raises:
        ImportError: scipy is missing.
        ValueError: no rule has a structure for an MLP, or the order makes no difference to it.
    """
    orders = {}
    for path, sites in mlp_sites(model).items():
        folded = {site.path: rule for site in sites if (rule := _rule(recipe, site)) is not None}
        if not folded:
            continue
        weights = hidden_weights(model, path, lambda site, folded=folded: site.path in folded)
        rule = next(iter(folded.values()))
        units, width = weights[0].shape
        structure = shaped(model, recipe, rule, (units, width))
        orders[path] = order_hidden(weights, structure, rounds=ROUNDS, starts=STARTS)
    if not orders:
        raise ValueError(
            f"no rule of recipe {recipe.name} has a structure for an MLP, whose hidden units could be ordered"
        )
    permute_hidden(model, orders)
    return {"ordered": [path for path, order in orders.items() if order.tolist() != sorted(order.tolist())]}


def _rule(recipe: Recipe, site: Site) -> Rule | None:
    """The rule that folds ``site``, None where none does."""
    rule = next((rule for rule in recipe.replace if rule.matches(site)), None)
    return None if rule is None or rule.narrow else rule
