"""How alike proteins are by the k-mers they share: all pairs of tens of thousands in seconds, without alignments.

    KmerIndex(sequences)                                   an index of distinct k-mers
    index.hits(queries, least_identity) -> Hits            every query's neighbours

The identity of two proteins is estimated from the share c of the shorter one's distinct k-mers that the other holds: a
k-mer outlives if each of its k residues does, so that identity = c ** (1 / k) (Ondov et al., "Mash", Genome Biology
2016; of containment, so that a domain is like the protein that holds it). Substitutions bunched together spoil fewer
k-mers than spread ones: the estimate is mostly above what an alignment gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from megaprot.common.vocabulary import STANDARD_RESIDUES

KMER_LENGTH = 5
LEAST_SHARED = 2
"""K-mers that two proteins must share to count as alike at all, short ones too: one may be chance."""
_NUM_CODES = len(STANDARD_RESIDUES) ** KMER_LENGTH
_OTHER = 255
_CODE_OF_LETTER = np.full(256, _OTHER, dtype=np.uint8)
for _code, _letter in enumerate(STANDARD_RESIDUES):
    _CODE_OF_LETTER[[ord(_letter), ord(_letter.lower())]] = _code


@dataclass(frozen=True, eq=False)
class Hits:
    """Neighbours of queries: those of query q are at places ``starts[q]`` to ``starts[q + 1]``, the most alike first.

    Attributes:
        starts: int64 [num_queries + 1].
        numbers: Numbers of the indexed sequences, int64 [num_hits].
        weights: How alike each is, above 0 and comparable within a query: the share of the distinct k-mers of both
            that both hold (Jaccard), or an aligner's bit score; float32 [num_hits].
    """

    starts: NDArray[np.int64]
    numbers: NDArray[np.int64]
    weights: NDArray[np.float32]

    @staticmethod
    def of(queries: NDArray[np.int64], numbers: NDArray[np.int64], weights: NDArray[np.float32], size: int) -> Hits:
        """Return hits given one by one, in any order, of ``size`` queries; of equal weights the lower number first."""
        order = np.lexsort((numbers, -weights, queries))
        starts = np.searchsorted(queries[order], np.arange(size + 1)).astype(np.int64)
        return Hits(starts, numbers[order].astype(np.int64), weights[order].astype(np.float32))


class KmerIndex:
    """Which sequences hold which k-mers of the 20 residues; k-mers with any other letter are passed over.

    Args:
        sequences: Letters in ASCII, of any case.
    """

    def __init__(self, sequences: Sequence[bytes]) -> None:
        kmers, bounds = _distinct_kmers(sequences)
        self.num_kmers = np.diff(bounds)
        self._starts = np.zeros(_NUM_CODES + 1, dtype=np.int64)
        np.cumsum(np.bincount(kmers, minlength=_NUM_CODES), out=self._starts[1:])
        owners = np.repeat(np.arange(len(sequences), dtype=np.int32), self.num_kmers)
        self._holders = owners[np.argsort(kmers, kind="stable")]

    def hits(self, queries: Sequence[bytes], least_identity: float) -> Hits:
        """Return every indexed sequence of at least an estimated identity to each query, weighted by Jaccard's share.

        Args:
            queries: Letters in ASCII.
            least_identity: From 0 to 1.
        """
        kmers, bounds = _distinct_kmers(queries)
        least_share = least_identity**KMER_LENGTH
        pairs, shared = _shared(kmers, bounds, self._starts, self._holders, self.num_kmers, least_share)
        of_either = np.diff(bounds)[pairs[:, 0]] + self.num_kmers[pairs[:, 1]] - shared
        return Hits.of(pairs[:, 0], pairs[:, 1], (shared / of_either).astype(np.float32), len(queries))


def _distinct_kmers(sequences: Sequence[bytes]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return each sequence's distinct k-mers, ascending, one after another, and where each sequence's begin."""
    letters = _CODE_OF_LETTER[np.frombuffer(b"".join(sequences), dtype=np.uint8)]
    bounds = np.cumsum([0, *map(len, sequences)])
    return _kmers_of(letters, bounds)


@numba.njit(cache=True, nogil=True)
def _kmers_of(letters: NDArray[np.uint8], bounds: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return what ``_distinct_kmers`` does, of coded letters; native because it visits every residue."""
    found = np.empty(len(letters), dtype=np.int32)
    starts = np.zeros(len(bounds), dtype=np.int64)
    num_found = 0
    for sequence in range(len(bounds) - 1):
        begin, code, run = num_found, 0, 0
        for place in range(bounds[sequence], bounds[sequence + 1]):
            if letters[place] == _OTHER:
                run, code = 0, 0
                continue
            code = (code * 20 + np.int64(letters[place])) % _NUM_CODES
            run += 1
            if run >= KMER_LENGTH:
                found[num_found] = code
                num_found += 1
        if num_found > begin:
            distinct = np.unique(found[begin:num_found])
            found[begin : begin + len(distinct)] = distinct
            num_found = begin + len(distinct)
        starts[sequence + 1] = num_found
    return found[:num_found].copy(), starts


@numba.njit(cache=True, nogil=True)
def _shared(
    kmers: NDArray[np.int32],
    bounds: NDArray[np.int64],
    starts: NDArray[np.int64],
    holders: NDArray[np.int32],
    num_kmers: NDArray[np.int64],
    least_share: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return int64 [num_pairs, 2], (query, indexed), of those that share enough k-mers, and how many they share.

    Native because it counts every k-mer that two sequences have in common.
    """
    counts = np.zeros(len(num_kmers), dtype=np.int32)
    met = np.empty(len(num_kmers), dtype=np.int32)
    pairs = np.empty((1024, 2), dtype=np.int64)
    shared = np.empty(1024, dtype=np.int64)
    num_pairs = 0
    for query in range(len(bounds) - 1):
        num_met = 0
        for kmer in kmers[bounds[query] : bounds[query + 1]]:
            for place in range(starts[kmer], starts[kmer + 1]):
                holder = holders[place]
                if counts[holder] == 0:
                    met[num_met] = holder
                    num_met += 1
                counts[holder] += 1
        of_query = bounds[query + 1] - bounds[query]
        for place in range(num_met):
            holder = met[place]
            count = counts[holder]
            counts[holder] = 0
            least = min(of_query, num_kmers[holder])
            if count < min(LEAST_SHARED, least) or count < least_share * least:
                continue
            if num_pairs == len(shared):
                larger_pairs = np.empty((2 * num_pairs, 2), dtype=np.int64)
                larger_shared = np.empty(2 * num_pairs, dtype=np.int64)
                larger_pairs[:num_pairs], larger_shared[:num_pairs] = pairs, shared
                pairs, shared = larger_pairs, larger_shared
            pairs[num_pairs, 0], pairs[num_pairs, 1] = query, holder
            shared[num_pairs] = count
            num_pairs += 1
    return pairs[:num_pairs], shared[:num_pairs]
