"""Fmax and Smin against loops over proteins and thresholds, and examples worked by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.finetune.function.protein_centric import ProteinCentric
from tests.finetune.function.ontologies import (
    Terms,
    matrix,
    naive_content,
    ontology_of,
    propagated,
    random_annotations,
    random_terms,
)

CHAIN: Terms = {
    "GO:0000000": (0, {}),
    "GO:0000001": (0, {"GO:0000000": "is_a"}),
    "GO:0000002": (0, {"GO:0000001": "is_a"}),
    "GO:0000003": (0, {"GO:0000000": "is_a"}),
}


def naive(
    predictions: list[dict[str, float]], truths: list[set[str]], content: dict[str, float], wanted: set[str]
) -> tuple[float, float]:
    """Fmax and Smin of a namespace's terms, as Radivojac et al. define them."""
    pairs = [(scores, true & wanted) for scores, true in zip(predictions, truths, strict=True) if true & wanted]
    best, least = 0.0, math.inf
    for step in range(1, 101):
        precisions, recalls, missed, wrong = [], [], 0.0, 0.0
        for scores, true in pairs:
            predicted = {term for term in wanted if scores[term] >= np.float32(step / 100)}
            if predicted:
                precisions.append(len(predicted & true) / len(predicted))
            recalls.append(len(predicted & true) / len(true))
            missed += sum(content[term] for term in true - predicted)
            wrong += sum(content[term] for term in predicted - true)
        precision, recall = (sum(values) / len(values) if values else 0.0 for values in (precisions, recalls))
        if precision + recall:
            best = max(best, 2 * precision * recall / (precision + recall))
        if pairs:
            least = min(least, math.hypot(missed / len(pairs), wrong / len(pairs)))
    return best, least


@given(st.integers(0, 10_000))
def test_fmax_and_smin_are_those_of_naive_loops(tmp_path: Path, seed: int) -> None:
    terms = random_terms(seed, 25)
    ontology = ontology_of(tmp_path, terms)
    annotations = random_annotations(seed, terms, 12)
    labels = ontology.propagate(matrix(ontology, annotations))
    truths = propagated(terms, annotations)
    random = np.random.default_rng(seed)
    scores = random.choice([0.0, 0.005, 0.01, 0.3, 0.305, 0.99, 1.0], (12, len(ontology))).astype(np.float32)
    scores = ontology.make_consistent(scores * (random.random(scores.shape) < 0.3))
    content = naive_content(terms, truths)
    centric = ProteinCentric(ontology, np.arange(len(ontology)), ontology.information_content(labels))
    centric.add(scores[:5], labels.toarray()[:5])  # blocks of proteins
    centric.add(scores[5:], labels.toarray()[5:])
    predictions = [dict(zip(ontology.terms, row, strict=True)) for row in scores]
    weights = random.integers(0, 3, 12)
    for namespace in range(3):
        wanted = {term for term, (of, parents) in terms.items() if of == namespace and term[-4:] > "0002"}
        result = centric.at_best(namespace)
        fmax, smin = naive(predictions, truths, content, wanted)
        assert result.num_proteins == sum(bool(true & wanted) for true in truths)
        if result.num_proteins:
            assert (result.fmax, result.smin) == pytest.approx((fmax, smin), abs=1e-9)
            assert centric.fmax(namespace)(np.ones(12)) == pytest.approx(fmax, abs=1e-9)
            assert centric.smin(namespace)(np.ones(12)) == pytest.approx(smin, abs=1e-9)
        else:
            assert math.isnan(result.fmax) and math.isnan(result.smin)
            assert math.isnan(centric.fmax(namespace)(np.ones(12))) and math.isnan(centric.smin(namespace)(np.ones(12)))
        written = [place for place in range(12) for _ in range(weights[place])]
        fmax, smin = naive([predictions[p] for p in written], [truths[p] for p in written], content, wanted)
        if math.isfinite(smin):  # a protein's weight is how often it counts
            assert centric.fmax(namespace)(weights.astype(float)) == pytest.approx(fmax, abs=1e-9)
            assert centric.smin(namespace)(weights.astype(float)) == pytest.approx(smin, abs=1e-9)


def test_fmax_and_smin_by_hand(tmp_path: Path) -> None:
    ontology = ontology_of(tmp_path, CHAIN)
    assert ontology.terms == ("GO:0000000", "GO:0000001", "GO:0000003", "GO:0000002")
    labels = np.array([[1, 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=bool)  # the last has a root alone: not counted
    scores = np.array([[1, 0.9, 0.5, 0.4], [1, 0.6, 0.2, 0], [1, 1, 1, 1]], dtype=np.float32)
    centric = ProteinCentric(ontology, np.arange(4), np.array([0.0, 1.0, 3.0, 2.0]))
    centric.add(scores, labels)
    result = centric.at_best(0)
    # Up to 0.20: precision (2/3 + 1/2) / 2 = 7/12, recall (1 + 1) / 2 = 1, F1 14/19. Above it is less.
    assert (result.fmax, result.fmax_threshold, result.num_proteins) == (pytest.approx(14 / 19), 0.01, 2)
    # Up to 0.20 nothing is missed, and 3 + 1 bits are wrongly predicted over two proteins; from 0.61 on 2 and 3 bits
    # are missed and none wrong, which is 2.5.
    assert (result.smin, result.smin_threshold) == (pytest.approx(2.0), 0.01)


def test_only_some_terms_may_be_scored(tmp_path: Path) -> None:
    ontology = ontology_of(tmp_path, CHAIN)
    centric = ProteinCentric(ontology, np.array([1, 3]), np.array([0.0, 1.0, 3.0, 2.0]))
    centric.add(np.array([[0.8, 0.3]], dtype=np.float32), np.array([[True, False]]))
    result = centric.at_best(0)
    assert (result.fmax, result.fmax_threshold, result.smin, result.smin_threshold) == (1.0, 0.31, 0.0, 0.31)
    assert centric.at_best(1).num_proteins == 0
