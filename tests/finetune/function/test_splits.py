"""The four-way split: whole clusters, exact seen and unseen, and nothing of unseen terms in training labels."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from megaprot.common.errors import InputError
from megaprot.finetune.config_function import SplitConfig
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.clusters import identity_clusters
from megaprot.finetune.function.splits import NOT_SCORED, TEST, TRAIN, VALID, FunctionSplit, split_data
from tests.finetune.function.ontologies import function_data, ontology_of, random_annotations, random_terms
from tests.finetune.function.test_clusters import families

CONFIG = SplitConfig(identity=0.8, valid_proteins=0.2, test_proteins=0.2, unseen_terms=0.2, least_positives=2)


@cache
def drawn_data(folder: Path) -> FunctionData:
    sequences = families(2, num_families=50)
    terms = random_terms(4, 60)
    return function_data(ontology_of(folder, terms), random_annotations(4, terms, len(sequences)), sequences)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FunctionData:
    return drawn_data(tmp_path_factory.getbasetemp())


@pytest.fixture(params=[False, True])
def split(data: FunctionData, request: pytest.FixtureRequest) -> FunctionSplit:
    return split_data(data, replace(CONFIG, withhold_descendants=request.param))


def num_positives(data: FunctionData, proteins: np.ndarray) -> np.ndarray:
    return data.labels.toarray()[proteins].sum(axis=0)


def test_clusters_stay_whole_and_shares_are_nearly_met(data: FunctionData, split: FunctionSplit) -> None:
    assert (split.clusters == identity_clusters(data.sequences, 0.8)).all()
    for cluster in range(split.clusters.max() + 1):
        assert len(set(split.proteins[split.clusters == cluster])) == 1
    counts = np.bincount(split.proteins)
    assert counts.sum() == 200 and (counts[[VALID, TEST]] <= 40).all() and (counts[[VALID, TEST]] >= 36).all()
    assert (np.sort(np.concatenate([split.numbers_of(k) for k in (TRAIN, VALID, TEST)])) == np.arange(200)).all()


def test_a_term_is_seen_if_and_only_if_training_shows_it(data: FunctionData, split: FunctionSplit) -> None:
    shown = split.training_labels(data.labels)
    assert (split.is_seen == (shown.toarray().sum(axis=0) > 0)).all()
    assert not shown.toarray()[split.proteins != TRAIN].any()
    expected = data.labels.toarray() & (split.proteins == TRAIN)[:, None] & split.is_seen
    assert (shown.toarray() == expected).all()


def test_unseen_terms_are_enough_and_kept_apart(data: FunctionData, split: FunctionSplit) -> None:
    in_train, in_valid, in_test = (num_positives(data, split.numbers_of(k)) for k in (TRAIN, VALID, TEST))
    for of in (VALID, TEST):
        withheld = (split.terms == of) & (in_train > 0)
        assert withheld.any() and not (withheld & data.ontology.is_root).any()
    # Terms without training positives count as unseen of where they are.
    never = in_train == 0
    assert ((split.terms == TEST) == (never & (in_test > 0)))[never].all()
    assert ((split.terms == VALID) == (never & (in_test == 0) & (in_valid > 0)))[never].all()
    assert ((split.terms == NOT_SCORED) == (num_positives(data, np.arange(200)) == 0)).all()
    assert not set(split.terms_of(VALID)) & set(np.flatnonzero(split.terms == TEST))
    assert set(split.terms_of(TEST)) == set(np.flatnonzero((split.terms == TRAIN) | (split.terms == TEST)))


def test_withheld_terms_have_enough_positives_one_by_one(data: FunctionData) -> None:
    split = split_data(data, CONFIG)
    in_train = num_positives(data, split.numbers_of(TRAIN))
    for of in (VALID, TEST):
        positives = num_positives(data, split.numbers_of(of))
        is_eligible = (in_train >= 2) & (positives >= 2) & ~data.ontology.is_root
        withheld = (split.terms == of) & (in_train > 0)
        assert is_eligible[withheld].all()
        for namespace in range(3):
            is_of = data.ontology.namespaces == namespace
            assert (withheld & is_of).sum() == round(0.2 * (is_eligible & is_of).sum())


def test_descendants_of_withheld_terms_are_withheld_when_asked(data: FunctionData) -> None:
    split = split_data(data, replace(CONFIG, withhold_descendants=True))
    unseen = np.flatnonzero((split.terms == VALID) | (split.terms == TEST))
    in_train = num_positives(data, split.numbers_of(TRAIN))
    withheld = unseen[in_train[unseen] > 0]
    below = data.ontology.descendants[withheld].indices
    assert not split.is_seen[below].any()


def test_splits_are_a_pure_function_of_the_seed(data: FunctionData) -> None:
    first, again, other = (split_data(data, replace(CONFIG, seed=seed)) for seed in (3, 3, 4))
    assert (first.proteins == again.proteins).all() and (first.terms == again.terms).all()
    assert (first.proteins != other.proteins).any() and (first.terms != other.terms).any()
    sample = first.sample_of_seen(20)
    assert len(sample) == 20 and (np.diff(sample) > 0).all() and (first.proteins[sample] == TRAIN).all()
    assert len(first.sample_of_seen(10_000)) == len(first.numbers_of(TRAIN))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test_proteins": 0.5}, r"function.split.test_proteins is 0.5: give a share"),
        ({"unseen_terms": -0.1}, r"function.split.unseen_terms is -0.1: give a share"),
        ({"test_proteins": 0.001}, "none is left for the split 'test'"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(data: FunctionData, changes: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        split_data(data, replace(CONFIG, **changes))  # type: ignore[arg-type]
