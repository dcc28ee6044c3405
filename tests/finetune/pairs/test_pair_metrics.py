"""Metrics of pairs against scikit-learn and loops; weights against pairs written out as often as they count."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve as sklearn_calibration

from megaprot.finetune import figures
from megaprot.finetune.pairs.metrics import (
    DEFINITIONS,
    average_precision,
    best_threshold,
    calibration_error,
    decisions,
    order_flips,
    pair_metrics,
    stratified,
    temperature,
)

SCORES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1e-9, 0.5, 3.0]), min_size=4, max_size=40)


def drawn(seed: int, num_pairs: int = 200, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits that know something of them, and how often each pair counts."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, num_pairs).astype(float)
    logits = labels + random.normal(0, 1.5, num_pairs)
    return labels, logits.round(1) if ties else logits, random.integers(0, 4, num_pairs)


def by_scikit_learn(labels: np.ndarray, logits: np.ndarray, threshold: float) -> dict[str, float]:
    called = logits >= threshold
    return {
        "aupr": sklearn.average_precision_score(labels, logits),
        "auroc": sklearn.roc_auc_score(labels, logits),
        "mcc": sklearn.matthews_corrcoef(labels, called),
        "f1": sklearn.f1_score(labels, called),
        "precision": sklearn.precision_score(labels, called, zero_division=0),
        "recall": sklearn.recall_score(labels, called),
        "accuracy": sklearn.accuracy_score(labels, called),
    }


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_scikit_learns_also_with_weights(seed: int) -> None:
    labels, logits, counts = drawn(seed, ties=seed % 2 == 0)
    found = pair_metrics(labels, logits, 0.3)
    for weights, written in ((np.ones(200), (labels, logits)),
                             (counts.astype(float), (labels.repeat(counts), logits.repeat(counts)))):  # fmt: skip
        for name, value in by_scikit_learn(*written, 0.3).items():
            assert found[name](weights) == pytest.approx(value, abs=1e-12), name


@given(SCORES, st.data())
@settings(max_examples=60)
def test_ties_and_weights_of_zero_are_as_in_scikit_learn(scores: list[float], data: st.DataObject) -> None:
    num_pairs = len(scores)
    labels = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=num_pairs, max_size=num_pairs)))
    labels[:2] = 0, 1
    counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=num_pairs, max_size=num_pairs)))
    counts[:2] = np.maximum(counts[:2], 1)
    logits, weights = np.array(scores), counts.astype(float)
    found = pair_metrics(labels, logits, 0.0)
    for name, value in by_scikit_learn(labels.repeat(counts), logits.repeat(counts), 0.0).items():
        assert found[name](weights) == pytest.approx(value, abs=1e-12), name


def test_what_cannot_be_measured_is_nan_or_zero() -> None:
    labels, logits, _ = drawn(0)
    found = pair_metrics(labels, logits, 100.0)
    assert [found[name](np.ones(200)) for name in ("mcc", "f1", "precision", "recall")] == [0.0] * 4
    assert math.isnan(found["aupr"](1 - labels))
    assert math.isnan(found["auroc"](labels))


def test_calibration_error_by_hand() -> None:
    # Bins of 1/15: the first holds 0.0 and 0.05, the eighth 0.5, the last 0.95 and 1.0.
    probabilities, labels = np.array([0.0, 0.05, 0.5, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    metric = calibration_error(labels, probabilities)
    assert metric(np.ones(5)) == pytest.approx((0.95 + 0.5 + 0.05) / 5)
    assert metric(np.array([0, 0, 2.0, 0, 0])) == pytest.approx(0.5)


def test_the_threshold_is_that_of_a_search_over_all_cuts() -> None:
    labels, logits, _ = drawn(7)
    threshold = best_threshold(labels, logits)
    best = max(sklearn.matthews_corrcoef(labels, logits >= cut) for cut in np.unique(logits))
    assert sklearn.matthews_corrcoef(labels, logits >= threshold) == pytest.approx(best)
    assert threshold not in logits  # midway, so that rounding does not move a pair over it
    assert best_threshold(labels, np.ones(200)) == 0.0
    assert best_threshold(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == 1.5


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_temperature_undoes_a_scale(true: float) -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, 40_000)
    labels = (random.random(40_000) < expit(logits)).astype(float)
    found = temperature(labels, logits * true)
    assert found == pytest.approx(true, rel=0.05)
    scaled = pair_metrics(labels, logits * true, 0.0, found)
    assert scaled["ece"](np.ones(40_000)) < 0.015
    if true != 1.0:
        assert scaled["ece_unscaled"](np.ones(40_000)) > 0.05


def test_order_flips_count_decisions_that_differ() -> None:
    first, second = np.array([0.1, 0.4, 0.9, 0.2]), np.array([0.2, 0.6, 0.1, 0.1])
    assert order_flips(first, second, 0.5)(np.ones(4)) == 0.5
    assert order_flips(first, second, 0.5)(np.array([2.0, 1.0, 0.0, 1.0])) == 0.25


def test_strata_are_measured_apart() -> None:
    labels, logits, counts = drawn(3)
    degrees = np.random.default_rng(0).choice([0, 1, 5, 6, 20, 21, 400], 200)
    labels[degrees > 20] = 1.0  # one kind only: nothing to rank
    found = stratified(labels, logits, degrees)
    assert list(found) == ["aupr_degree_0", "aupr_degree_1_to_5", "aupr_degree_6_to_20"]
    chosen = (degrees >= 1) & (degrees <= 5)
    written = (values[chosen].repeat(counts[chosen]) for values in (labels, logits))
    expected = sklearn.average_precision_score(*written)
    assert found["aupr_degree_1_to_5"](counts.astype(float)) == pytest.approx(expected)


def test_all_metrics_are_defined_and_fast_enough_for_a_bootstrap() -> None:
    labels, logits, _ = drawn(5, 55_000, ties=False)
    degrees = np.random.default_rng(0).integers(0, 30, 55_000)
    found = pair_metrics(labels, logits, 0.0) | stratified(labels, logits, degrees)
    assert found.keys() <= DEFINITIONS.keys()
    weights = np.random.default_rng(0).integers(0, 3, 55_000).astype(float)
    start = time.process_time()
    for _ in range(5):
        for metric in found.values():
            metric(weights)
    assert (time.process_time() - start) / 5 < 0.1  # 1,000 samples in well under two minutes, on a slow core


def test_decisions_of_nothing_called() -> None:
    found = decisions(np.array([1.0, 0.0]), np.array([False, False]))
    assert found["accuracy"](np.ones(2)) == 0.5
    assert average_precision(np.array([0.0, 1.0]), np.array([2.0, 1.0]))(np.ones(2)) == 0.5


def test_curves_and_reliability_show_what_was_measured() -> None:
    labels, logits, _ = drawn(2)
    ranking = figures.ranking(labels, {"model": logits, "other": np.zeros(200)})
    precision, recall, _ = sklearn.precision_recall_curve(labels, logits)
    drawn_recall, drawn_precision = ranking.axes[0].lines[0].get_data()
    assert drawn_precision == pytest.approx(precision[:-1][::-1])
    assert drawn_recall == pytest.approx(recall[:-1][::-1])
    assert [line.get_marker() for line in ranking.axes[0].lines[:2]] == ["", "o"]  # one score for all is a point
    false, true, _ = sklearn.roc_curve(labels, logits, drop_intermediate=False)
    assert np.stack(ranking.axes[1].lines[0].get_data()) == pytest.approx(np.stack((false, true)))
    reliability = figures.reliability(labels, expit(logits), expit(logits / 3))
    shares, means = sklearn_calibration(labels, expit(logits), n_bins=15)
    assert np.stack(reliability.axes[0].lines[0].get_data()) == pytest.approx(np.stack((means, shares)))
