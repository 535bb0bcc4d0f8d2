"""The metrics of tasks, by scikit-learn, scipy and rouge-score: ``name -> function(predictions, wanted)``.

Add one by writing a function with its name in ``@metric``. All are fractions: 1 is perfect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

METRICS: dict[str, Callable[[Sequence, Sequence], float]] = {}


def metric(name: str):
    def register(function):
        METRICS[name] = function
        return function

    return register


def library(name: str) -> ModuleType:
    """The module ``name`` of an optional library.

    Raises:
        ImportError: the library is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"tasks need {name.split('.')[0]}, which is not here: pip install 'tenfold[tasks]'") from None


@metric("accuracy")
def accuracy(predictions: Sequence[int], wanted: Sequence[int]) -> float:
    """The share of equal labels."""
    return float(library("sklearn.metrics").accuracy_score(wanted, predictions))


@metric("f1")
def f1(predictions: Sequence[int], wanted: Sequence[int]) -> float:
    """``2 tp / (2 tp + fp + fn)`` of label 1; 0 where it is neither predicted nor wanted."""
    return float(library("sklearn.metrics").f1_score(wanted, predictions, zero_division=0.0))


@metric("matthews")
def matthews(predictions: Sequence[int], wanted: Sequence[int]) -> float:
    """The correlation of two columns of labels 0 and 1; 0 where one of them is constant."""
    return float(library("sklearn.metrics").matthews_corrcoef(wanted, predictions))


@metric("pearson")
def pearson(predictions: Sequence[float], wanted: Sequence[float]) -> float:
    """The linear correlation; 0 where it is not defined, because one side is constant."""
    return _correlation("pearsonr", predictions, wanted)


@metric("spearman")
def spearman(predictions: Sequence[float], wanted: Sequence[float]) -> float:
    """The correlation of the ranks; 0 where it is not defined, because one side is constant."""
    return _correlation("spearmanr", predictions, wanted)


def _correlation(name: str, predictions: Sequence[float], wanted: Sequence[float]) -> float:
    if len(set(predictions)) < 2 or len(set(wanted)) < 2:
        return 0.0
    value = float(getattr(library("scipy.stats"), name)(predictions, wanted).statistic)
    return value if math.isfinite(value) else 0.0


def _rouge(kind: str):
    """F-measure of stemmed words, the best over the references of a text, its mean over the texts."""

    @metric(kind)
    def rouge(predictions: Sequence[str], wanted: Sequence[Sequence[str]]) -> float:
        scorer = library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)
        scores = [
            scorer.score_multi(list(given), text)[kind].fmeasure
            for text, given in zip(predictions, wanted, strict=True)
        ]
        return sum(scores) / len(scores)

    return rouge


rouge1, rouge2, rouge_l = (_rouge(kind) for kind in ("rouge1", "rouge2", "rougeL"))
