"""How well logits tell pairs that bind from pairs that do not: ranking, decisions at a threshold, calibration.

Metrics are functions of how often every pair counts (:mod:`megaprot.finetune.metrics`); what a bootstrap would repeat,
the sorting, is done once. Threshold and temperature are chosen on the validation split, never on the split measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from megaprot.finetune.metrics import Floats, Weighted, ratio, ratio_or_zero

NUM_BINS = 15
STRATA = (("degree_0", 0, 0), ("degree_1_to_5", 1, 5), ("degree_6_to_20", 6, 20), ("degree_above_20", 21, None))
"""(Name, least, most) degree in the training split of the rarer of a pair's two proteins."""
_LEAST_LOG, _MOST_LOG = np.log(0.01), np.log(100.0)

DEFINITIONS = {
    "aupr": "Average precision: the sum over thresholds of precision times the gain in recall, pairs of one score "
    "together.",
    "auroc": "Probability that a pair that binds has a higher score than one that does not, ties counted half.",
    "mcc": "Matthews' correlation of decisions and labels, at the threshold that is best for it on the validation "
    "split.",
    "f1": "Harmonic mean of precision and recall of pairs that bind, at the same threshold.",
    "precision": "Share of pairs called binding that bind, at the same threshold.",
    "recall": "Share of pairs that bind that are called so, at the same threshold.",
    "accuracy": "Share of pairs decided rightly, at the same threshold.",
    "ece": f"Expected calibration error: |mean probability - share that binds|, mean over pairs of {NUM_BINS} bins of "
    "equal width, probabilities scaled by the temperature of the validation split.",
    "ece_unscaled": "The same of probabilities as the model gives them.",
    "order_flips": "Share of pairs whose decision changes when the two proteins change places.",
    **{
        f"aupr_{name}": f"Average precision of pairs whose rarer protein is in {degrees} pairs of the training split."
        for (name, *_), degrees in zip(STRATA, ("no", "1 to 5", "6 to 20", "more than 20"), strict=True)
    },
}
"""{metric: what it is, in one sentence}."""


def pair_metrics(labels: Floats, logits: Floats, threshold: float, temperature: float = 1.0) -> dict[str, Weighted]:
    """Return the metrics of a split of pairs.

    Args:
        labels: 1 for a pair that binds, 0 for one that does not [num_pairs].
        logits: The model's [num_pairs].
        threshold: Logit from which on a pair is called binding.
        temperature: What logits are divided by to become calibrated.
    """
    return {
        "aupr": average_precision(labels, logits),
        "auroc": auroc(labels, logits),
        **decisions(labels, logits >= threshold),
        "ece": calibration_error(labels, expit(logits / temperature)),
        "ece_unscaled": calibration_error(labels, expit(logits)),
    }


