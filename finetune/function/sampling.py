"""Blocks of n proteins x m terms to train on: which terms, their labels, and which labels are not known.

    sampler = BlockSampler(data, split, FunctionConfig(), seed)
    sampler.block(proteins, step) -> Block              .terms [m], .labels [n, m], .is_known [n, m]

A block is a pure function of the seed, the step and its proteins. Terms are drawn without replacement from three kinds,
whose shares are settings: positives of the block's proteins; siblings of these (the other children of their parents),
which are the hard negatives; and any seen term by frequency. Where a kind runs short the last fills up. Each kind is
drawn with weights by exponential races (Efraimidis and Spirakis, Information Processing Letters 2006), each term's
number coming from a counter-based generator.

Annotations are incomplete: what is absent need not be untrue. With ``open_world`` a label is not known, and its
``is_known`` false, for the descendants of a protein's most specific terms, and for all terms of a namespace in which
the protein has no annotation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from megaprot.common.counter_random import key, keys, uniform_bits
from megaprot.common.errors import InputError
from megaprot.finetune.config_function import FunctionConfig
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.ontology import Ontology
from megaprot.finetune.function.splits import FunctionSplit

_POSITIVES, _SIBLINGS, _ANY = range(1, 4)  # families of keys


@dataclass(frozen=True, eq=False)
class Block:
    """Labels of n proteins x m terms.

    Attributes:
        proteins: Numbers of the proteins, int64 [n].
        terms: Numbers of the terms, ascending, int64 [m].
        labels: Whether a protein has a term, bool [n, m].
        is_known: Whether a label counts, bool [n, m]; true wherever ``labels`` is.
    """

    proteins: NDArray[np.int64]
    terms: NDArray[np.int64]
    labels: NDArray[np.bool_]
    is_known: NDArray[np.bool_]


class BlockSampler:
    """Draws blocks of training proteins x seen terms.

    Args:
        data: Proteins and labels.
        split: Which of them are trained on.
        config: Number and shares of terms.
        seed: Of what is drawn.

    Raises:
        InputError: A setting is out of range.
    """

    def __init__(self, data: FunctionData, split: FunctionSplit, config: FunctionConfig, seed: int) -> None:
        _check(config)
        self.config, self.seed, self.ontology = config, seed, data.ontology
        self.labels = split.training_labels(data.labels)
        self.is_seen = split.is_seen
        frequency = np.bincount(self.labels.indices, minlength=len(data.ontology))
        self._weights = np.where(self.is_seen, np.maximum(frequency, 1.0) ** config.frequency_power, 0.0)
        self._unknown = Unknown(data.ontology, self.labels) if config.open_world else None

    def block(self, proteins: NDArray[np.int64], step: int) -> Block:
        """Return labels of these training proteins for the terms drawn for them in a step."""
        terms = self._terms(proteins, step)
        labels = self.labels[proteins][:, terms].toarray()
        is_known = np.ones_like(labels) if self._unknown is None else ~self._unknown.of(proteins, terms)
        return Block(proteins, terms, labels, is_known | labels)

    def _terms(self, proteins: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """Return the terms of a block, ascending, int64 [num_terms or as many as are seen]."""
        num_terms = min(self.config.num_terms, int(self.is_seen.sum()))
        is_taken = np.zeros(len(self.is_seen), dtype=bool)
        positives = np.unique(self.labels[proteins].indices)
        self._take(is_taken, positives, round(self.config.positive_share * num_terms), step, _POSITIVES)
        parents = np.unique(self.ontology.edges[np.flatnonzero(is_taken)].indices)
        siblings = np.unique(self.ontology.children[parents].indices)
        self._take(is_taken, siblings, round(self.config.sibling_share * num_terms), step, _SIBLINGS)
        self._take(is_taken, np.flatnonzero(self.is_seen), num_terms - int(is_taken.sum()), step, _ANY)
        return np.flatnonzero(is_taken).astype(np.int64)

    def _take(
        self, is_taken: NDArray[np.bool_], candidates: NDArray[np.integer], count: int, step: int, family: int
    ) -> None:
        """Mark up to ``count`` more seen terms among the candidates as taken."""
        left = candidates[self.is_seen[candidates] & ~is_taken[candidates]]
        is_taken[self._race(left, self._weights[left], step, family)[:count]] = True

    def _race(
        self, numbers: NDArray[np.integer], weights: NDArray[np.float64], step: int, family: int
    ) -> NDArray[np.integer]:
        """Return numbers in the order in which they are drawn by weight without replacement."""
        own_keys = keys(key(self.seed, step, family), numbers)
        bits = uniform_bits(own_keys, np.zeros(len(numbers), dtype=np.int64))
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return numbers[np.argsort(-np.log(uniform) / weights, kind="stable")]


class Unknown:
    """Which absent labels may be true all the same.

    Args:
        ontology: The ontology.
        labels: Labels as far as they are known, bool [num_proteins, num_terms]: in training without unseen terms, so
            that what is masked tells nothing of these.
    """

    def __init__(self, ontology: Ontology, labels: csr_array) -> None:
        self._ontology = ontology
        self._leaves = ontology.most_specific(labels).astype(np.int32)
        self.in_namespace = ontology.annotated_namespaces(labels)

    def of(self, proteins: NDArray[np.int64], terms: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return, bool [n, m], what is below a most specific term or in a namespace without annotations."""
        above = csr_array(self._ontology.ancestors[terms].astype(np.int32))
        is_below = (self._leaves[proteins] @ above.T).toarray() > 0  # a most specific term itself is a label
        return is_below | ~self.in_namespace[proteins][:, self._ontology.namespaces[terms]]


def _check(config: FunctionConfig) -> None:
    """Raise InputError for settings out of range."""
    if config.num_terms < 1:
        raise InputError(f"function.num_terms is {config.num_terms}: give 1 or more.")
    shares = (config.positive_share, config.sibling_share)
    if min(shares) < 0 or sum(shares) > 1:
        raise InputError(f"function.positive_share and function.sibling_share are {shares[0]} and {shares[1]}: give "
                         "shares of which the sum is at most 1.")  # fmt: skip
