"""AUROC, average precision and the best F1 against scikit-learn, with ties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from megaprot.finetune.function.ranking import auroc_and_aupr, best_f1

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.50001, 0.75, 1.0]), min_size=1, max_size=20)


@given(SCORES, SCORES)
def test_areas_are_scikit_learns(positives: list[float], negatives: list[float]) -> None:
    scores = np.array(positives + negatives, dtype=np.float32)
    labels = np.arange(len(scores)) < len(positives)
    found = auroc_and_aupr(scores[labels], scores[~labels])
    expected = sklearn.roc_auc_score(labels, scores), sklearn.average_precision_score(labels, scores)
    assert found == pytest.approx(expected, abs=1e-12)


@given(SCORES, SCORES)
def test_the_best_f1_is_the_largest_of_all_thresholds(positives: list[float], negatives: list[float]) -> None:
    scores = np.array(positives + negatives, dtype=np.float32)
    labels = np.arange(len(scores)) < len(positives)
    largest = max(sklearn.f1_score(labels, scores >= threshold) for threshold in np.unique(scores))
    f1, threshold = best_f1(scores[labels], scores[~labels])
    assert f1 == pytest.approx(largest)
    assert sklearn.f1_score(labels, scores >= np.float32(threshold)) == pytest.approx(f1)


def test_without_positives_or_negatives_there_is_no_area() -> None:
    some, none = np.ones(3, dtype=np.float32), np.empty(0, dtype=np.float32)
    assert all(map(math.isnan, auroc_and_aupr(some, none) + auroc_and_aupr(none, some)))
    assert best_f1(none, some) == (0.0, math.inf)
    assert best_f1(some, none) == (1.0, 1.0)
