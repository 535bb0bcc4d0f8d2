"""Register published methods that the compressor is measured against; each file is one of them.

Importing the package adds their allocations and their ways to fill a matrix to the tables of :mod:`tenfold.compress`, by the
names that recipes give in ``allocate`` and ``method``. :mod:`tenfold.api` imports it.
"""

from tenfold.baselines import knapsack, lems, rocket, svd_llm_v2
from tenfold.compress.actions import FOLDS
from tenfold.compress.shares import MEASURED, SHARED

SHARED["svd-llm-v2"] = svd_llm_v2.allocate
SHARED["lems"] = lems.allocate
SHARED["knapsack"] = lambda settings, curves, budget, influence: knapsack.knapsack(curves, budget)
MEASURED["lems"] = lems.measure
FOLDS["rocket"] = rocket.Sparse
