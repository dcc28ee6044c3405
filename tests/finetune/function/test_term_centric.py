"""Areas of each term against scikit-learn, weights against proteins written out as often as they count."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from megaprot.finetune.function.term_centric import TermCentric


@given(st.integers(0, 10_000))
def test_areas_are_scikit_learns_also_with_weights(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.choice([0.1, 0.5, 0.50001, 0.9], (15, 4)).astype(np.float32)
    labels, counts = random.random((15, 4)) < 0.4, random.random((15, 4)) < 0.8
    weights = random.integers(0, 3, 15)
    centric = TermCentric(scores, labels, counts)
    expected = []
    for term in range(4):
        rows = np.flatnonzero(counts[:, term]).repeat(weights[counts[:, term]])
        true, score = labels[rows, term], scores[rows, term]
        has_both = len(set(true.tolist())) == 2
        expected.append([sklearn.roc_auc_score(true, score), sklearn.average_precision_score(true, score)]
                        if has_both else [math.nan, math.nan])  # fmt: skip
    areas = centric.areas(weights.astype(float))
    np.testing.assert_allclose(areas.T, expected, atol=1e-12)
    if np.isfinite(areas).any():
        assert centric.macro_auroc(weights.astype(float)) == pytest.approx(np.nanmean(areas[0]))
        assert centric.macro_aupr(weights.astype(float)) == pytest.approx(np.nanmean(areas[1]))


def test_without_terms_there_is_no_mean() -> None:
    nothing = np.empty((3, 0), dtype=bool)
    centric = TermCentric(nothing.astype(np.float32), nothing, nothing)
    assert centric.areas(np.ones(3)).shape == (2, 0)
    assert math.isnan(centric.macro_auroc(np.ones(3)))
