"""An index from k-mers to the sequences that hold them, and the pairs of sequences that share enough of them.

All is native code: each letter of a corpus passes through it, and a Python loop is a hundred times too slow.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; spreads the letters over the high bits
MOST_SEQUENCES = 1 << 24  # a posting has 24 bits for a rank
MOST_LETTERS = 1 << 31
_MANY = 255  # a count of this many or more
_NO_RANK = np.iinfo(np.int32).max


class KmerTable(NamedTuple):
    """Which sequences hold a k-mer, and how often.

    K-mers are hashed into ``len(starts) - 1`` buckets; two that meet in one count as the same, which adds candidates
    and loses none. Bucket b has ``postings`` uint32 from place ``starts[b]`` to ``starts[b + 1]`` (uint32): a rank in
    the upper 24 bits (a place in ``order`` int64 [num_sequences], which holds sequence numbers; ascending in a bucket,
    each once) and a count in the lower 8 (255: 255 or more). ``first_ranks`` int32 [num_buckets] is the rank of a
    bucket's first posting, above all others where it has none.
    """

    starts: NDArray[np.uint32]
    first_ranks: NDArray[np.int32]
    postings: NDArray[np.uint32]
    order: NDArray[np.int64]
    kmer_length: int
    step: int

    @staticmethod
    def build(
        letters: NDArray[np.uint8], bounds: NDArray[np.int64], order: NDArray[np.int64], kmer_length: int, step: int
    ) -> "KmerTable":
        """Index the k-mers at the places 0, ``step``, 2 ``step``, ... of every sequence, ranked as in ``order``."""
        num_bits = max(12, int(len(letters) // step).bit_length() - 1)
        return KmerTable(*_built(letters, bounds, order, kmer_length, step, num_bits), order, kmer_length, step)


@numba.njit(cache=True, nogil=True)
def _buckets(
    letters: NDArray[np.uint8],
    start: np.int64,
    end: np.int64,
    kmer_length: int,
    step: int,
    shift: np.uint64,
    buckets: NDArray[np.int64],
) -> int:
    """Write the buckets of a sequence's k-mers at every ``step``-th place to ``buckets`` and return how many."""
    mask = np.uint64((1 << (8 * kmer_length)) - 1)
    code = np.uint64(0)
    num_kmers = 0
    next_end = start + kmer_length - 1
    for place in range(start, end):
        code = ((code << np.uint64(8)) | np.uint64(letters[place])) & mask
        if place == next_end:
            buckets[num_kmers] = np.int64((code * _FACTOR) >> shift)
            num_kmers += 1
            next_end += step
    return num_kmers


@numba.njit(cache=True, nogil=True)
def _built(
    letters: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    order: NDArray[np.int64],
    kmer_length: int,
    step: int,
    num_bits: int,
) -> tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.uint32]]:
    """Return ``starts``, ``first_ranks`` and ``postings`` of a table of 2**num_bits buckets, by a counting sort."""
    shift = np.uint64(64 - num_bits)
    buckets = np.empty(np.max(np.diff(bounds)) if len(order) else 0, dtype=np.int64)
    last_ranks = np.full(1 << num_bits, -1, dtype=np.int32)
    ends = np.zeros((1 << num_bits) + 1, dtype=np.uint32)
    for rank in range(len(order)):
        number = order[rank]
        for kmer in range(_buckets(letters, bounds[number], bounds[number + 1], kmer_length, step, shift, buckets)):
            bucket = buckets[kmer]
            if last_ranks[bucket] != rank:
                last_ranks[bucket] = rank
                ends[bucket + 1] += np.uint32(1)
    for bucket in range(1 << num_bits):
        ends[bucket + 1] += ends[bucket]
    postings = np.empty(ends[-1], dtype=np.uint32)
    first_ranks = np.full(1 << num_bits, _NO_RANK, dtype=np.int32)
    last_ranks[:] = -1
    for rank in range(len(order)):  # ends[b] goes from the first place of bucket b to the one behind its last
        number = order[rank]
        for kmer in range(_buckets(letters, bounds[number], bounds[number + 1], kmer_length, step, shift, buckets)):
            bucket = buckets[kmer]
            if last_ranks[bucket] != rank:
                if last_ranks[bucket] < 0:
                    first_ranks[bucket] = rank
                last_ranks[bucket] = rank
                postings[ends[bucket]] = np.uint32(rank << 8 | 1)
                ends[bucket] += np.uint32(1)
            elif postings[ends[bucket] - np.uint32(1)] & np.uint32(_MANY) < np.uint32(_MANY):
                postings[ends[bucket] - np.uint32(1)] += np.uint32(1)
    starts = np.zeros((1 << num_bits) + 1, dtype=np.uint32)
    starts[1:] = ends[:-1]
    return starts, first_ranks, postings


