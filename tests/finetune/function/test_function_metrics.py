"""The grid against scikit-learn over the pairs that count, and the whole evaluation of a scorer."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn

from megaprot.common.errors import InputError
from megaprot.finetune.function import function_metrics
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.function_metrics import (
    CELLS,
    FunctionScores,
    best_thresholds,
    cell_metrics,
    definitions,
    evaluate,
    four_way_grid,
)
from megaprot.finetune.function.ontology import ASPECTS
from megaprot.finetune.function.splits import TEST, TRAIN, VALID, FunctionSplit, split_data
from tests.finetune.function.test_splits import CONFIG, drawn_data

THRESHOLDS = {"BPO": 0.3, "CCO": 0.5, "MFO": 0.7}


@cache
def drawn(folder: Path) -> tuple[FunctionData, FunctionSplit]:
    data = drawn_data(folder)
    return data, split_data(data, CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FunctionData:
    return drawn(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> FunctionSplit:
    return drawn(tmp_path_factory.getbasetemp())[1]


def scorer(data: FunctionData, proteins: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Scores with ties that know something of the labels."""
    random = np.random.default_rng(int(proteins.sum() + terms.sum()))
    labels = data.labels.toarray()[np.ix_(proteins, terms)]
    return np.clip(random.choice([0.1, 0.2, 0.4, 0.6, 0.8], labels.shape) + 0.15 * labels, 0, 1).astype(np.float32)


def scored(data: FunctionData, proteins: np.ndarray, terms: np.ndarray) -> FunctionScores:
    return FunctionScores.empty(data, proteins, terms).with_scores(scorer(data, proteins, terms))


def naive_cell(
    data: FunctionData, scores: np.ndarray, proteins: np.ndarray, terms: np.ndarray, namespace: str
) -> dict[str, float]:
    """The metrics of a cell term by term and pair by pair."""
    labels, ontology = data.labels.toarray(), data.ontology
    pairs: list[tuple[bool, float, bool]] = []
    by_term: list[tuple[float, ...]] = []
    for column, term in enumerate(terms):
        of = ontology.namespaces[term]
        if ontology.is_root[term] or namespace not in ("all", ASPECTS[of]):
            continue
        own = [
            (bool(labels[protein, term]), float(scores[row, column]),
             bool(scores[row, column] >= np.float32(THRESHOLDS[ASPECTS[of]])))
            for row, protein in enumerate(proteins)
            if (labels[protein] & (ontology.namespaces == of) & ~ontology.is_root).any()
        ]  # fmt: skip
        pairs += own
        true, score, predicted = (np.array(values) for values in zip(*own, strict=True))
        if true.sum() >= 3 and not true.all():
            by_term.append((
                sklearn.roc_auc_score(true, score), sklearn.average_precision_score(true, score),
                *(of_pairs(true, predicted, zero_division=0) for of_pairs in
                  (sklearn.f1_score, sklearn.precision_score, sklearn.recall_score))))  # fmt: skip
    true, score, predicted = (np.array(values) for values in zip(*pairs, strict=True))
    pooled = (sklearn.roc_auc_score(true, score), sklearn.average_precision_score(true, score),
              sklearn.f1_score(true, predicted), sklearn.precision_score(true, predicted),
              sklearn.recall_score(true, predicted))  # fmt: skip
    names = ("auroc", "aupr", "f1", "precision", "recall")
    found: dict[str, Any] = {f"pooled_{name}": value for name, value in zip(names, pooled, strict=True)}
    means = np.mean(by_term, axis=0) if by_term else [math.nan] * 5
    found |= {f"macro_{name}": value for name, value in zip(names, means, strict=True)}
    return found | {"num_pairs": len(true), "num_positives": true.sum(), "num_terms_in_macro": len(by_term)}


