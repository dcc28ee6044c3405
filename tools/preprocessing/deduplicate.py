"""Finding exact duplicates among any number of sequences: hashes in buckets on disk, then the sequences themselves."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.tools.preprocessing.kernels import gather_into
from megaprot.tools.preprocessing.parts import pieces

BUCKET_SEQUENCES = 1 << 20  # at 24 bytes, which are held three times
MOST_BUCKETS = 512  # files that are open at once
_READ_SEQUENCES = 1 << 18
_COMPARED_PAIRS = 1 << 13  # at once: each may keep 64 KiB of a mapped file in memory


@dataclass(frozen=True)
class SequenceColumns:
    """Sequences back to back: ``lengths`` [n] and content ``hashes`` uint64 [n], both of which may be mapped.

    ``ids`` maps their ids, [num_ids], anew, so that what was looked at leaves memory when the result is let go.
    """

    ids: Callable[[], NDArray[Any]]
    lengths: NDArray[np.int32]
    hashes: NDArray[np.uint64]


class Duplicates:
    """Which sequences of a list of columns, numbered through, equal an earlier one.

    ``is_duplicate`` bool [num_sequences]. Memory: one byte a sequence and a bucket.
    """

    def __init__(self, columns: list[SequenceColumns], folder: Path) -> None:
        self.columns = columns
        self.first_numbers = np.cumsum([0, *(len(column.lengths) for column in columns)])
        self.is_duplicate = np.zeros(int(self.first_numbers[-1]), dtype=np.bool_)
        num_buckets = -(-len(self.is_duplicate) // BUCKET_SEQUENCES)
        self._bits = min(max(num_buckets - 1, 0).bit_length(), MOST_BUCKETS.bit_length() - 1)
        for bucket in self._fill_buckets(folder):
            self._search(bucket)
            bucket.unlink()

    def of_column(self, number: int) -> NDArray[np.bool_]:
        """Return which sequences of one of the columns are duplicates, [n]."""
        return self.is_duplicate[self.first_numbers[number] : self.first_numbers[number + 1]]

    def _fill_buckets(self, folder: Path) -> list[Path]:
        """Write (hash, number, start in its column) of each sequence to the file that its hash begins with."""
        paths = [folder / f"bucket-{number:03d}" for number in range(1 << self._bits)]
        with ExitStack() as stack:
            streams = [stack.enter_context(open(path, "wb")) for path in paths]
            for column, first in zip(self.columns, self.first_numbers.tolist(), strict=False):
                end = 0
                for start in range(0, len(column.lengths), _READ_SEQUENCES):
                    lengths = column.lengths[start : start + _READ_SEQUENCES]
                    ends = end + np.cumsum(lengths, dtype=np.int64)
                    rows = np.empty((len(lengths), 3), dtype=np.uint64)
                    rows[:, 0] = column.hashes[start : start + len(lengths)]
                    rows[:, 1] = np.arange(first + start, first + start + len(lengths))
                    rows[:, 2] = ends - lengths
                    end = int(ends[-1])
                    self._deal(rows, streams)
        return paths

    def _deal(self, rows: NDArray[np.uint64], streams: list[Any]) -> None:
        if self._bits == 0:
            streams[0].write(rows.data)
            return
        buckets = rows[:, 0] >> np.uint64(64 - self._bits)
        order = np.argsort(buckets, kind="stable")
        bounds = np.searchsorted(buckets[order], np.arange(len(streams) + 1, dtype=np.uint64))
        rows = rows[order]
        for stream, start, end in zip(streams, bounds[:-1], bounds[1:], strict=True):
            stream.write(rows[start:end].data)

    def _search(self, bucket: Path) -> None:
        """Mark the duplicates of one bucket."""
        rows = np.fromfile(bucket, dtype=np.uint64).reshape(-1, 3)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]  # numbers ascend among equal hashes
        is_same = rows[1:, 0] == rows[:-1, 0]
        later = np.flatnonzero(is_same) + 1
        if not len(later):
            return
        is_first = np.concatenate(([True], ~is_same))
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))[later]
        numbers, starts = rows[:, 1].astype(np.int64), rows[:, 2].astype(np.int64)
        is_equal = self._are_equal(numbers[later], starts[later], numbers[first], starts[first])
        self.is_duplicate[numbers[later[is_equal]]] = True
        for run in np.unique(first[~is_equal]):  # different sequences share a hash, which next to never happens
            self._search_run(numbers[[run, *later[first == run]]], starts[[run, *later[first == run]]])

    def _search_run(self, numbers: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        seen: set[bytes] = set()
        for number, start in zip(numbers, starts, strict=True):
            column = self._column_of(number)
            length = self.columns[column].lengths[number - self.first_numbers[column]]
            content = self.columns[column].ids()[start : start + length].tobytes()
            self.is_duplicate[number] = content in seen
            seen.add(content)

    def _column_of(self, numbers: Any) -> Any:
        return np.searchsorted(self.first_numbers, numbers, side="right") - 1

    def _are_equal(
        self,
        numbers: NDArray[np.int64],
        starts: NDArray[np.int64],
        other_numbers: NDArray[np.int64],
        other_starts: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Compare pairs of sequences letter by letter, a few million letters at a time."""
        lengths = self._lengths(numbers)
        is_equal = lengths == self._lengths(other_numbers)
        candidates = np.flatnonzero(is_equal)
        for first, end in pieces(lengths[candidates], _COMPARED_PAIRS):
            chunk = candidates[first:end]
            ends = np.cumsum(lengths[chunk], dtype=np.int64)
            one = self._content(numbers[chunk], starts[chunk], lengths[chunk])
            other = self._content(other_numbers[chunk], other_starts[chunk], lengths[chunk])
            different = np.flatnonzero(one != other)
            is_equal[chunk[np.searchsorted(ends, different, side="right")]] = False
        return is_equal

    def _lengths(self, numbers: NDArray[np.int64]) -> NDArray[np.int32]:
        lengths = np.empty(len(numbers), dtype=np.int32)
        columns = self._column_of(numbers)
        for column in np.unique(columns):
            is_here = columns == column
            lengths[is_here] = self.columns[column].lengths[numbers[is_here] - self.first_numbers[column]]
        return lengths

    def _content(
        self, numbers: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int32]
    ) -> NDArray[Any]:
        content = np.empty(int(lengths.sum(dtype=np.int64)), dtype=self.columns[0].ids().dtype)
        places = np.cumsum(lengths, dtype=np.int64) - lengths
        columns = self._column_of(numbers)
        for column in np.unique(columns):
            is_here = columns == column
            ids = np.asarray(self.columns[column].ids())
            gather_into(content, places[is_here], ids, starts[is_here], lengths[is_here])
        return content