@numba.njit(cache=True, nogil=True)
def _merge_equal(
    buckets: NDArray[np.int64],
    num_kmers: int,
    weights: NDArray[np.int32],
    slots: NDArray[np.int32],
    used_slots: NDArray[np.int32],
) -> int:
    """Move the distinct ones of ``buckets[:num_kmers]`` to its front, count them in ``weights``, return their number.

    So that what repeats itself costs no more than what does not. ``slots`` is a hash table, all -1 before and after.
    """
    mask = 1
    while mask < 2 * num_kmers:
        mask *= 2
    mask -= 1
    num_distinct = 0
    for kmer in range(num_kmers):
        bucket = buckets[kmer]
        slot = bucket & mask
        while slots[slot] >= 0 and buckets[slots[slot]] != bucket:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = num_distinct
            used_slots[num_distinct] = slot
            buckets[num_distinct] = bucket
            weights[num_distinct] = 1
            num_distinct += 1
        else:
            weights[slots[slot]] += 1
    for kmer in range(num_distinct):
        slots[used_slots[kmer]] = -1
    return num_distinct


@numba.njit(cache=True, nogil=True)
def _count_shared(
    table: KmerTable,
    buckets: NDArray[np.int64],
    weights: NDArray[np.int32],
    num_distinct: int,
    num_ranks: int,
    num_spoilt: np.int64,
    num_shared: NDArray[np.int32],
    found: NDArray[np.int32],
) -> tuple[int, np.int64]:
    """Count in ``num_shared`` the k-mers of a query that each rank below ``num_ranks`` holds; list these in ``found``.

    A k-mer that either holds several times counts as often as both do. Stops as soon as no rank holds all but
    ``num_spoilt`` of the k-mers looked up so far, which most queries do after little more than ``num_spoilt``. Return
    the length of ``found`` and how many k-mers were looked up.
    """
    starts, postings = table.starts, table.postings
    num_found, num_looked_up, most_shared = 0, np.int64(0), np.int32(0)
    for kmer in range(num_distinct):
        weight = weights[kmer]
        for place in range(np.int64(starts[buckets[kmer]]), np.int64(starts[buckets[kmer] + 1])):
            posting = postings[place]
            rank = np.int32(posting >> np.uint32(8))
            if rank >= num_ranks:
                break
            count = np.int32(posting & np.uint32(_MANY))
            before = num_shared[rank]
            found[num_found] = rank
            num_found += before == 0
            num_shared[rank] = before + (weight if count == _MANY else min(weight, count))
            most_shared = max(most_shared, num_shared[rank])
        num_looked_up += weight
        if most_shared < num_looked_up - num_spoilt:
            break
    return num_found, num_looked_up


@numba.njit(cache=True, nogil=True)
def _longer_sharing(
    table: KmerTable,
    buckets: NDArray[np.int64],
    weights: NDArray[np.int32],
    num_distinct: int,
    num_ranks: int,
    num_spoilt: np.int64,
    num_shared: NDArray[np.int32],
    found: NDArray[np.int32],
) -> int:
    """Write the ranks below ``num_ranks`` that hold all but ``num_spoilt`` of a query's k-mers, and one, to ``found``.

    Return how many.
    """
    num_found, num_looked_up = _count_shared(
        table, buckets, weights, num_distinct, num_ranks, num_spoilt, num_shared, found
    )
    least_shared = max(num_looked_up - num_spoilt, 1)
    num_kept = 0
    for place in range(num_found):
        rank = found[place]
        found[num_kept] = rank
        num_kept += num_shared[rank] >= least_shared
        num_shared[rank] = 0
    return num_kept


