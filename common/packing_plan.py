"""The plan of an epoch: which sequences share each row, by best fit over shuffled windows, at the speed of memory.

Best fit is Johnson's (1974): a sequence goes to the open row with the least room that still takes it. The loops are
native: a corpus of the size of Pfam has 34 million sequences, and every epoch packs them anew.
"""

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from megaprot.common.counter_random import key, scalar_bits
from megaprot.common.errors import InputError

# What a key is drawn for: numbers of the same (seed, epoch) never meet.
_ORDER_OF_SEQUENCES, _ORDER_OF_ROWS = 1, 2
# Sequences are taken longest first inside shuffled windows of this many. Larger windows pack closer but put sequences
# of like length together in a row; with 256, rows of 2,048 lose about 0.2 % to padding and rows of 512 about 0.8 %.
_WINDOW = 256
_NO_ROW = -1
# The place of a word's only set bit, from the top 6 bits of its product with a de Bruijn sequence.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF_PRODUCT = np.zeros(64, dtype=np.int64)
for _bit in range(64):
    _BIT_OF_PRODUCT[((0x03F79D71B4CB0A89 << _bit) % 2**64) >> 58] = _bit


@dataclass(frozen=True)
class PackingPlan:
    """Which sequences each row of one epoch holds.

    ``row_starts`` int64 [num_rows + 1] points into ``sequence_ids`` (int32, or int64 from 2**31 sequences on)
    [num_sequences], where every sequence of the epoch stands exactly once.
    """

    row_starts: NDArray[np.int64]
    sequence_ids: NDArray[np.integer]

    @property
    def num_rows(self) -> int:
        """Number of rows of the epoch."""
        return len(self.row_starts) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        """Return the sequence numbers of row ``index``, int64 [num_sequences], in the order they stand in it."""
        return self.sequence_ids[self.row_starts[index] : self.row_starts[index + 1]].astype(np.int64)


def check_row_shape(row_tokens: int, max_sequence_length: int, num_boundary_tokens: int) -> None:
    """Raise InputError unless a sequence of at least one residue, boundary tokens included, fits a row."""
    if max_sequence_length <= num_boundary_tokens:
        raise InputError(
            f"data.max_sequence_length is {max_sequence_length}, which leaves no residue beside "
            f"{num_boundary_tokens} boundary token(s): give at least {num_boundary_tokens + 1}"
        )
    if max_sequence_length > row_tokens:
        raise InputError(
            f"data.max_sequence_length ({max_sequence_length}) is larger than data.row_tokens ({row_tokens}): "
            "lower the first or raise the second"
        )


def plan_epoch(
    lengths: NDArray[np.integer],
    row_tokens: int,
    max_sequence_length: int,
    num_boundary_tokens: int,
    seed: int,
    epoch: int,
) -> PackingPlan:
    """Put every sequence into a row of ``row_tokens``, by best fit over windows of an order drawn from (seed, epoch).

    ``lengths`` [num_sequences] are in residues; a sequence takes ``num_boundary_tokens`` more and is cut at
    ``max_sequence_length`` with them. Rows come in a second random order, since the first ones opened are the fullest.
    A pure function of its arguments, made of integers only and so the same on every machine. Memory: 12 bytes a
    sequence. Raises InputError when no sequence can fit.
    """
    check_row_shape(row_tokens, max_sequence_length, num_boundary_tokens)
    lengths = np.ascontiguousarray(lengths)
    order = _numbers(len(lengths))
    _shuffle(order, key(_ORDER_OF_SEQUENCES, seed, epoch))
    row_of, num_rows = _best_fit(order, lengths, row_tokens, max_sequence_length, num_boundary_tokens)
    new_numbers = _numbers(num_rows)
    _shuffle(new_numbers, key(_ORDER_OF_ROWS, seed, epoch))
    return PackingPlan(*_grouped(order, row_of, new_numbers))


def _numbers(num_items: int) -> NDArray[np.integer]:
    return np.arange(num_items, dtype=np.int32 if num_items < 2**31 else np.int64)


@numba.njit(cache=True, nogil=True)
def _shuffle(items: NDArray[np.integer], key: np.uint64) -> None:
    """Put items into a random order (Durstenfeld's shuffle, the draws being the stream ``key``)."""
    for last in range(len(items) - 1, 0, -1):
        bits, bound = scalar_bits(key, last), np.uint64(last + 1)
        low = (bits & np.uint64(0xFFFFFFFF)) * bound >> np.uint64(32)
        other = np.int64(((bits >> np.uint64(32)) * bound + low) >> np.uint64(32))  # bits * bound / 2**64, rounded down
        items[last], items[other] = items[other], items[last]


