"""Native loops over columns of sequences."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megaprot.common.content_hash import content_hashes


def gather(source: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int32]) -> NDArray[Any]:
    """Return ``source[starts[i] : starts[i] + lengths[i]]`` for each i, back to back."""
    places = np.cumsum(lengths, dtype=np.int64) - lengths
    result = np.empty(int(lengths.sum(dtype=np.int64)), dtype=source.dtype)
    gather_into(result, places, source, starts, lengths)
    return result


@numba.njit(cache=True, nogil=True)
def gather_into(
    destination: NDArray[Any],
    places: NDArray[np.int64],
    source: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
) -> None:
    """Copy ``lengths[i]`` items of ``source`` from ``starts[i]`` on to ``places[i]``.

    Native since there are millions; what stands side by side on both sides is copied as one.
    """
    item = 0
    while item < len(starts):
        start, place = starts[item], places[item]
        end = start + np.int64(lengths[item])
        item += 1
        while item < len(starts) and starts[item] == end and places[item] - place == end - start:
            end += np.int64(lengths[item])
            item += 1
        destination[place : place + end - start] = source[start:end]


def identifier_hashes(buffer: NDArray[np.uint8], bounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of the identifier that each ``buffer[bounds[i, 0] : bounds[i, 1]]`` begins with, ``bounds`` [n, 2].

    An identifier is the first word. Of UniProt's ``sp|P69905|HBA_HUMAN`` it is ``P69905``, as MMseqs2 writes it.
    """
    return content_hashes(*_identifiers(buffer, bounds))


@numba.njit(cache=True, nogil=True)
def _identifiers(buffer: NDArray[np.uint8], bounds: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the identifiers back to back, and where each starts and the last ends, int64 [n + 1].

    Native since it looks at single letters of every record.
    """
    space, bar = np.uint8(32), np.uint8(124)  # white space and control characters go up to the space
    letters = np.empty((bounds[:, 1] - bounds[:, 0]).sum(), dtype=np.uint8)
    ends = np.zeros(len(bounds) + 1, dtype=np.int64)
    num_letters = 0
    for record in range(len(bounds)):
        start, end = bounds[record, 0], bounds[record, 1]
        while start < end and buffer[start] <= space:
            start += 1
        stop = start
        while stop < end and buffer[stop] > space:
            stop += 1
        if stop - start > 3 and buffer[start + 2] == bar:
            database = buffer[start] * 256 + buffer[start + 1]
            if database == 29552 or database == 29810 or database == 26466:  # "sp", "tr", "gb"
                start += 3
                place = start
                while place < stop and buffer[place] != bar:
                    place += 1
                stop = place
        for place in range(start, stop):
            letters[num_letters] = buffer[place]
            num_letters += 1
        ends[record + 1] = num_letters
    return letters[:num_letters], ends
