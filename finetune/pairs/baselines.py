"""What pairs can be told apart by without a language model: how often proteins occur in training, and their k-mers.

A model that does not beat them has not learned to bind. The first looks at no residue at all: in many sets of pairs a
protein's degree in the training split nearly gives the label away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.metrics import Floats
from megaprot.finetune.pairs.files import PairExample
from megaprot.finetune.pairs.metrics import average_precision
from megaprot.finetune.pairs.proteins import Degrees, ProteinIndex, counts_of, degrees_of, distinct, labels_of

_CLASSES = ("AGV", "ILFP", "YMTS", "HNQW", "RK", "DE", "C")
"""Residues by dipole and volume of their side chains (Shen et al., PNAS 2007)."""
_LENGTH = 3
NUM_KMERS = len(_CLASSES) ** _LENGTH
_PRIOR_PAIRS = 2.0  # as if each protein had been met in so many more pairs of the split's mean
_PENALTIES = (1e-1, 1e-2, 1e-3)
_STEPS = 30
_CHUNK = 8192


@dataclass(frozen=True)
class DegreeBaseline:
    """Smoothed log odds of both proteins to be in a pair that binds, counted in the training split.

    Attributes:
        degrees: Counts by protein.
        share: Share of the training pairs that bind.
    """

    degrees: Degrees
    share: float

    @staticmethod
    def fit(train: Sequence[PairExample]) -> DegreeBaseline:
        """Count the training split."""
        return DegreeBaseline(degrees_of(train), float(labels_of(train).mean()))

    def scores(self, examples: Sequence[PairExample]) -> Floats:
        """Return a score a pair [num_pairs]; a protein that is not in training adds nothing."""
        counts = counts_of(self.degrees, examples).astype(np.float64)
        prior = np.clip(np.array([self.share, 1 - self.share]), 1e-6, 1.0) * _PRIOR_PAIRS
        odds: Floats = np.log((counts[..., 0] + prior[0]) / (counts[..., 1] + prior[1])) - np.log(prior[0] / prior[1])
        return odds.sum(axis=1)


@dataclass(frozen=True)
class KmerBaseline:
    """Logistic regression on k-mers of a reduced alphabet: sums and products of two proteins' standardised shares.

    Attributes:
        mean: Of the square roots of shares over training proteins [num_kmers].
        spread: Their standard deviation.
        weights: Of sums, of products, and the constant [2 * num_kmers + 1].
    """

    mean: Floats
    spread: Floats
    weights: Floats

    @staticmethod
    def fit(train: Sequence[PairExample], valid: Sequence[PairExample], vocabulary: Vocabulary) -> KmerBaseline:
        """Fit on the training split; the penalty is that of the highest average precision on the validation split."""
        index = ProteinIndex()
        places, labels = index.places(train), labels_of(train)
        shares = _shares(index, vocabulary)
        found = KmerBaseline(shares.mean(axis=0), shares.std(axis=0) + 1e-6, np.zeros(2 * NUM_KMERS + 1))
        features = found._standardised(shares)
        best, best_value, weights = found, -np.inf, found.weights
        for penalty in _PENALTIES:  # from strong to weak, each begun where the last ended
            weights = _fitted(features, places, labels, weights, penalty)
            candidate = KmerBaseline(found.mean, found.spread, weights)
            value = average_precision(labels_of(valid), candidate.scores(valid, vocabulary))(np.ones(len(valid)))
            if value > best_value:
                best, best_value = candidate, value
        return best

    def _standardised(self, shares: Floats) -> NDArray[np.float32]:
        return ((shares - self.mean) / self.spread).astype(np.float32)

    def scores(self, examples: Sequence[PairExample], vocabulary: Vocabulary) -> Floats:
        """Return a logit a pair [num_pairs]."""
        index = ProteinIndex()
        places = index.places(examples)
        return _logits(self._standardised(_shares(index, vocabulary)), places, self.weights)


def _shares(index: ProteinIndex, vocabulary: Vocabulary) -> Floats:
    """Return square roots of each protein's shares of k-mers [num_proteins, num_kmers]."""
    table = np.full(256, -1, dtype=np.int64)
    for number, letters in enumerate(_CLASSES):
        for place, token in enumerate(vocabulary.tokens[:256]):
            if token in letters and len(token) == 1:
                table[place] = number
    found = np.zeros((len(index.residues), NUM_KMERS))
    powers = len(_CLASSES) ** np.arange(_LENGTH)
    for protein, residues in enumerate(index.residues):
        if len(residues) < _LENGTH:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(table[residues], _LENGTH)
        kmers = windows[(windows >= 0).all(axis=1)] @ powers  # none over a letter outside the alphabet
        found[protein] = np.sqrt(np.bincount(kmers, minlength=NUM_KMERS) / max(len(kmers), 1))
    return found


