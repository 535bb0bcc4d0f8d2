"""Register published methods that the compressor is measured against; each file is one of them.

Importing the package adds them to the tables of :mod:`tenfold.compress`, by the names that recipes give in ``first``,
``allocate`` and ``method``. :mod:`tenfold.api` imports it.
"""

from tenfold.baselines import knapsack, lems, rocket, svd_llm_v2
from tenfold.baselines.drop_layers import drop_layers
from tenfold.baselines.layer_perplexity import drop_layers_by_perplexity
from tenfold.baselines.minitron import prune_by_activations
from tenfold.baselines.modegpt import MoDeGPTCriterion, influence_shares
from tenfold.baselines.peak_to_peak import prune_by_peak_to_peak
from tenfold.baselines.rotation import rotate_stream
from tenfold.baselines.slicegpt import slice_stream
from tenfold.baselines.unit_order import order_units
from tenfold.compress.actions import CRITERIA, FITS
from tenfold.compress.allocate import by_shares
from tenfold.compress.budget_split import ALLOCATORS, LOSS_MODELS
from tenfold.compress.whole_model import TRANSFORMS, WEIGHTS_ONLY

TRANSFORMS["drop-layers"] = drop_layers
TRANSFORMS["drop-layers-perplexity"] = drop_layers_by_perplexity
TRANSFORMS["minitron"] = prune_by_activations
TRANSFORMS["order"] = order_units
TRANSFORMS["peak-to-peak"] = prune_by_peak_to_peak
TRANSFORMS["rotate"] = rotate_stream
TRANSFORMS["slice"] = slice_stream
WEIGHTS_ONLY.add("peak-to-peak")
CRITERIA["modegpt"] = MoDeGPTCriterion
FITS["rocket"] = rocket.Sparse
ALLOCATORS["influence"] = lambda settings, curves, budget, influence: by_shares(
    curves, influence_shares(curves, influence, budget, settings.temperature)
)
ALLOCATORS["knapsack"] = lambda settings, curves, budget, influence: knapsack.knapsack(curves, budget)
ALLOCATORS["lems"] = lems.allocate
ALLOCATORS["svd-llm-v2"] = svd_llm_v2.allocate
LOSS_MODELS["lems"] = lems.measure
