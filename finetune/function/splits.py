"""Which proteins and which terms are trained on, chosen on and tested on: the four-way grid seen x unseen.

    split_data(data, SplitConfig()) -> FunctionSplit      .proteins int8 [num_proteins], .terms int8 [num_terms]
    split.numbers_of(TRAIN) -> proteins; split.terms_of(VALID) -> terms scored; split.is_seen -> bool [num_terms]
    split.training_labels(data.labels) -> csr_array        the labels of unseen terms taken away

Proteins are drawn by identity cluster, so that no protein of validation or test is nearly one of training. Terms are
drawn one by one: those of ``VALID`` are unseen in training and scored in validation, those of ``TEST`` unseen until the
test. A term without any positive among the training proteins was never seen either and counts as unseen of the split
that has its positives (``TEST`` where both do), so that seen and unseen are exact: a term is seen if and only if a
training protein shows it.

Labels are propagated first and the columns of unseen terms then removed, so that no descendant's annotation brings an
unseen term's label back. An unseen term may have seen ancestors, and seen descendants: the ontology itself is no
secret, only which proteins have the term. With ``withhold_descendants`` the descendants of what is drawn are unseen
too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from megaprot.common.counter_random import key, keys
from megaprot.common.errors import InputError
from megaprot.finetune.config_function import SplitConfig
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.clusters import identity_clusters
from megaprot.finetune.function.ontology import NAMESPACES, Ontology

TRAIN, VALID, TEST = 0, 1, 2
NOT_SCORED = -1
"""Of a term that no protein has."""
_CLUSTERS, _TERMS, _SAMPLE = 1, 2, 3  # families of keys
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class FunctionSplit:
    """The split of each protein, and of each term.

    Attributes:
        proteins: TRAIN, VALID or TEST, int8 [num_proteins].
        terms: TRAIN of a seen term, VALID or TEST of an unseen one, NOT_SCORED of one that no protein has; int8
            [num_terms].
        clusters: The identity cluster of each protein, int64 [num_proteins].
    """

    proteins: NDArray[np.int8]
    terms: NDArray[np.int8]
    clusters: NDArray[np.int64]

    @cached_property
    def is_seen(self) -> NDArray[np.bool_]:
        """Return which terms are trained on, [num_terms]."""
        return self.terms == TRAIN

    def numbers_of(self, split: int) -> NDArray[np.int64]:
        """Return the proteins of a split, ascending."""
        return np.flatnonzero(self.proteins == split).astype(np.int64)

    def terms_of(self, split: int) -> NDArray[np.int64]:
        """Return the terms scored in a split, ascending: the seen ones and, of VALID and TEST, its unseen ones."""
        return np.flatnonzero(self.is_seen | (self.terms == split)).astype(np.int64)

    def sample_of_seen(self, count: int) -> NDArray[np.int64]:
        """Return training proteins, the same at every call, ascending: ``count`` of them, or all there are."""
        train = self.numbers_of(TRAIN)
        return np.sort(train[np.argsort(keys(key(_SAMPLE), train), kind="stable")[:count]])

    def training_labels(self, labels: csr_array) -> csr_array:
        """Return propagated labels bool [num_proteins, num_terms] without those that training may not know.

        Rows of other proteins and columns of unseen terms are empty.
        """
        entries = labels.tocoo()
        rows, columns = entries.coords
        is_known = (self.proteins[rows] == TRAIN) & self.is_seen[columns]
        known = (np.ones(int(is_known.sum()), dtype=bool), (rows[is_known], columns[is_known]))
        return csr_array(known, shape=labels.shape)


def split_data(data: FunctionData, config: SplitConfig) -> FunctionSplit:
    """Draw the splits, a pure function of the data and the settings.

    Raises:
        InputError: A share is out of range, or a split gets no protein.
    """
    for name in ("valid_proteins", "test_proteins", "unseen_terms"):
        if not 0 <= getattr(config, name) < 0.5:
            raise InputError(f"function.split.{name} is {getattr(config, name)}: give a share from 0 to below 0.5.")
    clusters = identity_clusters(data.sequences, config.identity)
    proteins = _split_proteins(clusters, config)
    for number, share in ((TRAIN, 1.0), (VALID, config.valid_proteins), (TEST, config.test_proteins)):
        if share and not (proteins == number).any():
            raise InputError(f"of {len(proteins):,} proteins in {clusters.max() + 1:,} clusters none is left for the "
                             f"split '{SPLITS[number]}': give more proteins or a higher identity.")  # fmt: skip
    num_positives = np.stack([_num_positives(data.labels, proteins == split) for split in (TRAIN, VALID, TEST)])
    terms = _split_terms(data.ontology, num_positives, config)
    return FunctionSplit(proteins, terms, clusters)


def _split_proteins(clusters: NDArray[np.int64], config: SplitConfig) -> NDArray[np.int8]:
    """Return the split of each protein: whole clusters in a drawn order, the test's first.

    A cluster that does not fit what is left of a split is passed over, so that shares are met from below.
    """
    sizes = np.bincount(clusters)
    order = np.argsort(keys(key(config.seed, _CLUSTERS), np.arange(len(sizes))))
    split_of = np.full(len(sizes), TRAIN, dtype=np.int8)
    room = {TEST: int(config.test_proteins * len(clusters)), VALID: int(config.valid_proteins * len(clusters))}
    for cluster in order.tolist():
        for split in (TEST, VALID):
            if sizes[cluster] <= room[split]:
                split_of[cluster] = split
                room[split] -= int(sizes[cluster])
                break
    return split_of[clusters]


def _num_positives(labels: csr_array, is_in: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how many of some proteins have each term, [num_terms]."""
    return np.bincount(csr_array(labels[np.flatnonzero(is_in)]).indices, minlength=labels.shape[1])


def _split_terms(ontology: Ontology, num_positives: NDArray[np.int64], config: SplitConfig) -> NDArray[np.int8]:
    """Return the split of each term, from its positives in each split [3, num_terms].

    A term whose descendants, where these are withheld too, do not fit what is left of the share is passed over.
    """
    terms = np.full(len(ontology), NOT_SCORED, dtype=np.int8)
    terms[num_positives[VALID] > 0] = VALID
    terms[num_positives[TEST] > 0] = TEST
    terms[num_positives[TRAIN] > 0] = TRAIN
    order = np.argsort(keys(key(config.seed, _TERMS), np.arange(len(ontology))))
    for namespace in range(len(NAMESPACES)):
        is_of = (ontology.namespaces == namespace) & ~ontology.is_root
        for split in (TEST, VALID):
            is_eligible = is_of & (num_positives[[TRAIN, split]] >= max(config.least_positives, 1)).all(axis=0)
            room = round(config.unseen_terms * int(is_eligible.sum()))
            for term in order[is_eligible[order]].tolist():
                below = ontology.descendants[[term]].indices if config.withhold_descendants else np.array([term])
                below = below[terms[below] == TRAIN]
                num_taken = int(is_eligible[below].sum())
                if terms[term] == TRAIN and num_taken <= room:
                    terms[below] = split
                    room -= num_taken
    return terms
