"""FASTA, plain or compressed, Pfam-A's among it: whole files at memory speed, or one byte range of a plain file.

The text is read in blocks that are cut where a line begins with ``>`` and go through one native loop each.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.block import SequenceBlock
from megaprot.common.sequence_readers.fasta_scan import (
    BINARY,
    GOOD,
    NO_IDENTIFIER,
    find_controls,
    padding,
    scan_records,
)
from megaprot.common.sequence_readers.reader import SequenceReader, shown
from megaprot.common.sequence_readers.record import Record, stop_at_bad_record
from megaprot.common.sequence_readers.source import BYTE_ORDER_MARK, Source

BLOCK_BYTES = 1 << 21
MAX_RECORD_BYTES = 1 << 26  # the longest known protein has under 50,000 residues


class FastaReader(SequenceReader):
    """The records of one FASTA file; see :class:`SequenceReader`.

    ``byte_range`` (start, end) leaves only those whose header begins in [start, end), so that any partition of a plain
    file's bytes gives each record once. Then ``num_bytes`` counts the bytes of the range that were read, ``sha256`` is
    "", and the lines of records are counted from the range's beginning; ``where`` makes them the file's.
    """

    def __init__(
        self,
        source: str | Path | Source,
        on_bad_record: Callable[[str], None] = stop_at_bad_record,
        byte_range: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(source, on_bad_record)
        self.byte_range = byte_range
        self._num_range_bytes = 0
        self._lines_before = -1  # not counted yet
        self._controls = np.empty(0, dtype=np.int64)
        if byte_range is not None and not self.is_divisible:
            raise InputError(f"{self.name}: only a plain FASTA file can be read by byte ranges: decompress it first.")

    @property
    def is_divisible(self) -> bool:
        """Tell whether byte ranges can share this file: it is neither compressed nor standard input."""
        return self.path != "-" and not self.source.is_compressed()

    @property
    def num_bytes(self) -> int:
        """Return the number of stored bytes, of the range if there is one, read so far."""
        return self.source.num_bytes if self.byte_range is None else self._num_range_bytes

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the stored bytes read so far, in hexadecimal; "" for a byte range."""
        return self.source.sha256 if self.byte_range is None else ""

    def where(self, line: int) -> str:
        """Return ``file:line``, as messages begin; ``line`` is a record's."""
        if self._lines_before < 0:
            self._lines_before = self.source.count_lines(self.byte_range[0]) if self.byte_range else 0
        return f"{self.name}:{line + self._lines_before}"

    def blocks(self) -> Iterator[SequenceBlock]:
        """Yield the good records in file order, a few MiB at a time, as columns."""
        start, end = self.byte_range or (0, sys.maxsize)
        if start >= end:
            return
        self._num_range_bytes = 0
        with self._stream() as stream:
            first_header = self._first_header_of_range if start else self._first_header_of_file
            line, offset, pending = first_header(stream, start, end)
            is_last = not pending
            while not is_last:
                more = stream.read(BLOCK_BYTES)
                num_bytes = len(pending) + len(more)
                text = b"".join((pending, more, padding(num_bytes)))
                # The first header at or behind the range's end, then the last one read, end what can be scanned now.
                size = text.find(b"\n>", max(end - 1 - offset, 0), num_bytes) + 1 if offset + num_bytes > end else 0
                is_last = size > 0 or not more
                size = size or (text.rfind(b"\n>", 0, num_bytes) + 1 if more else num_bytes)
                if size:
                    block, line = self._scanned(text, size, line)
                    if block.num_records:
                        yield block
                offset += size
                self._num_range_bytes = min(offset, end) - start
                pending = text[size:num_bytes]
                if len(pending) > MAX_RECORD_BYTES:
                    raise self._headless(line)
        self._num_range_bytes = end - start

    def _stream(self) -> BinaryIO:
        """Open the file at its beginning, or one byte before the range: a line end there makes a header of a ">"."""
        if self.byte_range is None:
            return self.source.content()
        return self.source.plain_content(max(self.byte_range[0] - 1, 0))

    def _first_header_of_file(self, stream: BinaryIO, _start: int, end: int) -> tuple[int, int, bytes]:
        """Return line and byte of the first header and the text from there on, b"" where it is not before ``end``."""
        text = stream.read(max(BLOCK_BYTES, len(BYTE_ORDER_MARK)))
        mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else b""
        text = b"\n" + text[len(mark) :]  # with a line end before it, the first line is like any other
        while (place := text.find(b"\n>")) < 0 and (more := stream.read(BLOCK_BYTES)):
            text += more
            if len(text) > MAX_RECORD_BYTES:
                raise self._headless(1)
        if place < 0 and not text.strip():
            raise InputError(f"{self.name}: is empty: give a FASTA file with at least one sequence.")
        self._check_preamble(text if place < 0 else text[:place])
        if place < 0 or (place > 0 and len(mark) + place >= end):
            return 0, 0, b""
        return text.count(b"\n", 0, place + 1), len(mark) + place, text[place + 1 :]

    def _first_header_of_range(self, stream: BinaryIO, start: int, end: int) -> tuple[int, int, bytes]:
        """Return the same for a range: what stands before its first header belongs to the range before."""
        line, offset, text = 1, start - 1, stream.read(BLOCK_BYTES)
        while (place := text.find(b"\n>")) < 0:
            line += text.count(b"\n", 1)
            offset += len(text) - 1
            more = stream.read(BLOCK_BYTES) if offset + 1 < end else b""
            if not more:
                return 0, 0, b""
            text = text[-1:] + more
        if offset + place + 1 >= end:
            return 0, 0, b""
        return line + text.count(b"\n", 1, place + 1), offset + place + 1, text[place + 1 :]

    def _check_preamble(self, text: bytes) -> None:
        """Report what stands before the first header, unless it is blank; ``text`` begins with an added line end."""
        content = text.lstrip()
        if content:
            line = text.count(b"\n", 0, len(text) - len(content))
            kind = "binary data" if b"\0" in content else "text"
            self.report(max(line, 1), f"{kind} stands before the first header line, '>name ...'")

    def _headless(self, line: int) -> InputError:
        """Return the error for text without end, so that a file of another kind does not fill the memory."""
        size = MAX_RECORD_BYTES >> 20
        return InputError(f"{self.where(max(line, 1))}: no header follows in {size} MiB: is this a FASTA file?")

    def _scanned(self, text: bytes, size: int, line: int) -> tuple[SequenceBlock, int]:
        """Return the good records of padded text and the number of the line behind them; report the bad ones."""
        view = np.frombuffer(text, dtype=np.uint8)
        if len(self._controls) <= len(view):
            self._controls = np.empty(len(view) + 1, dtype=np.int64)
        # Each record has a line end. What is not touched of the columns takes no memory.
        num_records = find_controls(np.frombuffer(text, dtype=np.uint64), view, self._controls)
        letters = np.empty(size, dtype=np.uint8)
        bounds = np.zeros(num_records + 1, dtype=np.int64)
        header_bounds = np.empty((num_records, 2), dtype=np.int64)
        families = np.empty(num_records, dtype=np.int32)
        lines = np.empty(num_records, dtype=np.int64)
        faults = np.empty(num_records, dtype=np.uint8)
        num_records, next_line = scan_records(
            view, size, line, self._controls, letters, bounds, header_bounds, families, lines, faults
        )
        good = np.flatnonzero(faults[:num_records] == GOOD)
        if len(good) < num_records:
            self._report_faults(text, header_bounds, lines, faults[:num_records])
        # A bad record has left no letters: its bound can go without moving the others.
        bounds = np.concatenate((bounds[:1], bounds[1:][good]))
        block = SequenceBlock(letters[: bounds[-1]], bounds, view, header_bounds[good], families[good], lines[good])
        return block, next_line

    def _report_faults(
        self, text: bytes, header_bounds: NDArray[np.int64], lines: NDArray[np.int64], faults: NDArray[np.uint8]
    ) -> None:
        for record in np.flatnonzero(faults):
            start, end = header_bounds[record]
            if faults[record] == BINARY:
                reason = "the record holds binary data"
            elif faults[record] == NO_IDENTIFIER:
                reason = "the header names no sequence"
            else:
                reason = f"record '{shown(text[start:end])}' has no sequence"
            self.report(int(lines[record]), reason)


def read_fasta(path: str | Path, on_bad_record: Callable[[str], None] = stop_at_bad_record) -> Iterator[Record]:
    """Yield the records of a FASTA file; see :class:`FastaReader`, which also tells the file's checksum."""
    yield from FastaReader(path, on_bad_record)
