"""Metrics over whole splits, each a function of how often every protein counts, so that one bootstrap serves all.

A bootstrap sample draws proteins with replacement; a metric of it is the same formula with each protein's count as its
weight (Efron 1979). Intervals are the 2.5 % and 97.5 % quantiles. Residues and residue pairs are drawn with their
protein, since they are not independent within it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Weighted = Callable[[Floats], float]
"""A metric of the proteins' weights, float64 [num_proteins]."""
NUM_SAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """A number over a split and its 95 % bootstrap interval over proteins."""

    value: float
    low: float
    high: float


def with_intervals(
    metrics: Mapping[str, Weighted], num_proteins: int, num_samples: int = NUM_SAMPLES
) -> dict[str, Metric]:
    """Return each metric over all proteins, with intervals of a bootstrap of fixed seed.

    Args:
        metrics: {name: metric of the weights}.
        num_proteins: Length of the weights.
        num_samples: Bootstrap samples; 0 gives the value alone (low and high equal to it).
    """
    ones = np.ones(num_proteins)
    values = {name: metric(ones) for name, metric in metrics.items()}
    random = np.random.default_rng(0)
    samples: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(num_samples):
        weights = np.bincount(random.integers(num_proteins, size=num_proteins), minlength=num_proteins).astype(float)
        for name, metric in metrics.items():
            samples[name].append(metric(weights))
    return {name: Metric(value, *_interval(samples[name], value)) for name, value in values.items()}


def _interval(samples: list[float], value: float) -> tuple[float, float]:
    finite = [sample for sample in samples if np.isfinite(sample)]
    if not finite:
        return value, value
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def ratio(parts: Floats, wholes: Floats) -> Weighted:
    """Return the metric sum(parts) / sum(wholes): micro-averaged accuracy, precision, mean errors."""

    def metric(weights: Floats) -> float:
        total = float(weights @ wholes)
        return float(weights @ parts) / total if total else float("nan")

    return metric


def mean_ratio(parts: Floats, wholes: Floats) -> Weighted:
    """Return the metric mean(parts / wholes) over proteins that have any ``wholes``: macro-averages."""
    has_any = wholes > 0
    return ratio(np.where(has_any, parts / np.where(has_any, wholes, 1), 0.0), has_any.astype(float))


def pearson(first: Floats, second: Floats) -> Weighted:
    """Return Pearson's correlation; nan where either is constant."""

    def metric(weights: Floats) -> float:
        return _correlation(first, second, weights)

    return metric


def spearman(first: Floats, second: Floats) -> Weighted:
    """Return Spearman's rank correlation, ties given their mean rank; nan where either is constant."""
    ranked = [np.unique(values, return_inverse=True)[1] for values in (first, second)]

    def metric(weights: Floats) -> float:
        ranks = []
        for groups in ranked:
            counts = np.bincount(groups, weights)
            ranks.append((np.cumsum(counts) - counts / 2)[groups])
        return _correlation(ranks[0], ranks[1], weights)

    return metric


def _correlation(first: Floats, second: Floats, weights: Floats) -> float:
    total = weights.sum()
    left, right = first - weights @ first / total, second - weights @ second / total
    spread = np.sqrt((weights @ left**2) * (weights @ right**2))
    return float(weights @ (left * right) / spread) if spread > 0 else float("nan")


def f1(confusion: NDArray[np.float64], of_class: int) -> Weighted:
    """Return the F1 of one class; 0 where it is neither there nor predicted.

    Args:
        confusion: Counts [num_proteins, true classes, predicted classes] of each protein.
        of_class: The class.
    """
    hits = confusion[:, of_class, of_class]
    return ratio_or_zero(2 * hits, confusion[:, of_class, :].sum(axis=1) + confusion[:, :, of_class].sum(axis=1))


def ratio_or_zero(parts: Floats, wholes: Floats) -> Weighted:
    """Return :func:`ratio` with 0 in place of nan."""
    inner = ratio(parts, wholes)
    return lambda weights: float(np.nan_to_num(inner(weights)))


def mean_of(metrics: list[Weighted]) -> Weighted:
    """Return the plain mean of metrics, such as the F1 of all classes."""
    return lambda weights: float(np.mean([metric(weights) for metric in metrics]))


def macro_f1(labels: NDArray[np.int64], predictions: NDArray[np.int64], num_classes: int) -> Weighted:
    """Return the mean F1 over the classes that occur as label or prediction, for one label a protein."""

    def metric(weights: Floats) -> float:
        true = np.bincount(labels, weights, num_classes)
        predicted = np.bincount(predictions, weights, num_classes)
        hits = np.bincount(labels, weights * (labels == predictions), num_classes)
        occurs = true + predicted > 0
        return float((2 * hits[occurs] / (true + predicted)[occurs]).mean())

    return metric
