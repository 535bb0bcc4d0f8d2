"""Layers that own the factors of a structure: drop-in for ``nn.Linear`` and ``nn.Embedding``."""

from tenfold.nn.adapter import Adapter as Adapter
from tenfold.nn.experts import Expert as Expert
from tenfold.nn.experts import Experts as Experts
from tenfold.nn.layers import FactorizedEmbedding as FactorizedEmbedding
from tenfold.nn.layers import FactorizedLinear as FactorizedLinear
from tenfold.nn.layers import SharedFactors as SharedFactors
from tenfold.nn.layers import TiedEmbedding as TiedEmbedding
from tenfold.nn.layers import TiedHead as TiedHead