def cumulated(labels: Floats, scores: Floats) -> Callable[[Floats], tuple[Floats, Floats]]:
    """Return a function of weights: weight of positives and of negatives at or above each distinct score, falling."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last pair of each distinct score
    sorted_labels = labels[order]

    def cumulate(weights: Floats) -> tuple[Floats, Floats]:
        found = weights[order]
        positive = np.cumsum(found * sorted_labels)[ends]
        return positive, np.cumsum(found)[ends] - positive

    return cumulate


def average_precision(labels: Floats, scores: Floats) -> Weighted:
    """Return the average precision (scikit-learn's definition), nan without positives."""
    cumulate = cumulated(labels, scores)

    def metric(weights: Floats) -> float:
        positive, negative = cumulate(weights)
        if not positive[-1]:
            return float("nan")
        total = positive + negative
        precision = positive / np.where(total > 0, total, 1.0)
        return float(np.diff(positive, prepend=0.0) @ precision / positive[-1])

    return metric


def auroc(labels: Floats, scores: Floats) -> Weighted:
    """Return the area under the receiver operating characteristic, nan without positives or without negatives."""
    cumulate = cumulated(labels, scores)

    def metric(weights: Floats) -> float:
        positive, negative = cumulate(weights)
        total = positive[-1] * negative[-1]
        area = np.diff(positive, prepend=0.0) @ (negative[-1] - negative + np.diff(negative, prepend=0.0) / 2)
        return float(area / total) if total > 0 else float("nan")

    return metric


def decisions(labels: Floats, is_called: NDArray[np.bool_]) -> dict[str, Weighted]:
    """Return MCC, F1, precision, recall and accuracy of decisions; each 0 where nothing is left to divide by."""
    called = is_called.astype(float)
    hits = labels * called
    return {
        "mcc": _matthews(labels, called),
        "f1": ratio_or_zero(2 * hits, labels + called),
        "precision": ratio_or_zero(hits, called),
        "recall": ratio_or_zero(hits, labels),
        "accuracy": ratio(hits + (1 - labels) * (1 - called), np.ones(len(labels))),
    }


def _matthews(labels: Floats, called: Floats) -> Weighted:
    hits = labels * called

    def metric(weights: Floats) -> float:
        total, true, positive, hit = weights.sum(), weights @ labels, weights @ called, weights @ hits
        return float(_correlation(total, true, positive, hit))

    return metric


def _correlation(total: Any, true: Any, called: Any, hits: Any) -> Floats:
    """Return Matthews' correlation of counts of pairs, 0 where a row or column of the table is empty."""
    spread = np.sqrt(np.maximum(true * (total - true) * called * (total - called), 0.0))
    return np.where(spread > 0, (total * hits - true * called) / np.where(spread > 0, spread, 1.0), 0.0)


def calibration_error(labels: Floats, probabilities: Floats) -> Weighted:
    """Return the expected calibration error over bins of equal width (Guo et al. 2017)."""
    bins = bins_of(probabilities)
    gaps = probabilities - labels

    def metric(weights: Floats) -> float:
        return float(np.abs(np.bincount(bins, weights * gaps, NUM_BINS)).sum() / weights.sum())

    return metric


def bins_of(probabilities: Floats) -> NDArray[np.int64]:
    """Return the calibration bin of each probability, from 0."""
    return np.minimum((probabilities * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def best_threshold(labels: Floats, logits: Floats) -> float:
    """Return the logit from which on calling pairs binding gives the highest MCC, midway between two logits.

    Of equally good ones the highest is taken; 0 where all logits are equal.
    """
    distinct = np.unique(logits)[::-1]
    if len(distinct) < 2:
        return 0.0
    positive, negative = cumulated(labels, logits)(np.ones(len(labels)))
    called = positive + negative
    found = _correlation(called[-1], positive[-1], called[:-1], positive[:-1])
    place = int(np.argmax(found))
    return float((distinct[place] + distinct[place + 1]) / 2)


def temperature(labels: Floats, logits: Floats) -> float:
    """Return the temperature from 0.01 to 100 that gives the least negative log likelihood (Guo et al. 2017)."""
    signed = np.where(labels > 0, logits, -logits)

    def cost(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, -signed / np.exp(log_temperature)).mean())

    found = minimize_scalar(cost, bounds=(_LEAST_LOG, _MOST_LOG), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def order_flips(first: Floats, second: Floats, threshold: float) -> Weighted:
    """Return the share of pairs whose decision depends on the order of their proteins.

    Args:
        first: Logits in the one order [num_pairs].
        second: Logits in the other.
        threshold: Logit from which on a pair is called binding.
    """
    return ratio(((first >= threshold) != (second >= threshold)).astype(float), np.ones(len(first)))


def stratified(labels: Floats, logits: Floats, degrees: NDArray[np.int64]) -> dict[str, Weighted]:
    """Return the average precision by degree in the training split, of strata that hold both kinds of pairs.

    Args:
        labels: 1 or 0 [num_pairs].
        logits: The model's.
        degrees: Degree of the rarer of a pair's two proteins.
    """
    found = {}
    for name, least, most in STRATA:
        chosen = np.flatnonzero((degrees >= least) & (degrees <= (most if most is not None else degrees.max())))
        if len(np.unique(labels[chosen])) == 2:
            found[f"aupr_{name}"] = _of_part(average_precision(labels[chosen], logits[chosen]), chosen)
    return found


def _of_part(metric: Weighted, chosen: NDArray[np.int64]) -> Weighted:
    return lambda weights: metric(weights[chosen])
