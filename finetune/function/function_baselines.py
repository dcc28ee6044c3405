"""What any model has to beat: term frequency, number of descendants, and nearest neighbours by sequence identity.

    baselines(data, split, method) -> {name: Scorer}       scorer(proteins, terms) -> float32 [n, m], from 0 to 1

Each sees the labels of training alone (``FunctionSplit.training_labels``). What it has no labels for, an unseen term,
it takes from the ontology (:func:`inherited`), so that a model that reads a term's text is compared with what the
graph gives without any text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from megaprot.finetune.function.alignment import check_method, find_hits
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.function_metrics import Scorer
from megaprot.finetune.function.kmer_similarity import Hits
from megaprot.finetune.function.ontology import Ontology
from megaprot.finetune.function.splits import TRAIN, FunctionSplit

_NUM_NEIGHBOURS = 10
_ROWS = 256  # proteins with scores of all terms at a time


def baselines(data: FunctionData, split: FunctionSplit, method: str = "kmer") -> dict[str, Scorer]:
    """Return the baselines of a split by name.

    Args:
        data: Proteins and labels.
        split: Which of them are trained on.
        method: How neighbours are found: ``kmer``, built in, or the programs ``mmseqs`` or ``diamond``.

    Raises:
        InputError: There is no such method, or its program is not installed.
    """
    labels = split.training_labels(data.labels)
    frequency = np.bincount(labels.indices, minlength=len(data.ontology)) / max(int((split.proteins == TRAIN).sum()), 1)
    content = data.ontology.num_descendants + 1.0
    return {
        "term_frequency": _Blind(inherited(data.ontology, frequency[None].astype(np.float32), split.is_seen)[0]),
        "num_descendants": _Blind((content / content.max()).astype(np.float32)),
        "nearest_neighbours": NearestNeighbours(data, split, labels, frequency.astype(np.float32), method),
    }


def inherited(ontology: Ontology, scores: NDArray[np.float32], is_seen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return consistent scores float32 [n, num_terms] of all terms, those of unseen ones taken from the graph.

    An unseen term takes the larger of its best descendant's score and an equal part of the lowest of its parents'
    scores, one part for each child of that parent and one for none of them.

    Args:
        ontology: The ontology.
        scores: Scores of all terms, of which only those of seen ones count, float32 [n, num_terms].
        is_seen: Which are seen, bool [num_terms].
    """
    known = ontology.make_consistent(np.where(is_seen, scores, np.float32(0)))
    num_children = np.diff(ontology.children.indptr)
    for term in np.flatnonzero(~is_seen & ~ontology.is_root).tolist():  # parents before children
        parents = ontology.parents[ontology.parent_starts[term] : ontology.parent_starts[term + 1]]
        shares = (known[:, parents] / (1 + num_children[parents])).min(axis=1)
        known[:, term] = np.maximum(known[:, term], shares)
    return known


class _Blind:
    """Scores that are the same for all proteins, [num_terms]."""

    def __init__(self, scores: NDArray[np.float32]) -> None:
        self._scores = scores

    def __call__(self, proteins: NDArray[np.int64], terms: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the scores of some proteins and terms, [n, m]."""
        return np.broadcast_to(self._scores[terms], (len(proteins), len(terms)))


class NearestNeighbours:
    """A term's score is the share of a protein's nearest neighbours that have it, weighted by how alike they are.

    DiamondScore of Kulmanov and Hoehndorf ("DeepGOPlus", Bioinformatics 2020), with the ten most alike training
    proteins. It is far above the largest identity alone, which CAFA's BLAST baseline takes. A training protein is not
    its own neighbour; a protein without neighbours gets the terms' frequencies. Terms unseen in training inherit.

    Args:
        data: Proteins and labels.
        split: Which of them are trained on.
        labels: Training labels, bool [num_proteins, num_terms].
        frequency: Share of the training proteins that have each term, float32 [num_terms].
        method: As in :func:`baselines`.
    """

    def __init__(
        self,
        data: FunctionData,
        split: FunctionSplit,
        labels: csr_array,
        frequency: NDArray[np.float32],
        method: str,
    ) -> None:
        self._data, self._labels, self._frequency, self._method = data, labels, frequency, check_method(method)
        self._is_seen = split.is_seen
        self._train = split.numbers_of(TRAIN)

    def __call__(self, proteins: NDArray[np.int64], terms: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the scores of some proteins of the data and some terms, [n, m]."""
        sequences = self._data.sequences
        hits = find_hits(
            [sequences[number] for number in proteins], [sequences[number] for number in self._train], self._method
        )
        votes = self._votes(hits, proteins)
        found = np.empty((len(proteins), len(terms)), dtype=np.float32)
        for first in range(0, len(proteins), _ROWS):
            scores = (votes[first : first + _ROWS] @ self._labels.astype(np.float32)).toarray()
            scores[np.diff(votes.indptr[first : first + len(scores) + 1]) == 0] = self._frequency
            found[first : first + _ROWS] = inherited(self._data.ontology, scores, self._is_seen)[:, terms]
        return found

    def _votes(self, hits: Hits, proteins: NDArray[np.int64]) -> csr_array:
        """Return the share of the votes that each protein of the data has for each query, [n, num_proteins]."""
        rows: list[NDArray[np.int64]] = []
        columns: list[NDArray[np.int64]] = []
        shares: list[NDArray[np.float32]] = []
        for query, protein in enumerate(proteins.tolist()):
            places = np.arange(hits.starts[query], hits.starts[query + 1])
            places = places[self._train[hits.numbers[places]] != protein][:_NUM_NEIGHBOURS]
            rows.append(np.full(len(places), query))
            columns.append(self._train[hits.numbers[places]])
            shares.append(hits.weights[places] / hits.weights[places].sum())
        entries = (np.concatenate(shares), (np.concatenate(rows), np.concatenate(columns)))
        return csr_array(entries, shape=(len(proteins), len(self._data)))