@numba.njit(cache=True, nogil=True)
def _best_fit(
    order: NDArray[np.integer], lengths: NDArray[np.integer], row_tokens: int, longest: int, num_boundary_tokens: int
) -> tuple[NDArray[np.integer], int]:
    """Sort ``order`` in place, window by window; return the row of each sequence of it and the number of rows.

    Rows of equal room form a stack: ``top_row`` [row_tokens + 1] by free tokens, and ``row_below`` by row. Bit r of
    ``rooms`` is set when a row with r free tokens exists, bit w of ``used_words`` when word w of ``rooms`` is not 0.
    """
    total = 0
    for length in lengths:
        total += min(int(length) + num_boundary_tokens, longest)
    row_of = np.empty(len(order), dtype=order.dtype)
    row_below = np.empty(2 * total // row_tokens + 2, dtype=order.dtype)  # any two rows hold more than one row's tokens
    top_row = np.full(row_tokens + 1, _NO_ROW, dtype=np.int64)
    rooms = np.zeros(row_tokens // 64 + 1, dtype=np.uint64)
    used_words = np.zeros(len(rooms) // 64 + 1, dtype=np.uint64)
    needs = np.empty(_WINDOW, dtype=np.int64)
    num_rows = 0
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        _sort_window(window, lengths, longest - num_boundary_tokens, needs)
        for place in range(len(window)):
            needed = needs[place] + num_boundary_tokens
            room = _first_set_bit(rooms, used_words, needed)
            if room < 0:
                room, row = row_tokens, num_rows
                num_rows += 1
            else:
                row = top_row[room]
                top_row[room] = row_below[row]
                if top_row[room] == _NO_ROW:
                    _flip(rooms, room)
                    if not rooms[room >> 6]:
                        _flip(used_words, room >> 6)
            room -= needed
            if top_row[room] == _NO_ROW:
                if not rooms[room >> 6]:
                    _flip(used_words, room >> 6)
                _flip(rooms, room)
            row_below[row] = top_row[room]
            top_row[room] = row
            row_of[start + place] = row
    return row_of, num_rows


@numba.njit(cache=True, nogil=True)
def _sort_window(
    window: NDArray[np.integer], lengths: NDArray[np.integer], longest: int, sorted_lengths: NDArray[np.int64]
) -> None:
    """Sort sequences by length, longest first, equals staying in order; give their lengths, cut at ``longest``."""
    size = len(window)
    for place in range(size):
        sorted_lengths[place] = (longest - min(int(lengths[window[place]]), longest)) * _WINDOW + place
    sort_keys = np.sort(sorted_lengths[:size])
    before = window.copy()
    for place in range(size):
        window[place] = before[sort_keys[place] % _WINDOW]
        sorted_lengths[place] = longest - sort_keys[place] // _WINDOW


@numba.njit(cache=True, nogil=True)
def _flip(words: NDArray[np.uint64], bit: int) -> None:
    """Turn one bit of a bit set over."""
    words[bit >> 6] ^= np.uint64(1) << np.uint64(bit & 63)


@numba.njit(cache=True, nogil=True)
def _lowest_bit(word: np.uint64) -> int:
    """Return the place of the lowest set bit of a word that is not 0."""
    return _BIT_OF_PRODUCT[((word & (~word + np.uint64(1))) * _DE_BRUIJN) >> np.uint64(58)]


@numba.njit(cache=True, nogil=True)
def _first_set_bit(words: NDArray[np.uint64], used_words: NDArray[np.uint64], start: int) -> int:
    """Return the number of the first set bit of ``words`` from ``start`` on, or -1.

    ``used_words`` has a set bit for each word that is not 0.
    """
    word = start >> 6
    bits = words[word] >> np.uint64(start & 63)
    if bits:
        return start + _lowest_bit(bits)
    word += 1
    group = word >> 6
    if group == len(used_words):
        return -1
    bits = used_words[group] >> np.uint64(word & 63) << np.uint64(word & 63)
    while not bits:
        group += 1
        if group == len(used_words):
            return -1
        bits = used_words[group]
    word = (group << 6) + _lowest_bit(bits)
    return (word << 6) + _lowest_bit(words[word])


@numba.njit(cache=True, nogil=True)
def _grouped(
    order: NDArray[np.integer], row_of: NDArray[np.integer], new_numbers: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """Return row starts and the sequences row by row, row r being numbered ``new_numbers[r]``."""
    row_starts = np.zeros(len(new_numbers) + 1, dtype=np.int64)
    for row in row_of:
        row_starts[new_numbers[row] + 1] += 1
    row_starts = np.cumsum(row_starts)
    free = row_starts.copy()
    sequence_ids = np.empty_like(order)
    for place in range(len(order)):
        row = new_numbers[row_of[place]]
        sequence_ids[free[row]] = order[place]
        free[row] += 1
    return row_starts, sequence_ids
