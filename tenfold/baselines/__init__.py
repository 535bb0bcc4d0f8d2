"""Register published methods that the compressor is measured against; each file is one of them.

Importing the package adds them to the tables of :mod:`tenfold.compress`, by the names that recipes give in ``first``,
``allocate`` and ``method``. :mod:`tenfold.api` imports it.
"""

from tenfold.baselines import knapsack, lems, rocket, svd_llm_v2
from tenfold.baselines.layer_perplexity import drop_layers_by_perplexity
from tenfold.baselines.minitron import prune_by_activations
from tenfold.baselines.peak_to_peak import prune_by_peak_to_peak
from tenfold.compress.actions import FOLDS
from tenfold.compress.first import FIRST, WEIGHTS_ONLY
from tenfold.compress.shares import MEASURED, SHARED

FIRST["drop-layers-perplexity"] = drop_layers_by_perplexity
FIRST["minitron"] = prune_by_activations
FIRST["peak-to-peak"] = prune_by_peak_to_peak
WEIGHTS_ONLY.add("peak-to-peak")
SHARED["svd-llm-v2"] = svd_llm_v2.allocate
SHARED["lems"] = lems.allocate
SHARED["knapsack"] = lambda settings, curves, budget, influence: knapsack.knapsack(curves, budget)
MEASURED["lems"] = lems.measure
FOLDS["rocket"] = rocket.Sparse
