"""Published methods to compare with. Importing this package enters them in the registries of :mod:`tenfold.compress`."""

from tenfold.baselines.layer_perplexity import drop_layers_by_perplexity
from tenfold.baselines.minitron import prune_by_activations
from tenfold.baselines.peak_to_peak import prune_by_peak_to_peak
from tenfold.compress.first import FIRST, WEIGHTS_ONLY

FIRST["drop-layers-perplexity"] = drop_layers_by_perplexity
FIRST["minitron"] = prune_by_activations
FIRST["peak-to-peak"] = prune_by_peak_to_peak
WEIGHTS_ONLY.add("peak-to-peak")