def test_the_grid_is_scikit_learns_cell_by_cell(data: FunctionData, split: FunctionSplit) -> None:
    terms = split.terms_of(TEST)
    seen, unseen = split.sample_of_seen(50), split.numbers_of(TEST)
    grid = four_way_grid(scored(data, seen, terms), scored(data, unseen, terms), split, THRESHOLDS, least_positives=3)
    assert tuple(grid) == CELLS
    for cell, by_namespace in grid.items():
        proteins = unseen if cell.startswith("unseen") else seen
        wanted = split.is_seen[terms] == cell.endswith("_seen_term")
        scores = scorer(data, proteins, terms)[:, wanted]
        for namespace, values in by_namespace.items():
            expected = naive_cell(data, scores, proteins, terms[wanted], namespace)
            assert values == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_blocks_filled_one_after_another_are_the_whole(
    data: FunctionData, split: FunctionSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    proteins, terms = split.numbers_of(TRAIN), split.terms_of(VALID)
    whole = scored(data, proteins, terms)
    filled = FunctionScores.empty(data, proteins, terms)
    everything = np.arange(len(proteins)), np.arange(len(terms))
    with pytest.raises(InputError, match="scores of some proteins are missing or nan"):
        cell_metrics(filled, *everything, THRESHOLDS)
    for first in range(0, len(proteins), 7):
        filled.fill(first, whole.scores[first : first + 7])
    expected = cell_metrics(whole, *everything, THRESHOLDS)
    monkeypatch.setattr(function_metrics, "_ROWS", 11)
    for namespace, values in cell_metrics(filled, *everything, THRESHOLDS).items():
        assert values == pytest.approx(expected[namespace], nan_ok=True)


def test_thresholds_are_those_of_the_best_pooled_f1(data: FunctionData, split: FunctionSplit) -> None:
    proteins, terms = split.numbers_of(VALID), np.flatnonzero(split.is_seen)
    found = best_thresholds(scored(data, proteins, terms))
    everything = np.arange(len(proteins)), np.arange(len(terms))
    best = cell_metrics(scored(data, proteins, terms), *everything, found)
    for aspect in ASPECTS:
        for threshold in (0.1, 0.25, 0.4, 0.55, 0.6, 0.75, 0.8, 0.95):
            other = cell_metrics(scored(data, proteins, terms), *everything, found | {aspect: threshold})
            assert other[aspect]["pooled_f1"] <= best[aspect]["pooled_f1"] + 1e-12


def test_scores_without_the_protein_have_a_macro_auroc_of_one_half(data: FunctionData, split: FunctionSplit) -> None:
    proteins, terms = split.numbers_of(TRAIN), split.terms_of(TEST)
    blind = FunctionScores.empty(data, proteins, terms).with_scores(np.linspace(0, 1, len(terms)))
    found = cell_metrics(blind, np.arange(len(proteins)), np.arange(len(terms)), THRESHOLDS)
    assert found["all"]["num_terms_in_macro"] > 3
    assert found["all"]["macro_auroc"] == pytest.approx(0.5)


def test_an_evaluation_has_all_parts_and_all_metrics_are_defined(data: FunctionData, split: FunctionSplit) -> None:
    found = evaluate(data, split, lambda proteins, terms: scorer(data, proteins, terms))
    assert set(found["thresholds"]) == set(found["protein_centric"]) == set(ASPECTS)
    metrics = {name for by_namespace in found["grid"].values() for values in by_namespace.values() for name in values}
    metrics |= {name for values in found["protein_centric"].values() for name in values}
    assert {name for name in metrics if not name.startswith("num_") and "threshold" not in name} == set(definitions())
    labels = data.labels.toarray()
    truth = evaluate(data, split, lambda proteins, terms: labels[np.ix_(proteins, terms)].astype(np.float32))
    assert truth["protein_centric"]["BPO"]["fmax"] == 1 and truth["protein_centric"]["BPO"]["smin"] == 0
    assert truth["grid"]["unseen_protein_seen_term"]["all"]["pooled_aupr"] == 1


def test_a_split_without_unseen_terms_has_empty_cells(data: FunctionData) -> None:
    split = split_data(data, replace(CONFIG, unseen_terms=0.0, test_proteins=0.3))
    found = evaluate(data, split, lambda proteins, terms: scorer(data, proteins, terms))
    cell = found["grid"]["unseen_protein_unseen_term"]["all"]
    assert cell["num_terms_in_macro"] == 0 and math.isnan(cell["macro_auroc"])
