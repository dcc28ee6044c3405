"""Which sequences are nearly a stretch of an excluded one, or hold nearly the whole of one.

Corpora are often cut into domains, so that identity is measured along the shorter of two sequences wherever it fits the
longer one best: ``1 - d / len(shorter)``, where d is the least edit distance of the shorter sequence to any stretch of
the longer one. Of two sequences of one length the query counts as the shorter.

Candidates come from an index of k-mers and lose nothing, by the pigeonhole argument behind Jokinen and Ukkonen's q-gram
lemma ("Two algorithms for approximate string matching in static texts", MFCS 1991): of the n k-mers that stand side by
side in the shorter sequence, e edits spoil at most e, so that n - e of them stand somewhere in the longer one. edlib
(Sosic and Sikic, Bioinformatics 2017) then measures each candidate.
"""

from dataclasses import dataclass
from functools import cached_property

import edlib
import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.kmer_table import MOST_LETTERS, MOST_SEQUENCES, KmerTable, candidate_pairs, holding_pairs

SMALLEST_IDENTITY = 0.5
# Least identity and length of the k-mers. Long ones are rare, which is fast, but n - e must not be 0 for most lengths:
# it is above from 12, 15, 16, 21, 6 and 1 residues on.
_KMER_LENGTHS = ((0.9, 6), (0.85, 5), (0.8, 4), (0.7, 3), (0.6, 2), (SMALLEST_IDENTITY, 1))
_BATCH = 1024  # queries whose candidates, at low identities nearly all excluded sequences, are in memory at a time


