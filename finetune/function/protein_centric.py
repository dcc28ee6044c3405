"""CAFA's protein-centric Fmax and Smin, gathered from blocks of proteins in memory that does not grow with terms.

    centric = ProteinCentric(ontology, terms, content)
    centric.add(scores [n, m], labels bool [n, m])          one block of proteins after another
    centric.fmax(namespace)(weights), centric.smin(namespace)(weights)     by proteins' weights, as the bootstrap wants
    centric.at_best(namespace) -> CentricResult

After Radivojac et al., "A large-scale evaluation of computational protein function prediction" (Nature Methods 2013),
and Jiang et al. (Genome Biology 2016). In each namespace only the proteins with a true term there count; roots, which
are true of all of them, do not. At thresholds 0.01, 0.02, ... 1.00 a term is predicted where its score is at least the
threshold. Precision is averaged over the proteins with any prediction, recall over all; Fmax is the largest F1 of the
two. Remaining uncertainty and misinformation are the information content of the terms missed and of those wrongly
predicted, in bits, averaged over all proteins; Smin is the smallest length of the vector of both.

Scores are made consistent before (``Ontology.make_consistent``), labels are propagated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from megaprot.finetune.function.ontology import NAMESPACES, Ontology
from megaprot.finetune.metrics import Floats, Weighted

THRESHOLDS = (np.arange(1, 101) / 100).astype(np.float32)
_HITS, _PREDICTED, _HIT_BITS, _PREDICTED_BITS = range(4)


@dataclass(frozen=True)
class CentricResult:
    """Fmax and Smin of a namespace, where they are reached, and over how many proteins."""

    fmax: float
    fmax_threshold: float
    smin: float
    smin_threshold: float
    num_proteins: int


class ProteinCentric:
    """Adds up predictions of proteins over thresholds.

    Args:
        ontology: The ontology.
        terms: Numbers of the terms of the columns, int64 [m].
        content: Information content of all terms of the ontology in bits, from training annotations, [num_terms].
    """

    def __init__(self, ontology: Ontology, terms: NDArray[np.int64], content: Floats) -> None:
        self._namespaces = np.where(ontology.is_root[terms], -1, ontology.namespaces[terms]).astype(np.int8)
        self._content = content[terms].astype(np.float64)
        self._sums: list[Floats] = []  # [n, namespaces, thresholds, 4]
        self._totals: list[Floats] = []  # [n, namespaces, 2]: number and content of the true terms

    def add(self, scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> None:
        """Count a block of proteins: scores from 0 to 1 and labels, both [n, m]."""
        sums, totals = _counted(
            np.ascontiguousarray(scores, np.float32), labels, self._namespaces, self._content, THRESHOLDS
        )
        self._sums.append(sums)
        self._totals.append(totals)

    def fmax(self, namespace: int) -> Weighted:
        """Return Fmax of a namespace as a function of the weights [num_proteins] of all proteins, in order.

        It is nan where no protein counts.
        """
        is_counted, sums, totals = self._of(namespace)
        shares = _shares(sums, totals)

        def metric(weights: Floats) -> float:
            own = weights[is_counted]
            return float(_f1(own, shares).max()) if own.any() else float("nan")

        return metric

    def smin(self, namespace: int) -> Weighted:
        """Return Smin of a namespace in bits, as :meth:`fmax` is."""
        is_counted, sums, totals = self._of(namespace)
        bits = _bits(sums, totals)

        def metric(weights: Floats) -> float:
            own = weights[is_counted]
            return float(_distance(own, bits).min()) if own.any() else float("nan")

        return metric

    def at_best(self, namespace: int) -> CentricResult:
        """Return Fmax and Smin over all proteins added, with their thresholds; nan where no protein counts."""
        is_counted, sums, totals = self._of(namespace)
        if not is_counted.any():
            return CentricResult(float("nan"), float("nan"), float("nan"), float("nan"), 0)
        ones = np.ones(len(totals))
        all_f1, distance = _f1(ones, _shares(sums, totals)), _distance(ones, _bits(sums, totals))
        best, least = int(np.argmax(all_f1)), int(np.argmin(distance))
        return CentricResult(
            float(all_f1[best]), (best + 1) / 100, float(distance[least]), (least + 1) / 100, len(totals)
        )

    def _of(self, namespace: int) -> tuple[NDArray[np.bool_], Floats, Floats]:
        """Return which proteins count in a namespace, and their sums [c, thresholds, 4] and totals [c, 2]."""
        totals = np.concatenate([block[:, namespace] for block in self._totals])
        is_counted = totals[:, 0] > 0
        sums = np.concatenate([block[:, namespace] for block in self._sums])
        return is_counted, sums[is_counted], totals[is_counted]


def _shares(sums: Floats, totals: Floats) -> Floats:
    """Return precision, whether anything is predicted, and recall at each threshold, [n, 3 x thresholds].

    Side by side, so that a bootstrap sample is one product of a vector and a matrix.
    """
    hits, predicted = sums[..., _HITS], sums[..., _PREDICTED]
    return np.concatenate((hits / np.maximum(predicted, 1), predicted > 0, hits / totals[:, :1]), axis=1)


def _bits(sums: Floats, totals: Floats) -> Floats:
    """Return the content missed and wrongly predicted at each threshold, [n, 2 x thresholds]."""
    hit = sums[..., _HIT_BITS]
    return np.concatenate((totals[:, 1:] - hit, sums[..., _PREDICTED_BITS] - hit), axis=1)


def _f1(weights: Floats, shares: Floats) -> Floats:
    """Return F1 of the mean precision and recall at each threshold, from what :func:`_shares` gave."""
    precision, num_predicted, recall = np.split(weights @ shares, 3)
    mean_precision = precision / np.maximum(num_predicted, 1e-12)
    mean_recall = recall / weights.sum()
    total = mean_precision + mean_recall
    return np.where(total > 0, 2 * mean_precision * mean_recall / np.where(total > 0, total, 1), 0.0)


def _distance(weights: Floats, bits: Floats) -> Floats:
    """Return the length of the vector of mean remaining uncertainty and misinformation at each threshold."""
    missed, wrong = np.split(weights @ bits / weights.sum(), 2)
    return np.hypot(missed, wrong)


@numba.njit(cache=True, nogil=True)
def _counted(
    scores: NDArray[np.float32],
    labels: NDArray[np.bool_],
    namespaces: NDArray[np.int8],
    content: Floats,
    thresholds: NDArray[np.float32],
) -> tuple[Floats, Floats]:
    """Return sums and totals of a block as ``ProteinCentric`` keeps them; native because it visits every score.

    A score is counted once, at the highest threshold it reaches, and passed on to the lower ones at the end.
    """
    num_proteins, num_thresholds = len(scores), len(thresholds)
    sums = np.zeros((num_proteins, _NUM_NAMESPACES, num_thresholds, 4))
    totals = np.zeros((num_proteins, _NUM_NAMESPACES, 2))
    for protein in range(num_proteins):
        for place in range(len(namespaces)):
            namespace = namespaces[place]
            if namespace < 0:
                continue
            is_true = labels[protein, place]
            if is_true:
                totals[protein, namespace, 0] += 1
                totals[protein, namespace, 1] += content[place]
            score = scores[protein, place]
            if not score >= thresholds[0]:
                continue
            reached = np.searchsorted(thresholds, score, side="right") - 1
            sums[protein, namespace, reached, 1] += 1
            sums[protein, namespace, reached, 3] += content[place]
            if is_true:
                sums[protein, namespace, reached, 0] += 1
                sums[protein, namespace, reached, 2] += content[place]
        for namespace in range(_NUM_NAMESPACES):
            for threshold in range(num_thresholds - 2, -1, -1):
                for kind in range(4):
                    sums[protein, namespace, threshold, kind] += sums[protein, namespace, threshold + 1, kind]
    return sums, totals


_NUM_NAMESPACES = len(NAMESPACES)
