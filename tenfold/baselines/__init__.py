"""Published methods that the compressor is measured against; each file is one of them.

Importing the package registers them in the tables of ``tenfold.compression``, by the names that recipes give in
``transform``, ``allocate`` and ``criterion``. ``tenfold.api`` imports it.
"""

from tenfold.baselines.drop_layers import drop_layers
from tenfold.baselines.knapsack import solve_knapsack
from tenfold.baselines.layer_perplexity import drop_layers_by_perplexity
from tenfold.baselines.lems import MeasuredSite, allocate_by_error_model
from tenfold.baselines.minitron import prune_by_activations
from tenfold.baselines.modegpt import MoDeGPTCriterion, influence_ratios
from tenfold.baselines.peak_to_peak import prune_by_peak_to_peak
from tenfold.baselines.rocket import SparseSite
from tenfold.baselines.rotation import rotate_stream
from tenfold.baselines.slicegpt import slice_stream
from tenfold.baselines.svd_llm_v2 import allocate_by_type
from tenfold.compression.actions import CRITERIA, FITS
from tenfold.compression.allocation import ALLOCATORS, allocate_by_ratios
from tenfold.compression.compress import TRANSFORMS, WEIGHTS_ONLY

TRANSFORMS["drop-layers"] = drop_layers
TRANSFORMS["drop-layers-perplexity"] = drop_layers_by_perplexity
TRANSFORMS["minitron"] = prune_by_activations
TRANSFORMS["peak-to-peak"] = prune_by_peak_to_peak
TRANSFORMS["rotate"] = rotate_stream
TRANSFORMS["slice"] = slice_stream
WEIGHTS_ONLY.add("peak-to-peak")
CRITERIA["modegpt"] = MoDeGPTCriterion
FITS["lems"] = MeasuredSite
FITS["rocket"] = SparseSite
ALLOCATORS["influence"] = lambda settings, curves, budget, influence: allocate_by_ratios(
    curves, influence_ratios(curves, influence, budget, settings.temperature)
)
ALLOCATORS["knapsack"] = lambda settings, curves, budget, influence: solve_knapsack(curves, budget)
ALLOCATORS["lems"] = allocate_by_error_model
ALLOCATORS["svd-llm-v2"] = allocate_by_type
