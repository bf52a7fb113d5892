"""Metrics of predictions, by scikit-learn and scipy; for SQuAD, as in its official script."""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import CompressionError, listing, needs_extra

NEEDED = {"sklearn": "scikit-learn", "scipy": "scipy", "datasets": "datasets", "accelerate": "accelerate"}


def require(*modules: str) -> None:
    """Raise CompressionError if one of these modules is not installed."""
    missing = [NEEDED[module] for module in modules if find_spec(module) is None]
    if missing:
        raise CompressionError(needs_extra("This evaluation", listing(missing), "evaluate"))


def _accuracy(labels: Any, predictions: Any) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(labels: Any, predictions: Any) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(labels: Any, predictions: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: Any, predictions: Any) -> float:
    from scipy.stats import pearsonr

    if len(labels) < 2:
        return float("nan")
    return float(pearsonr(labels, predictions).statistic)


def _spearman(labels: Any, predictions: Any) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(labels, predictions).statistic)


# Labels and predictions, both [examples] → a number, higher is better. Correlations that do not exist are NaN.
METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def score(names: Sequence[str], labels: Any, predictions: Any) -> dict[str, float]:
    """Return metrics by their names; see `METRICS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predictions that are all the same: the NaN says it
        return {name: METRICS[name](labels, predictions) for name in names}


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return exact match and F1 of SQuAD v1.1 as shares between 0 and 1: of each question the best over its answers."""
    exact = [
        max(float(normalized(said) == normalized(true)) for true in known) for said, known in _zip(predictions, answers)
    ]
    overlaps = [max(token_f1(said, true) for true in known) for said, known in _zip(predictions, answers)]
    return {"exact_match": sum(exact) / len(exact), "f1": sum(overlaps) / len(overlaps)}


def normalized(text: str) -> str:
    """Return an answer in lower case, without punctuation, articles and surplus spaces, as SQuAD's script compares it."""
    kept = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def token_f1(said: str, true: str) -> float:
    """Return the F1 of the words of two answers, after normalisation."""
    said_words, true_words = normalized(said).split(), normalized(true).split()
    common = sum((Counter(said_words) & Counter(true_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(said_words), common / len(true_words)
    return 2 * precision * recall / (precision + recall)


def _zip(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> zip[tuple[str, Sequence[str]]]:
    return zip(predictions, answers, strict=True)
