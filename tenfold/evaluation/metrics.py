"""The metrics of tasks, by scikit-learn, scipy and rouge-score: ``name -> function(predictions, targets)``.

Add one by an entry in ``METRICS``. All are fractions: 1 is perfect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType


def import_library(name: str) -> ModuleType:
    """Import the module ``name`` of an optional library.

    Raises:
        ImportError: the library is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"tasks need {name.split('.')[0]}, which is not here: pip install 'tenfold[tasks]'") from None


def _sklearn(name: str, predictions: Sequence[int], targets: Sequence[int], **more) -> float:
    return float(getattr(import_library("sklearn.metrics"), name)(targets, predictions, **more))


def _correlation(name: str, predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Return a correlation; 0 where it is not defined, because one side is constant."""
    if len(set(predictions)) < 2 or len(set(targets)) < 2:
        return 0.0
    value = float(getattr(import_library("scipy.stats"), name)(predictions, targets).statistic)
    return value if math.isfinite(value) else 0.0


def _rouge(kind: str, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> float:
    """Return the F-measure of stemmed words, the best over the references of a text, as a mean over the texts."""
    scorer = import_library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)
    pairs = zip(predictions, targets, strict=True)
    scores = [scorer.score_multi(list(references), text)[kind].fmeasure for text, references in pairs]
    return sum(scores) / len(scores)


METRICS: dict[str, Callable[[Sequence, Sequence], float]] = {
    "accuracy": partial(_sklearn, "accuracy_score"),
    "f1": partial(_sklearn, "f1_score", zero_division=0.0),  # of label 1
    "matthews": partial(_sklearn, "matthews_corrcoef"),
    "pearson": partial(_correlation, "pearsonr"),
    "spearman": partial(_correlation, "spearmanr"),
    **{kind: partial(_rouge, kind) for kind in ("rouge1", "rouge2", "rougeL")},
}
