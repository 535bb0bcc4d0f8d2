"""Permutation of the hidden units of every MLP after which its matrices are nearest to their structures.

It is absorbed by the matrices on both sides, so that it costs nothing; the rules of the recipe then compress the model.
It is sought in the Frobenius norm (``tenfold.models.invariances.hidden_units.order_hidden``).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tenfold.baselines.rotation import find_rule, structure_for
from tenfold.compression.calibration import Calibration
from tenfold.models.invariances.hidden_units import hidden_weights, mlp_sites, order_hidden, permute_hidden
from tenfold.models.recipe import Recipe

ROUNDS, STARTS = 10, 4  # of the search


def order_units(model: PreTrainedModel, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Permute the hidden units of ``model``, in place, for the structures of the rules.

    Returns:
        ``ordered``: the paths of the MLPs whose units were permuted.

    Raises:
        ImportError: scipy is missing.
        ValueError: no rule has a structure for an MLP, or the order makes no difference to it.
    """
    orders = {}
    for path, sites in mlp_sites(model).items():
        factorised = {site.path: rule for site in sites if (rule := find_rule(recipe, site)) is not None}
        if not factorised:
            continue
        weights = hidden_weights(model, path, lambda site, factorised=factorised: site.path in factorised)
        rule = next(iter(factorised.values()))
        units, width = weights[0].shape
        structure = structure_for(model, recipe, rule, (units, width))
        orders[path] = order_hidden(weights, structure, rounds=ROUNDS, starts=STARTS)
    if not orders:
        raise ValueError(
            f"no rule of recipe {recipe.name} has a structure for an MLP, whose hidden units could be ordered"
        )
    permute_hidden(model, orders)
    return {"ordered": [path for path, order in orders.items() if order.tolist() != sorted(order.tolist())]}
