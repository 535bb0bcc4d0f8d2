"""Permutation search for placed structures: fit, then re-assign rows and columns, in turn (TQCompressor)."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.structure.base import Factors
from tenfold.structure.combinators import Placed


def search(structure: Placed, weight: Tensor, **options) -> Factors:
    """Identity maps for now."""
    return structure.closed_form(weight)
