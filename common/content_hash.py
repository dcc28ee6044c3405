"""One 64-bit number for each of many sequences, from its content alone."""

import numba
import numpy as np
from numpy.typing import NDArray

from megaprot.common.counter_random import scalar_mix64

_SEED = np.uint64(0x4D656761_70726F74)
_FACTOR = np.uint64(0x9FB21C651E98DF25)  # odd, so that multiplying loses nothing


def content_hashes(ids: NDArray[np.integer], bounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return one hash for each sequence: sequence i is ``ids[bounds[i] : bounds[i + 1]]``, ``bounds`` int64 [n + 1].

    Equal sequences have equal hashes, wherever they stand; different ones share a hash with probability 2**-64, so
    whoever must not confuse them compares the sequences themselves. ``ids`` of another width have other hashes.
    """
    return _hashes(np.ascontiguousarray(ids).view(np.uint8), bounds * ids.itemsize)


@numba.njit(cache=True, nogil=True)
def _hashes(ids: NDArray[np.uint8], bounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the hashes of byte strings; native since a Python loop is a hundred times slower than reading them."""
    hashes = np.empty(len(bounds) - 1, dtype=np.uint64)
    for sequence in range(len(hashes)):
        start, end = bounds[sequence], bounds[sequence + 1]
        state = scalar_mix64(_SEED ^ np.uint64(end - start))  # mixed, or a first word could undo the length
        place = start
        while place + 8 <= end:  # eight ids of one byte make a word
            word = np.uint64(0)
            for byte in range(8):
                word |= np.uint64(ids[place + byte]) << np.uint64(8 * byte)
            state = _folded(state ^ word) * _FACTOR
            place += 8
        word = np.uint64(0)
        while place < end:
            word = (word << np.uint64(8)) | np.uint64(ids[place])
            place += 1
        hashes[sequence] = scalar_mix64(_folded(state ^ word) * _FACTOR)
    return hashes


@numba.njit(cache=True, nogil=True)
def _folded(word: np.uint64) -> np.uint64:
    """Return the word with its high bits laid over the low ones, which a multiplication alone never reaches."""
    return word ^ (word >> np.uint64(32))
