"""Many records of one file as columns: what the fast path of preprocessing works on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_FAMILY = -1


@dataclass(frozen=True)
class SequenceBlock:
    """Consecutive records of one file.

    ``letters`` uint8 [num_letters] are the sequences back to back, as the file has them but for line ends; record i has
    ``letters[bounds[i] : bounds[i + 1]]``, ``bounds`` being int64 [num_records + 1]. ``headers`` uint8 [num_bytes] is a
    buffer in which ``header_bounds`` int64 [num_records, 2] marks each record's header: identifier, white space,
    description. ``families`` int32 [num_records] are Pfam numbers (67 of PF00067), NO_FAMILY where none is named.
    ``lines`` int64 [num_records] say where each record begins in its file, from 1.
    """

    letters: NDArray[np.uint8]
    bounds: NDArray[np.int64]
    headers: NDArray[np.uint8]
    header_bounds: NDArray[np.int64]
    families: NDArray[np.int32]
    lines: NDArray[np.int64]

    @property
    def num_records(self) -> int:
        """Return the number of records."""
        return len(self.lines)

    def header(self, record: int) -> str:
        """Return the header of a record without the mark that begins it."""
        return self._header_bytes(record).strip().decode("utf-8", "replace")

    def identifier(self, record: int) -> str:
        """Return the first word of a record's header."""
        return self._header_bytes(record).split(None, 1)[0].decode("utf-8", "replace")

    def _header_bytes(self, record: int) -> bytes:
        start, end = self.header_bounds[record]
        return self.headers[start:end].tobytes()
