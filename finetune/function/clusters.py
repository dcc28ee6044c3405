"""Clusters of proteins by identity, for splits whose test proteins have no near relative among the training ones.

    identity_clusters(sequences, identity) -> int64 [num_sequences]

K-mers propose pairs, edlib (Sosic and Sikic, Bioinformatics 2017) measures them. Identity is global, ``1 - d /
length of the longer`` with the edit distance d: like MMseqs2's clusters of mutual coverage it joins proteins that are
alike from end to end; two that share one domain of several are not joined, since chains of shared domains would tie
nearly all proteins together (22,265 of 25,789 of Swiss-Prot at a local identity of 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import edlib
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megaprot.common.errors import InputError
from megaprot.finetune.function.kmer_similarity import KmerIndex

SMALLEST_IDENTITY = 0.4
"""Below, shared k-mers propose too few of the pairs there are."""
_BATCH = 4096  # sequences whose candidates are in memory at a time
_MARGIN = 0.1
"""How far below the identity asked for the k-mers' estimate may be: of 1,500 Swiss-Prot proteins with 25,789 no pair
of 0.4 or more was lost (12,784) that an estimate from 0.2 on, two k-mers, proposes."""


def identity_clusters(sequences: Sequence[bytes], identity: float) -> NDArray[np.int64]:
    """Return the cluster of each sequence, int64 [num_sequences], numbered as they first come.

    Clusters are connected components (single linkage): of two clusters no two proteins are known to be as alike as
    ``identity``, which is what keeps a split clean; two of one cluster need not be. Equal sequences always share one.

    Args:
        sequences: Letters in ASCII.
        identity: From 0.4 to 1.

    Raises:
        InputError: ``identity`` is out of range.
    """
    if not SMALLEST_IDENTITY <= identity <= 1:
        raise InputError(f"function.split.identity is {identity}: give a fraction from {SMALLEST_IDENTITY} to 1.")
    first_of: dict[bytes, int] = {}
    same = np.array([first_of.setdefault(sequence, number) for number, sequence in enumerate(sequences)])
    pairs = _alike(sequences, identity)
    rows = np.concatenate((pairs[:, 0], np.arange(len(same))))
    columns = np.concatenate((pairs[:, 1], same))
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(sequences), len(sequences)))
    _, found = connected_components(graph, directed=False)
    _, first, cluster = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[cluster].astype(np.int64)


def _alike(sequences: Sequence[bytes], identity: float) -> NDArray[np.int64]:
    """Return the pairs of sequences of at least ``identity``, int64 [num_pairs, 2]."""
    index = KmerIndex(sequences)
    lengths = np.array([len(sequence) for sequence in sequences])
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(sequences), _BATCH):
        hits = index.hits(sequences[start : start + _BATCH], identity - _MARGIN)
        pairs = np.stack((start + np.repeat(np.arange(len(hits.starts) - 1), np.diff(hits.starts)), hits.numbers), 1)
        of_pairs = lengths[pairs]
        most_edits = np.floor((1 - identity) * of_pairs.max(axis=1) + 1e-9).astype(np.int64)  # 1 - 0.9 is below 0.1
        is_candidate = (pairs[:, 0] < pairs[:, 1]) & (np.ptp(of_pairs, axis=1) <= most_edits)
        pairs, most_edits = pairs[is_candidate], most_edits[is_candidate]
        is_alike = [
            edlib.align(sequences[one], sequences[other], mode="NW", task="distance", k=allowed)["editDistance"] >= 0
            for (one, other), allowed in zip(pairs.tolist(), most_edits.tolist(), strict=True)
        ]
        found.append(pairs[np.array(is_alike, dtype=bool)])
    return np.concatenate(found)