@numba.njit(cache=True, nogil=True)
def _shorter_shared(
    table: KmerTable,
    buckets: NDArray[np.int64],
    weights: NDArray[np.int32],
    num_distinct: int,
    num_ranks: int,
    least_shared: NDArray[np.int64],
    num_shared: NDArray[np.int32],
    found: NDArray[np.int32],
) -> int:
    """Write the ranks below ``num_ranks`` of which a query holds ``least_shared`` [num_ranks] k-mers to ``found``.

    Return how many.
    """
    first_ranks = table.first_ranks
    num_met, num_kmers = 0, np.int64(0)
    for kmer in range(num_distinct):  # most buckets hold nothing that is shorter than the query
        num_kmers += weights[kmer]
        buckets[num_met] = buckets[kmer]
        weights[num_met] = weights[kmer]
        num_met += first_ranks[buckets[kmer]] < num_ranks
    num_found, _ = _count_shared(table, buckets, weights, num_met, num_ranks, num_kmers, num_shared, found)
    num_kept = 0
    for place in range(num_found):
        rank = found[place]
        found[num_kept] = rank
        num_kept += num_shared[rank] >= least_shared[rank]
        num_shared[rank] = 0
    return num_kept


@numba.njit(cache=True, nogil=True)
def _with_pairs(
    pairs: NDArray[np.int64],
    num_pairs: int,
    query: int,
    order: NDArray[np.int64],
    found: NDArray[np.int32],
    num_found: int,
) -> NDArray[np.int64]:
    """Append ``query`` with each of ``found[:num_found]`` to ``pairs[:num_pairs]``; return it, or a larger copy."""
    if num_pairs + num_found > len(pairs):
        larger = np.empty((2 * (num_pairs + num_found), 2), dtype=np.int64)
        larger[:num_pairs] = pairs[:num_pairs]
        pairs = larger
    for place in range(num_found):
        pairs[num_pairs + place, 0] = query
        pairs[num_pairs + place, 1] = order[found[place]]
    return pairs


