"""What all readers of sequence files are: records by the block or one by one, bad ones reported, never in silence."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.block import NO_FAMILY, SequenceBlock
from megaprot.common.sequence_readers.record import PFAM_FAMILY, Record, stop_at_bad_record
from megaprot.common.sequence_readers.source import Source

_SLICE_ROWS = 256  # rows gathered before their letters are counted
_BLOCK_LETTERS = 1 << 22


class Row(NamedTuple):
    """One record as a format's own reader finds it: ``header`` is identifier, white space, description."""

    line: int
    header: bytes
    sequence: bytes
    family: int = NO_FAMILY


class SequenceReader(ABC):
    """The records of one input; ``-`` is standard input.

    ``num_bytes`` and ``sha256`` describe the bytes read so far, as stored (compressed): the whole file's once it has
    been iterated over. ``on_bad_record`` is called with one clause naming file and line for each record without
    identifier or sequence, or with binary data in it, or that the format does not allow; where it returns, the record
    is skipped.

    Iterating raises InputError where the file is missing, unreadable, empty, truncated or not of the format.
    """

    def __init__(self, source: str | Path | Source, on_bad_record: Callable[[str], None] = stop_at_bad_record) -> None:
        self.source = source if isinstance(source, Source) else Source(source)
        self.path = self.source.path
        self.name = self.source.name
        self.on_bad_record = on_bad_record
        self._num_reported = 0

    @property
    def num_bytes(self) -> int:
        """Return the number of stored bytes read so far."""
        return self.source.num_bytes

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the stored bytes read so far, in hexadecimal; "" for a byte range."""
        return self.source.sha256

    def where(self, line: int) -> str:
        """Return ``file:line``, as messages begin; ``line`` is a record's."""
        return f"{self.name}:{line}"

    @abstractmethod
    def blocks(self) -> Iterator[SequenceBlock]:
        """Yield the good records in file order, many at a time, as columns."""

    def __iter__(self) -> Iterator[Record]:
        """Yield the good records in file order; a family that a column of the file names ends the description."""
        for block in self.blocks():
            letters, bounds = block.letters.tobytes(), block.bounds.tolist()
            headers, header_bounds = block.headers.tobytes(), block.header_bounds.tolist()
            families, lines = block.families.tolist(), block.lines.tolist()
            for place, (start, end) in enumerate(header_bounds):
                identifier, *rest = headers[start:end].split(None, 1)
                description = rest[0].strip().decode("utf-8", "replace") if rest else ""
                if families[place] != NO_FAMILY and not PFAM_FAMILY.search(description):
                    description = f"{description} PF{families[place]:05d};".lstrip()
                sequence = letters[bounds[place] : bounds[place + 1]]
                yield Record(identifier.decode("utf-8", "replace"), description, sequence, lines[place])

    def report(self, line: int, reason: str) -> None:
        """Tell of the bad record at ``line``."""
        self._num_reported += 1
        self.on_bad_record(f"{self.where(line)}: {reason}")

    def good_rows(self, rows: Iterable[Row]) -> list[Row]:
        """Return the rows that have an identifier and a sequence, and report the others."""
        good = []
        for row in rows:
            header = row.header.strip()
            if b"\0" in header or b"\0" in row.sequence:
                self.report(row.line, "the record holds binary data")
            elif not header:
                self.report(row.line, "the record has no identifier")
            elif not row.sequence:
                self.report(row.line, f"record '{shown(header)}' has no sequence")
            else:
                good.append(row)
        return good


class RowReader(SequenceReader):
    """A reader of a format whose records are found one after another: it says how, the rest is here."""

    @abstractmethod
    def _rows(self) -> Iterator[Row]:
        """Yield every record that can be told apart, those without header or sequence too; report what cannot be."""

    def blocks(self) -> Iterator[SequenceBlock]:
        """Yield the good records in file order, many at a time, as columns."""
        num_rows = 0
        rows = iter(self._rows())
        gathered: list[Row] = []
        num_letters = 0
        while piece := list(islice(rows, _SLICE_ROWS)):
            num_rows += len(piece)
            good = self.good_rows(piece)
            gathered += good
            num_letters += sum(len(row.sequence) for row in good)
            if num_letters >= _BLOCK_LETTERS:
                yield packed(gathered)
                gathered, num_letters = [], 0
        if gathered:
            yield packed(gathered)
        if num_rows == 0 and not self._num_reported:
            raise InputError(f"{self.name}: is empty: give a file with at least one sequence.")


def shown(header: bytes) -> str:
    """Return the identifier of a header for a message."""
    return header.split(None, 1)[0].decode("utf-8", "replace")


def packed(rows: list[Row]) -> SequenceBlock:
    """Return rows as columns."""
    letter_bounds = _bounds([len(row.sequence) for row in rows])
    header_bounds = _bounds([len(row.header) for row in rows])
    return SequenceBlock(
        letters=np.frombuffer(b"".join([row.sequence for row in rows]), dtype=np.uint8),
        bounds=letter_bounds,
        headers=np.frombuffer(b"".join([row.header for row in rows]), dtype=np.uint8),
        header_bounds=np.stack((header_bounds[:-1], header_bounds[1:]), axis=1),
        families=np.array([row.family for row in rows], dtype=np.int32),
        lines=np.array([row.line for row in rows], dtype=np.int64),
    )


def _bounds(lengths: list[int]) -> NDArray[np.int64]:
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds
