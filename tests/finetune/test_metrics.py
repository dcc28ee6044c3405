"""Metrics against scikit-learn, scipy and naive loops; weights against proteins written out as often as they count."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn

from megaprot.finetune.metrics import (
    f1,
    macro_f1,
    mean_of,
    mean_ratio,
    pearson,
    ratio,
    ratio_or_zero,
    spearman,
    with_intervals,
)

FEW_VALUES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0 + 1e-9, -3.0]), min_size=3, max_size=30)


def drawn(seed: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two series with ties, and how often each entry counts."""
    random = np.random.default_rng(seed)
    first = random.integers(0, length // 2, length).astype(float)
    return first, first + random.normal(0, length / 4, length).round(), random.integers(0, 4, length)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys_also_with_weights(seed: int) -> None:
    first, second, counts = drawn(seed, 40)
    ones = np.ones(40)
    assert spearman(first, second)(ones) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
    assert pearson(first, second)(ones) == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-12)
    written = first.repeat(counts), second.repeat(counts)
    weights = counts.astype(float)
    assert spearman(first, second)(weights) == pytest.approx(stats.spearmanr(*written).statistic, abs=1e-12)
    assert pearson(first, second)(weights) == pytest.approx(stats.pearsonr(*written).statistic, abs=1e-12)


@given(FEW_VALUES, st.randoms(use_true_random=False))
def test_ties_have_their_mean_rank(values: list[float], shuffle: np.random.Generator) -> None:
    other = values.copy()
    shuffle.shuffle(other)  # type: ignore[arg-type]
    found = spearman(np.array(values), np.array(other))(np.ones(len(values)))
    if len(set(values)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(stats.spearmanr(values, other).statistic, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_f1_is_scikit_learns(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels, predictions = random.integers(0, 5, (2, 60))
    labels[labels == 4] = 3  # class 4 is predicted but never true
    predictions[predictions == 0] = 1  # class 0 is never predicted
    confusion = np.zeros((60, 5, 5))
    confusion[np.arange(60), labels, predictions] = 1
    expected = sklearn.f1_score(labels, predictions, average=None, labels=range(5), zero_division=0)
    scores = [f1(confusion, number) for number in range(5)]
    assert [score(np.ones(60)) for score in scores] == pytest.approx(list(expected))
    assert mean_of(scores)(np.ones(60)) == pytest.approx(expected.mean())
    macro = sklearn.f1_score(labels, predictions, average="macro")
    assert macro_f1(labels, predictions, 5)(np.ones(60)) == pytest.approx(macro)
    assert macro_f1(labels, predictions, 900)(np.ones(60)) == pytest.approx(macro)  # classes that never occur


def test_a_class_that_never_occurs_has_an_f1_of_zero() -> None:
    assert f1(np.zeros((2, 3, 3)), 1)(np.ones(2)) == 0.0
    assert ratio_or_zero(np.zeros(2), np.zeros(2))(np.ones(2)) == 0.0
    assert math.isnan(ratio(np.zeros(2), np.zeros(2))(np.ones(2)))


def test_micro_and_macro_averages_by_hand() -> None:
    hits, totals = np.array([1.0, 8.0, 0.0]), np.array([2.0, 10.0, 0.0])
    assert ratio(hits, totals)(np.ones(3)) == 9 / 12
    assert mean_ratio(hits, totals)(np.ones(3)) == (0.5 + 0.8) / 2  # a protein without labels is no 0
    assert ratio(hits, totals)(np.array([2.0, 1.0, 5.0])) == 10 / 14
    assert mean_ratio(hits, totals)(np.array([2.0, 1.0, 5.0])) == pytest.approx((0.5 + 0.5 + 0.8) / 3)


def test_intervals_hold_the_true_mean_as_often_as_they_claim() -> None:
    random, covered = np.random.default_rng(1), 0
    for _ in range(200):
        values = random.normal(1.0, 2.0, 60)
        found = with_intervals({"mean": ratio(values, np.ones(60))}, 60, 200)["mean"]
        assert found.low < found.value < found.high
        covered += found.low <= 1.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_same_split_has_the_same_interval() -> None:
    values = np.arange(20.0)
    metrics = {"mean": ratio(values, np.ones(20))}
    assert with_intervals(metrics, 20) == with_intervals(metrics, 20)
    alone = with_intervals(metrics, 20, 0)["mean"]
    assert (alone.value, alone.low, alone.high) == (9.5, 9.5, 9.5)
