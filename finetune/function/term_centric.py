"""AUROC and average precision of each term over proteins, as functions of the proteins' weights.

    centric = TermCentric(scores, labels, counts)
    centric.areas(weights) -> float64 [2, t]               AUROC and average precision of each term
    centric.macro_auroc, centric.macro_aupr                their means over terms, as the bootstrap wants them

Each term's proteins are sorted once; a bootstrap sample then takes one pass over them.
"""

from __future__ import annotations

import warnings

import numba
import numpy as np
from numpy.typing import NDArray

from megaprot.finetune.metrics import Floats


class TermCentric:
    """The ranking of proteins by each term.

    Args:
        scores: Scores float32 [n, t]; higher is likelier.
        labels: Whether a protein has a term, bool [n, t].
        counts: Which pairs count, bool [n, t].
    """

    def __init__(self, scores: NDArray[np.float32], labels: NDArray[np.bool_], counts: NDArray[np.bool_]) -> None:
        self._starts = np.concatenate(([0], np.cumsum(counts.sum(axis=0)))).astype(np.int64)
        self._proteins = np.empty(self._starts[-1], dtype=np.int32)
        self._is_true = np.empty(self._starts[-1], dtype=bool)
        self._ends_tie = np.ones(self._starts[-1], dtype=bool)
        for term in range(scores.shape[1]):
            proteins = np.flatnonzero(counts[:, term])
            proteins = proteins[np.argsort(-scores[proteins, term], kind="stable")]
            place = slice(self._starts[term], self._starts[term + 1])
            self._proteins[place] = proteins
            self._is_true[place] = labels[proteins, term]
            self._ends_tie[place][:-1] = scores[proteins[:-1], term] != scores[proteins[1:], term]

    def areas(self, weights: Floats) -> Floats:
        """Return AUROC and average precision of each term, [2, t]; nan without positives or without negatives.

        ``weights`` float64 [n] say how often each protein counts. Ties as in ``ranking.auroc_and_aupr``.
        """
        return _areas(weights.astype(np.float64), self._starts, self._proteins, self._is_true, self._ends_tie)

    def macro_auroc(self, weights: Floats) -> float:
        """Return the mean AUROC over the terms that have one; nan where none has."""
        return _mean(self.areas(weights)[0])

    def macro_aupr(self, weights: Floats) -> float:
        """Return the mean average precision over the terms that have one; nan where none has."""
        return _mean(self.areas(weights)[1])


def _mean(values: Floats) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of no terms at all
        return float(np.nanmean(values))


@numba.njit(cache=True, nogil=True)
def _areas(
    weights: Floats,
    starts: NDArray[np.int64],
    proteins: NDArray[np.int32],
    is_true: NDArray[np.bool_],
    ends_tie: NDArray[np.bool_],
) -> Floats:
    """Return what ``TermCentric.areas`` does; native because a bootstrap passes over all ranks a thousand times."""
    num_terms = len(starts) - 1
    found = np.full((2, num_terms), np.nan)
    for term in range(num_terms):
        positives, negatives, tied_positives, tied_negatives = 0.0, 0.0, 0.0, 0.0
        pairs, gained = 0.0, 0.0
        for place in range(starts[term], starts[term + 1]):
            weight = weights[proteins[place]]
            if is_true[place]:
                tied_positives += weight
            else:
                tied_negatives += weight
            if ends_tie[place]:
                pairs += tied_negatives * (positives + tied_positives / 2)
                positives += tied_positives
                negatives += tied_negatives
                if tied_positives > 0:
                    gained += tied_positives * positives / (positives + negatives)
                tied_positives, tied_negatives = 0.0, 0.0
        if positives > 0 and negatives > 0:
            found[0, term] = pairs / (positives * negatives)
            found[1, term] = gained / positives
    return found
