"""Which sequences are nearly a stretch of an excluded one, or hold nearly the whole of one.

Corpora are often cut into domains, so that identity is measured along the shorter of two sequences wherever it fits the
longer one best: ``1 - d / len(shorter)``, where d is the least edit distance of the shorter sequence to any stretch of
the longer one. Of two sequences of one length the query counts as the shorter.

Candidates come from an index of k-mers and lose nothing, by the pigeonhole argument behind Jokinen and Ukkonen's q-gram
lemma ("Two algorithms for approximate string matching in static texts", MFCS 1991): of the n k-mers that stand side by
side in the shorter sequence, e edits spoil at most e, so that n - e of them stand somewhere in the longer one. edlib
(Sosic and Sikic, Bioinformatics 2017) then measures each candidate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise

import edlib
import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.kmer_table import MOST_LETTERS, MOST_SEQUENCES, KmerTable, candidate_pairs

SMALLEST_IDENTITY = 0.5
# Least identity and length of the k-mers. Long ones are rare, which is fast, but n - e must not be 0 for most lengths:
# it is above from 12, 15, 16, 21, 6 and 1 residues on.
_KMER_LENGTHS = ((0.9, 6), (0.85, 5), (0.8, 4), (0.7, 3), (0.6, 2), (SMALLEST_IDENTITY, 1))
_BATCH = 1024  # queries whose candidates, at low identities nearly all excluded sequences, are in memory at a time
_SEPARATOR = 0xFF  # stands in no sequence


@dataclass(frozen=True)
class Sequences:
    """Many sequences: number i is ``letters[bounds[i] : bounds[i + 1]]``, uint8 letters below 255, int64 bounds."""

    letters: NDArray[np.uint8]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of letters of each."""
        return np.diff(self.bounds)

    def text(self, number: int) -> bytes:
        """Return the letters of one sequence."""
        return self.letters[self.bounds[number] : self.bounds[number + 1]].tobytes()

    @cached_property
    def joined(self) -> bytes:
        """Return all sequences, each followed by a separator."""
        return np.insert(self.letters[: self.bounds[-1]], self.bounds[1:], _SEPARATOR).tobytes()

    @cached_property
    def _joined_starts(self) -> NDArray[np.int64]:
        return self.bounds[:-1] + np.arange(len(self))

    def numbers_holding(self, piece: bytes) -> Iterator[int]:
        """Yield the numbers of the sequences that ``piece`` is a stretch of, ascending."""
        place = self.joined.find(piece)
        while place >= 0:
            yield int(np.searchsorted(self._joined_starts, place, side="right")) - 1
            place = self.joined.find(piece, self.joined.index(_SEPARATOR, place))


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

    ``letters`` uint8 [num_letters] (ASCII or vocabulary ids, below 255, the same for queries) and ``bounds`` int64
    [num_excluded + 1] hold the excluded sequences, from bound 0 on. Nothing is missed at any identity. Raises InputError
    for one below 0.5, where chance alone makes sequences alike.

    The index takes about 14 bytes a letter. The lower the identity, the more candidates: of 80,000 domains against
    26,000 whole proteins, a fifth of them excluded, 50,000 a second pass at 0.9, 2,000 at 0.8, 90 at 0.75, 6 at 0.7.
    Sequences so short that the k-mers may miss them (at 0.9 below 6, and of 10 and 11 residues) are searched for as
    text, which takes milliseconds each.
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
        found = []
        for start in range(0, len(bounds) - 1, _BATCH):
            limits = bounds[start : start + _BATCH + 1]
            batch = Sequences(letters[limits[0] : limits[-1]], limits - limits[0])
            pairs = np.concatenate((self._pairs(batch), self._short_pairs(batch)))
            matches = nearest_excluded(batch, self.excluded, pairs, self.identity)
            found.append(Matches(matches.queries + start, matches.excluded, matches.identities))
        return _joined(found)

    def _pairs(self, queries: Sequences) -> NDArray[np.int64]:
        """Return the (query, excluded) that share enough k-mers."""
        return candidate_pairs(
            queries.letters,
            queries.bounds,
            most_edits(queries.lengths, self.identity),
            self._sorted_lengths,
            self._longer,
            self._shorter,
            self._least_shared,
        )

    def _short_pairs(self, queries: Sequences) -> NDArray[np.int64]:
        """Return the candidates of which one is too short for n - e to be positive.

        Cut into e + 1 pieces, it has one at least that e edits leave unchanged in the longer sequence.
        """
        pairs = []
        for query in self._short(queries):
            pieces = self._pieces(queries.text(query))
            numbers = (number for piece in pieces for number in self.excluded.numbers_holding(piece))
            # Without edits the first that holds it is as near as any other can be.
            pairs += [(query, number) for number in islice(numbers, 1 if len(pieces) == 1 else None)]
        for other in self._short_excluded:
            for piece in self._pieces(self.excluded.text(other)):
                pairs += [(query, other) for query in queries.numbers_holding(piece)]
        return np.unique(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=0)

    def _pieces(self, text: bytes) -> list[bytes]:
        """Return a sequence cut into one piece more than it may have edits."""
        num_pieces = int(most_edits(np.array(len(text)), self.identity)) + 1
        limits = [len(text) * piece // num_pieces for piece in range(num_pieces + 1)]
        return [text[start:end] for start, end in pairwise(limits)]

    @cached_property
    def _short_excluded(self) -> list[int]:
        return self._short(self.excluded)

    def _short(self, sequences: Sequences) -> list[int]:
        """Return the numbers of the sequences that k-mers may miss, without empty ones."""
        lengths = sequences.lengths
        may_miss = (lengths // self.kmer_length <= most_edits(lengths, self.identity)) & (lengths > 0)
        numbers: list[int] = np.flatnonzero(may_miss).tolist()
        return numbers


def _joined(matches: list[Matches]) -> Matches:
    """Return the matches of consecutive batches as one."""
    nothing = Matches(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
    columns = zip(*((each.queries, each.excluded, each.identities) for each in [nothing, *matches]), strict=True)
    return Matches(*map(np.concatenate, columns))


def check_identity(identity: float) -> float:
    """Return ``identity``; raises InputError unless it is from 0.5 to 1."""
    if not SMALLEST_IDENTITY <= identity <= 1:
        raise InputError(
            f"exclude.identity is {identity}: give a fraction from {SMALLEST_IDENTITY} to 1; below, chance alone makes "
            "sequences alike."
        )
    return identity
