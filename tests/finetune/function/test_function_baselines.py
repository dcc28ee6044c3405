"""The baselines against loops over neighbours and over the graph."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaprot.common.errors import InputError
from megaprot.finetune.function import function_baselines
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.function_baselines import baselines, inherited
from megaprot.finetune.function.splits import TEST, TRAIN, FunctionSplit, split_data
from tests.finetune.function.ontologies import Terms, ontology_of
from tests.finetune.function.test_clusters import kmers
from tests.finetune.function.test_splits import CONFIG, drawn_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FunctionData:
    return drawn_data(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def split(data: FunctionData) -> FunctionSplit:
    return split_data(data, replace(CONFIG, identity=1.0))  # so that test proteins have neighbours


def test_blind_baselines_are_frequency_and_number_of_descendants(data: FunctionData, split: FunctionSplit) -> None:
    found = baselines(data, split)
    train, terms = split.numbers_of(TRAIN), np.flatnonzero(split.is_seen)
    frequency = found["term_frequency"](split.numbers_of(TEST), terms)
    assert frequency.shape == (len(split.numbers_of(TEST)), len(terms))
    assert (frequency == frequency[0]).all()
    assert frequency[0] == pytest.approx(data.labels.toarray()[np.ix_(train, terms)].mean(axis=0))
    below = found["num_descendants"](train[:1], terms)[0]
    assert (np.argsort(below, kind="stable") == np.argsort(data.ontology.num_descendants[terms], kind="stable")).all()
    assert below.max() == 1 and below.min() > 0


def naive_votes(data: FunctionData, split: FunctionSplit, protein: int, count: int) -> np.ndarray:
    """The share of the votes of the nearest training proteins that each seen term gets."""
    own = kmers(data.sequences[protein])
    weights = {}
    for other in split.numbers_of(TRAIN).tolist():
        theirs = kmers(data.sequences[other])
        shared = len(own & theirs)
        if other != protein and shared >= 2 and shared / min(len(own), len(theirs)) >= 0.4**5:
            weights[other] = shared / len(own | theirs)
    chosen = sorted(weights, key=lambda other: (-weights[other], other))[:count]
    labels = data.labels.toarray()[:, split.is_seen].astype(float)
    if not chosen:
        return labels[split.numbers_of(TRAIN)].mean(axis=0)
    return sum(weights[other] * labels[other] for other in chosen) / sum(weights[other] for other in chosen)


@pytest.mark.parametrize("count", [2, 10])
def test_nearest_neighbours_vote_by_their_likeness(
    data: FunctionData, split: FunctionSplit, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(function_baselines, "_NUM_NEIGHBOURS", count)
    monkeypatch.setattr(function_baselines, "_ROWS", 7)
    proteins = np.concatenate((split.numbers_of(TEST), split.numbers_of(TRAIN)[:10]))
    found = baselines(data, split)["nearest_neighbours"](proteins, np.flatnonzero(split.is_seen))
    expected = np.array([naive_votes(data, split, protein, count) for protein in proteins.tolist()])
    # Seen descendants of unseen terms may lift a seen ancestor, but never in votes of propagated labels.
    assert found == pytest.approx(expected, abs=1e-6)


def test_unseen_terms_inherit_from_the_graph(tmp_path: Path) -> None:
    terms: Terms = {
        "GO:0000001": (0, {}),
        "GO:0000002": (0, {"GO:0000001": "is_a"}),
        "GO:0000003": (0, {"GO:0000001": "is_a"}),
        "GO:0000004": (0, {"GO:0000002": "is_a", "GO:0000003": "is_a"}),
        "GO:0000005": (0, {"GO:0000004": "is_a"}),
        "GO:0000006": (0, {"GO:0000003": "is_a"}),
    }
    ontology = ontology_of(tmp_path, terms)
    scores = np.zeros((2, 6), dtype=np.float32)
    place = ontology.numbers
    for row, values in enumerate(({1: 1.0, 2: 0.6, 3: 0.9, 6: 0.3}, {1: 1.0, 2: 0.5, 3: 0.2, 6: 0.9})):
        for number, value in values.items():
            scores[row, place[f"GO:000000{number}"]] = value
    scores[:, place["GO:0000004"]] = 0.77  # an unseen term's own score does not count
    is_seen = np.ones(6, dtype=bool)
    is_seen[[place["GO:0000004"], place["GO:0000005"]]] = False
    found = inherited(ontology, scores, is_seen)
    # Term 2 has one child, term 3 two: 4 gets min(0.6 / 2, 0.9 / 3), and 5 half of that, as 4 has one child. In the
    # second row term 6 lifts term 3 to 0.9: min(0.5 / 2, 0.9 / 3).
    assert found[:, place["GO:0000004"]] == pytest.approx([0.3, 0.25])
    assert found[:, place["GO:0000005"]] == pytest.approx([0.15, 0.125])
    assert found[1, place["GO:0000003"]] == pytest.approx(0.9)
    assert (ontology.make_consistent(found) == found).all()
    is_seen[place["GO:0000005"]] = True
    scores[:, place["GO:0000005"]] = 0.4
    assert inherited(ontology, scores, is_seen)[:, place["GO:0000004"]] == pytest.approx([0.4, 0.4])


def test_a_method_that_is_not_there_is_refused_before_anything_is_scored(
    data: FunctionData, split: FunctionSplit
) -> None:
    with pytest.raises(InputError, match="no method 'blast'"):
        baselines(data, split, "blast")