@dataclass(frozen=True)
class Sequences:
    """Many sequences: number i is ``letters[bounds[i] : bounds[i + 1]]``, uint8 letters, int64 bounds."""

    letters: NDArray[np.uint8]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of letters of each."""
        return np.diff(self.bounds)

    def text(self, number: int) -> bytes:
        """Return the letters of one sequence."""
        return self.letters[self.bounds[number] : self.bounds[number + 1]].tobytes()


@dataclass(frozen=True)
class Matches:
    """The queries to leave out, ascending, each with the excluded sequence nearest to it.

    ``queries`` int64 [num_matches] and ``excluded`` int64 [num_matches] are sequence numbers, ``identities`` float32
    [num_matches]. Of excluded sequences equally near the first is named.
    """

    queries: NDArray[np.int64]
    excluded: NDArray[np.int64]
    identities: NDArray[np.float32]


def most_edits(lengths: NDArray[np.int64], identity: float) -> NDArray[np.int64]:
    """Return how many edits sequences of ``lengths`` may have and still reach ``identity``."""
    return np.floor((1 - identity) * lengths + 1e-9).astype(np.int64)  # 1 - 0.9 is a little less than 0.1


def nearest_excluded(queries: Sequences, excluded: Sequences, pairs: NDArray[np.int64], identity: float) -> Matches:
    """Measure candidate ``pairs`` int64 [num_pairs, 2] of (query, excluded) and keep each query's nearest, if any."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    lengths = np.minimum(queries.lengths[pairs[:, 0]], excluded.lengths[pairs[:, 1]])
    best: dict[int, tuple[int, int, int]] = {}  # query: (edits, length of the shorter, excluded)
    for (query, other), length, allowed in zip(
        pairs.tolist(), lengths.tolist(), most_edits(lengths, identity).tolist(), strict=True
    ):
        if query in best:  # only what is strictly nearer counts: edits / length below those of the best so far
            edits, of_length, _ = best[query]
            allowed = min(allowed, (edits * length - 1) // of_length)
        if allowed < 0:
            continue
        shorter, longer = queries.text(query), excluded.text(other)
        if len(shorter) > len(longer):
            shorter, longer = longer, shorter
        distance = edlib.align(shorter, longer, mode="HW", task="distance", k=allowed)["editDistance"]
        if distance >= 0:
            best[query] = (distance, length, other)
    found = np.array([(query, other, edits, length) for query, (edits, length, other) in best.items()], dtype=np.int64)
    found = found.reshape(-1, 4)
    return Matches(found[:, 0], found[:, 1], (1 - found[:, 2] / found[:, 3]).astype(np.float32))


class NearIdentityIndex:
    """An index of excluded sequences that finds every query of at least ``identity`` to one of them.

    ``letters`` uint8 [num_letters] (ASCII or vocabulary ids, the same as of queries) and ``bounds`` int64
    [num_excluded + 1] hold the excluded sequences. Nothing is missed, at any identity. Raises InputError for one below
    0.5, where chance alone makes sequences alike.

    The index takes about 14 bytes a letter. The lower the identity, the more candidates: of 80,000 domains against
    26,000 whole proteins, a fifth of them excluded, 50,000 a second pass at 0.9, 2,000 at 0.8, 90 at 0.75, 6 at 0.7.
    Sequences so short that k-mers may miss them (at 0.9 below 6, and of 10 and 11 residues) are looked for by one pass
    over all excluded sequences a call, some 20 ms for 10 M residues: give many queries at once.
    """

    method = "kmer"

    def __init__(self, letters: NDArray[np.uint8], bounds: NDArray[np.int64], identity: float) -> None:
        self.excluded = Sequences(letters, bounds)
        self.identity = check_identity(identity)
        if len(self.excluded) >= MOST_SEQUENCES or len(letters) >= MOST_LETTERS:
            raise InputError(
                f"exclude.files hold {len(self.excluded):,} sequences, {len(letters):,} residues: the index takes less "
                f"than {MOST_SEQUENCES:,} of less than {MOST_LETTERS:,}."
            )
        self.kmer_length = next(length for least, length in _KMER_LENGTHS if identity >= least)
        lengths = self.excluded.lengths
        order = np.argsort(lengths, kind="stable")
        # The excluded sequences as the longer ones: all their k-mers; as the shorter ones: those side by side.
        self._longer = KmerTable.build(letters, bounds, order[::-1].copy(), self.kmer_length, step=1)
        self._shorter = KmerTable.build(letters, bounds, order, self.kmer_length, step=self.kmer_length)
        self._sorted_lengths = lengths[order]
        num_kmers = self._sorted_lengths // self.kmer_length
        self._least_shared = np.maximum(num_kmers - most_edits(self._sorted_lengths, identity), 1)

    def matches(self, letters: NDArray[np.uint8], bounds: NDArray[np.int64]) -> Matches:
        """Return which of the queries, laid out as the excluded sequences are, to leave out, and for what."""
        queries = Sequences(letters, bounds)
        short_pairs = self._short_pairs(queries)
        found = [nearest_excluded(queries, self.excluded, short_pairs[:0], self.identity)]
        for start in range(0, len(queries), _BATCH):
            is_in_batch = (short_pairs[:, 0] >= start) & (short_pairs[:, 0] < start + _BATCH)
            pairs = np.concatenate((self._pairs(queries, start, start + _BATCH), short_pairs[is_in_batch]))
            found.append(nearest_excluded(queries, self.excluded, pairs, self.identity))
        columns = zip(*((each.queries, each.excluded, each.identities) for each in found), strict=True)
        return Matches(*map(np.concatenate, columns))

    def _pairs(self, queries: Sequences, start: int, end: int) -> NDArray[np.int64]:
        """Return the (query, excluded), of the queries from ``start`` to ``end``, that share enough k-mers."""
        pairs = candidate_pairs(
            queries.letters,
            queries.bounds[start : end + 1],
            most_edits(queries.lengths[start:end], self.identity),
            self._sorted_lengths,
            self._longer,
            self._shorter,
            self._least_shared,
        )
        return pairs + np.array([start, 0])

    def _short_pairs(self, queries: Sequences) -> NDArray[np.int64]:
        """Return the candidates of which one is too short for n - e to be positive."""
        with_short_query = self._holding_pieces(queries, self.excluded)
        # Without edits the first that holds it is as near as any other can be.
        _, firsts = np.unique(with_short_query[:, 0], return_index=True)
        is_wanted = most_edits(queries.lengths[with_short_query[:, 0]], self.identity) > 0
        is_wanted[firsts] = True
        with_short_excluded = self._holding_pieces(self.excluded, queries)[:, ::-1]
        return np.unique(np.concatenate((with_short_query[is_wanted], with_short_excluded)), axis=0)

    def _holding_pieces(self, patterns: Sequences, texts: Sequences) -> NDArray[np.int64]:
        """Return int64 [n, 2], (pattern, text) ascending, of short patterns and the texts that may hold them.

        Of e + 1 pieces of one length that stand side by side in a pattern, e edits leave one at least as it is.
        """
        lengths, num_edits = patterns.lengths, most_edits(patterns.lengths, self.identity)
        is_short = (lengths // self.kmer_length <= num_edits) & (lengths > 0)
        piece_lengths = np.where(is_short, lengths // (num_edits + 1), 0)
        found = [np.empty((0, 2), dtype=np.int64)]
        for piece_length in np.unique(piece_lengths[is_short]).tolist():
            numbers = np.flatnonzero(piece_lengths == piece_length)
            found.append(
                holding_pairs(patterns.letters, patterns.bounds, numbers, piece_length, texts.letters, texts.bounds)
            )
        pairs = np.concatenate(found)
        return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def check_identity(identity: float) -> float:
    """Return ``identity``; raises InputError unless it is from 0.5 to 1."""
    if not SMALLEST_IDENTITY <= identity <= 1:
        raise InputError(
            f"exclude.identity is {identity}: give a fraction from {SMALLEST_IDENTITY} to 1; below, chance alone makes "
            "sequences alike."
        )
    return identity