@numba.njit(cache=True, nogil=True)
def candidate_pairs(
    letters: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    num_spoilt: NDArray[np.int64],
    sorted_lengths: NDArray[np.int64],
    longer: KmerTable,
    shorter: KmerTable,
    least_shared: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return int64 [num_pairs, 2], (query, indexed sequence), of those that share enough k-mers.

    ``longer`` holds all k-mers of the indexed sequences, longest first; those at least as long as a query (of
    ``sorted_lengths``, ascending) must hold all but ``num_spoilt`` [num_queries] of its k-mers that stand side by side,
    and at least one. ``shorter`` holds those of the indexed sequences that stand side by side, shortest first; of the
    ones shorter than the query, a query must hold ``least_shared`` [num_sequences, in this order].
    """
    num_indexed = len(sorted_lengths)
    most_letters = np.max(np.diff(bounds)) if len(bounds) > 1 else 0
    num_slots = 1
    while num_slots < 2 * most_letters:
        num_slots *= 2
    slots = np.full(num_slots, -1, dtype=np.int32)
    used_slots = np.empty(most_letters, dtype=np.int32)
    buckets = np.empty(most_letters, dtype=np.int64)
    weights = np.empty(most_letters, dtype=np.int32)
    num_shared = np.zeros(num_indexed, dtype=np.int32)
    found = np.empty(num_indexed + 1, dtype=np.int32)  # one more: written before it is known whether it counts
    shifts = (_shift(longer), _shift(shorter))
    pairs = np.empty((1024, 2), dtype=np.int64)
    num_pairs = 0
    for query in range(len(bounds) - 1):
        start, end = bounds[query], bounds[query + 1]
        num_shorter = np.searchsorted(sorted_lengths, end - start)
        num_kmers = _buckets(letters, start, end, longer.kmer_length, longer.kmer_length, shifts[0], buckets)
        num_distinct = _merge_equal(buckets, num_kmers, weights, slots, used_slots)
        num_found = _longer_sharing(
            longer, buckets, weights, num_distinct, num_indexed - num_shorter, num_spoilt[query], num_shared, found
        )
        pairs = _with_pairs(pairs, num_pairs, query, longer.order, found, num_found)
        num_pairs += num_found
        if num_shorter:
            num_kmers = _buckets(letters, start, end, shorter.kmer_length, 1, shifts[1], buckets)
            num_distinct = _merge_equal(buckets, num_kmers, weights, slots, used_slots)
            num_found = _shorter_shared(
                shorter, buckets, weights, num_distinct, num_shorter, least_shared, num_shared, found
            )
            pairs = _with_pairs(pairs, num_pairs, query, shorter.order, found, num_found)
            num_pairs += num_found
    return pairs[:num_pairs]


@numba.njit(cache=True, nogil=True)
def _shift(table: KmerTable) -> np.uint64:
    """Return by how many bits a hash is shifted to give a bucket of the table."""
    shift = 64
    while (len(table.starts) - 1) >> (64 - shift) > 1:
        shift -= 1
    return np.uint64(shift)


@numba.njit(cache=True, nogil=True)
def holding_pairs(
    letters: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    numbers: NDArray[np.int64],
    piece_length: int,
    text_letters: NDArray[np.uint8],
    text_bounds: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return int64 [num_pairs, 2], (sequence, text), of the texts that hold a piece of a sequence.

    The sequences are those of ``numbers``; their pieces have ``piece_length`` letters, at most 8, and stand side by
    side. One pass over the texts.
    """
    num_pieces = 0
    for number in numbers:
        num_pieces += (bounds[number + 1] - bounds[number]) // piece_length
    codes = np.empty(num_pieces, dtype=np.uint64)
    owners = np.empty(num_pieces, dtype=np.int64)
    may_hold = np.zeros(1 << 16, dtype=np.bool_)
    place = 0
    for owner, number in enumerate(numbers):
        for start in range(bounds[number], bounds[number + 1] - piece_length + 1, piece_length):
            codes[place] = _code(letters, start, piece_length)
            owners[place] = owner
            may_hold[(codes[place] * _FACTOR) >> np.uint64(48)] = True
            place += 1
    order = np.argsort(codes)
    codes, owners = codes[order], owners[order]
    last_texts = np.full(len(numbers), -1, dtype=np.int64)
    drop = np.uint64(8 * (8 - piece_length))
    pairs = np.empty((1024, 2), dtype=np.int64)
    num_pairs = 0
    for text in range(len(text_bounds) - 1):
        code = np.uint64(0)
        for place in range(text_bounds[text], text_bounds[text + 1]):
            code = (((code << np.uint64(8)) | np.uint64(text_letters[place])) << drop) >> drop
            if not may_hold[(code * _FACTOR) >> np.uint64(48)] or place - text_bounds[text] + 1 < piece_length:
                continue
            piece = np.searchsorted(codes, code)
            while piece < num_pieces and codes[piece] == code:
                if last_texts[owners[piece]] != text:
                    last_texts[owners[piece]] = text
                    if num_pairs == len(pairs):
                        pairs = np.concatenate((pairs, pairs))
                    pairs[num_pairs, 0] = numbers[owners[piece]]
                    pairs[num_pairs, 1] = text
                    num_pairs += 1
                piece += 1
    return pairs[:num_pairs]


@numba.njit(cache=True, nogil=True)
def _code(letters: NDArray[np.uint8], start: int, num_letters: int) -> np.uint64:
    """Return up to 8 letters as one number."""
    code = np.uint64(0)
    for place in range(start, start + num_letters):
        code = (code << np.uint64(8)) | np.uint64(letters[place])
    return code
