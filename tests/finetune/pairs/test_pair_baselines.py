"""Baselines against counts by hand, plain loops and scikit-learn."""

import json
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune.pairs import baselines as pair_baselines
from megaprot.finetune.pairs.baselines import NUM_KMERS, DegreeBaseline, KmerBaseline, PairBaselines
from megaprot.finetune.pairs.files import PairExample
from megaprot.finetune.pairs.metrics import average_precision, pair_metrics
from megaprot.finetune.pairs.proteins import ProteinIndex, counts_of, degrees_of, distinct, labels_of, protein_key
from megaprot.finetune.pairs.report import baseline_section
from megaprot.finetune.residues import encode
from tests.finetune.folders import random_proteins
from tests.finetune.pairs.pair_data import charged_proteins

ESM = get_vocabulary("esm")
CLASSES = ("AGV", "ILFP", "YMTS", "HNQW", "RK", "DE", "C")


def pairs_of(proteins: Sequence[bytes], members: Sequence[tuple[int, int, int]]) -> list[PairExample]:
    """Pairs (protein, protein, label); the same protein is another array each time, as from another file."""
    found = []
    for number, (one, other, label) in enumerate(members):
        both = encode(ESM, proteins[one]), encode(ESM, proteins[other])
        found.append(PairExample(number, number, f"p{one}", f"p{other}", *both, label))
    return found


def charged_pairs(num_pairs: int, seed: int) -> list[PairExample]:
    """Acidic proteins bind basic ones."""
    proteins = charged_proteins(12, longest=60)
    names = list(proteins)
    random = np.random.default_rng(seed)
    members = [random.choice(len(names), 2, replace=False).tolist() for _ in range(num_pairs)]
    return pairs_of(
        list(proteins.values()), [(one, other, int(names[one][0] != names[other][0])) for one, other in members]
    )


def test_degrees_count_pairs_of_both_kinds_whatever_the_order() -> None:
    proteins = random_proteins([20, 21, 22])
    pairs = pairs_of(proteins, [(0, 1, 1), (1, 0, 1), (0, 2, 0), (0, 1, 0)])
    degrees = degrees_of(distinct(pairs))
    keys = [protein_key(encode(ESM, protein)) for protein in proteins]
    assert [degrees[key] for key in keys] == [(1, 2), (1, 1), (0, 1)]
    other = pairs_of([proteins[2], random_proteins([9], 8)[0]], [(0, 1, 1)])  # other names, one protein known
    assert counts_of(degrees, other).tolist() == [[[0, 1], [0, 0]]]


def test_equal_sequences_are_one_protein() -> None:
    first, second = random_proteins([30, 31])
    index = ProteinIndex()
    places = index.places(pairs_of([first, second, first], [(0, 1, 1), (2, 1, 0), (1, 2, 0)]))
    assert places.tolist() == [[0, 1], [0, 1], [1, 0]]
    assert len(index.keys) == len(index.residues) == 2


def test_the_degree_baseline_by_hand() -> None:
    proteins = random_proteins([20, 21, 22, 23])
    train = pairs_of(proteins, [(0, 1, 1), (0, 2, 1), (1, 2, 0), (2, 1, 0)])
    baseline = DegreeBaseline.fit(distinct(train))  # 2 bind, 1 does not
    prior = np.array([2 / 3, 1 / 3]) * 2

    def odds(positive: int, negative: int) -> float:
        return float(np.log((positive + prior[0]) / (negative + prior[1])) - np.log(2))

    measured = pairs_of(proteins, [(0, 1, 1), (1, 0, 1), (0, 3, 0), (3, 3, 0)])
    expected = [odds(2, 0) + odds(1, 1)] * 2 + [odds(2, 0), 0.0]
    assert baseline.scores(measured) == pytest.approx(expected)


def naive_features(pair: PairExample, baseline: KmerBaseline) -> np.ndarray:
    """Sums and products of standardised square roots of shares of k-mers, letter by letter."""
    both = []
    kmers = ["".join(places) for places in product("0123456", repeat=3)]
    for residues in (pair.residues_first, pair.residues_second):
        letters = "".join(ESM.tokens[one] for one in residues)
        classes = "".join(next((str(n) for n, c in enumerate(CLASSES) if letter in c), "-") for letter in letters)
        found = [classes[place : place + 3] for place in range(len(classes) - 2)]
        found = [kmer for kmer in found if "-" not in kmer]
        shares = np.sqrt([found.count(kmer[::-1]) / max(len(found), 1) for kmer in kmers])  # the first is worth least
        both.append((shares - baseline.mean) / baseline.spread)
    return np.concatenate((both[0] + both[1], both[0] * both[1], [1.0]))


def test_kmer_scores_are_those_of_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    proteins = [*random_proteins([40, 3, 60]), b"MKXVACDXXX", b"AC"]
    pairs = pairs_of(proteins, [(0, 1, 1), (1, 2, 0), (3, 0, 1), (4, 2, 0)])
    baseline = KmerBaseline(*random.random((2, NUM_KMERS)), random.normal(size=2 * NUM_KMERS + 1))
    expected = [naive_features(pair, baseline) @ baseline.weights for pair in pairs]
    assert baseline.scores(pairs, ESM) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    swapped = pairs_of(proteins, [(1, 0, 1), (2, 1, 0), (0, 3, 1), (2, 4, 0)])
    assert baseline.scores(swapped, ESM) == pytest.approx(baseline.scores(pairs, ESM), abs=1e-6)


def test_kmer_weights_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_baselines, "_PENALTIES", (0.05,))
    monkeypatch.setattr(pair_baselines, "_STEPS", 500)
    train = charged_pairs(120, 1)
    found = KmerBaseline.fit(train, charged_pairs(40, 2), ESM)
    features = np.stack([naive_features(pair, found) for pair in train])
    expected = LogisticRegression(C=1 / (0.05 * len(train)), fit_intercept=False, max_iter=2000, tol=1e-8)
    expected.fit(features, labels_of(train))
    assert found.scores(train, ESM) == pytest.approx(features @ expected.coef_[0], abs=0.02)


def test_kmers_learn_what_charges_tell_and_survive_json() -> None:
    train, valid, test = (charged_pairs(size, seed) for seed, size in enumerate((300, 60, 80)))
    baselines = PairBaselines.fit(train, valid, ESM)
    restored = PairBaselines.restored(json.loads(json.dumps(baselines.state())))
    scores, again = baselines.scores(test, ESM), restored.scores(test, ESM)
    assert list(scores) == ["degree", "kmer"]
    for name, values in scores.items():
        assert again[name] == pytest.approx(values, abs=1e-4)
    assert average_precision(labels_of(test), scores["kmer"])(np.ones(80)) > 0.95


def test_a_baseline_that_is_not_clearly_beaten_is_named() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400).astype(float)
    good, weak = (pair_metrics(labels, labels * scale + random.normal(size=400), 0.5) for scale in (2.0, 0.2))
    section = baseline_section(good, {"weak": weak, "same": good}, 400)
    ones = np.ones(400)
    gain = section.numbers["weak"]["aupr_gain"]
    assert gain["value"] == pytest.approx(good["aupr"](ones) - weak["aupr"](ones))
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert section.numbers["same"]["aupr_gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert section.numbers["weak"]["mcc"]["value"] == pytest.approx(weak["mcc"](ones))
    named = [note for note in section.notes if "does not clearly beat" in note]
    assert named == ["The model does not clearly beat the baseline same."]
    assert [row[0] for row in section.rows] == ["model", "weak", "same"]
    assert "No baseline is known" in baseline_section(good, {}, 400).notes[0]