def _logits(features: NDArray[np.float32], places: NDArray[np.int64], weights: Floats) -> Floats:
    """Return the logits of pairs of rows of ``features`` [num_proteins, num_kmers]."""
    alone = features @ weights[:NUM_KMERS].astype(np.float32)
    weighted = features * weights[NUM_KMERS:-1].astype(np.float32)
    found = np.empty(len(places))
    for start in range(0, len(places), _CHUNK):
        first, second = places[start : start + _CHUNK].T
        together = np.einsum("ij,ij->i", weighted[first], features[second])
        found[start : start + _CHUNK] = alone[first] + alone[second] + together + weights[-1]
    return found


def _fitted(
    features: NDArray[np.float32], places: NDArray[np.int64], labels: Floats, weights: Floats, penalty: float
) -> Floats:
    """Return the weights of least mean cross-entropy with a quadratic penalty, by L-BFGS."""
    signs = 2 * labels - 1

    def cost(now: Floats) -> tuple[float, Floats]:
        logits = _logits(features, places, now)
        slopes = (expit(logits) - labels) / len(labels)
        by_protein = np.bincount(places.ravel(), slopes.repeat(2), len(features)).astype(np.float32)
        of_products = np.zeros(NUM_KMERS)
        for start in range(0, len(places), _CHUNK):
            first, second = places[start : start + _CHUNK].T
            part = slopes[start : start + _CHUNK].astype(np.float32)
            of_products += np.einsum("i,ij,ij->j", part, features[first], features[second])
        slope = np.concatenate((by_protein @ features, of_products, [slopes.sum()])) + penalty * now
        return float(np.logaddexp(0.0, -signs * logits).mean() + penalty / 2 * now @ now), slope

    found: Floats = minimize(cost, weights, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x
    return found


@dataclass(frozen=True)
class PairBaselines:
    """Both baselines, fitted on the splits that a model was trained with."""

    degree: DegreeBaseline
    kmer: KmerBaseline

    @staticmethod
    def fit(train: Sequence[PairExample], valid: Sequence[PairExample], vocabulary: Vocabulary) -> PairBaselines:
        """Fit on the training split, both orders of a pair once; what is to be chosen is chosen on validation."""
        train = distinct(train)
        return PairBaselines(DegreeBaseline.fit(train), KmerBaseline.fit(train, valid, vocabulary))

    def scores(self, examples: Sequence[PairExample], vocabulary: Vocabulary) -> dict[str, Floats]:
        """Return the scores of pairs by baseline."""
        return {"degree": self.degree.scores(examples), "kmer": self.kmer.scores(examples, vocabulary)}

    def state(self) -> dict[str, Any]:
        """Return both, as JSON can hold them."""
        kmer = {name: [float(f"{value:.7g}") for value in values] for name, values in vars(self.kmer).items()}
        return {"degrees": self.degree.degrees, "share": self.degree.share, "kmer": kmer}

    @staticmethod
    def restored(state: Mapping[str, Any]) -> PairBaselines:
        """Return what :meth:`state` gave."""
        degrees = {key: (int(positive), int(negative)) for key, (positive, negative) in state["degrees"].items()}
        kmer = {name: np.array(values) for name, values in state["kmer"].items()}
        return PairBaselines(DegreeBaseline(degrees, float(state["share"])), KmerBaseline(**kmer))
