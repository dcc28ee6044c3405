"""JSON: TAPE's raw records, as one list or as lines, and ProteinLM's lines of residues with spaces between."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.block import NO_FAMILY
from megaprot.common.sequence_readers.json_scan import LIST_END, NO_OBJECT, find_objects
from megaprot.common.sequence_readers.lines import numbered_lines
from megaprot.common.sequence_readers.reader import Row, RowReader
from megaprot.common.sequence_readers.record import family_number
from megaprot.common.sequence_readers.source import BYTE_ORDER_MARK

BLOCK_BYTES = 1 << 20
MAX_OBJECT_BYTES = 1 << 28  # TAPE's contact maps have coordinates beside the sequence
_MAX_OBJECTS = 4096  # found at a time


class BadRow(ValueError):
    """A record that is not what its format says; the text is a clause such as ``has no 'primary'``."""


def tape_row(line: int, record: Any) -> Row:
    """Return the row of one of TAPE's records, decoded; raises BadRow.

    ``primary`` is the sequence, ``id`` the identifier (the record's number where there is none). A ``family`` like
    ``PF00067`` is taken; the numbers in TAPE's own Pfam records are not, since they count the entries of a table that
    is not part of them.
    """
    sequence = text_of(record, "primary")
    identifier = record.get("id", line)
    if isinstance(identifier, bytes):
        identifier = identifier.decode("utf-8", "replace")
    if not isinstance(identifier, str | int):
        raise BadRow("its 'id' is neither text nor a number")
    family = record.get("family", "")
    number = family_number(family.encode("utf-8", "replace")) if isinstance(family, str) else NO_FAMILY
    return Row(line, str(identifier).encode("utf-8", "surrogatepass"), sequence, number)


def text_of(record: Any, key: str) -> bytes:
    """Return the text of a decoded record under ``key``; raises BadRow where there is none."""
    if not isinstance(record, dict):
        raise BadRow("the record is not an object with keys")
    if key not in record:
        raise BadRow(f"the record has no '{key}', only {', '.join(map(repr, list(record)[:8])) or 'nothing'}")
    value = record[key]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise BadRow(f"the record's '{key}' is not text")
    return value.encode("utf-8", "surrogatepass")


def _decoded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"the record is not valid JSON ({getattr(error, 'msg', None) or error})") from None


class ProteinLmReader(RowReader):
    """ProteinLM's JSON lines, ``{"text": "G C T V"}``; the line's number is a record's identifier."""

    def _rows(self) -> Iterator[Row]:
        with self.source.content() as stream:
            for number, line in numbered_lines(stream, self.name):
                if line and not line.isspace():
                    try:
                        sequence = b"".join(text_of(_decoded(line), "text").split())
                        yield Row(number, b"%d" % number, sequence)
                    except BadRow as error:
                        self.report(number, str(error))


class TapeJsonReader(RowReader):
    """TAPE's raw records, as one JSON list of objects or as JSON lines; see ``tape_row``."""

    def _rows(self) -> Iterator[Row]:
        for line, record in self.records():
            try:
                yield tape_row(line, record)
            except BadRow as error:
                self.report(line, str(error))

    def records(self) -> Iterator[tuple[int, Any]]:
        """Yield (line, decoded record) of each object, labels and all; report what is no JSON."""
        for line, text in self._objects():
            try:
                record = _decoded(text)
            except BadRow as error:
                self.report(line, str(error))
            else:
                yield line, record

    def _objects(self) -> Iterator[tuple[int, bytes]]:
        """Yield (line, text) of each object, decoded by whoever asks for it."""
        if self.source.head().removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            with self.source.content() as stream:
                yield from self._list_objects(stream)
        else:
            with self.source.content() as stream:
                lines = numbered_lines(stream, self.name)
                yield from ((number, line) for number, line in lines if line and not line.isspace())

    def _list_objects(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        first = stream.read(BLOCK_BYTES)
        start = first.index(b"[") + 1
        line, pending = 1 + first.count(b"\n", 0, start), first[start:]
        objects = np.empty((_MAX_OBJECTS, 2), dtype=np.int64)
        while True:
            num_objects, done, ending = find_objects(np.frombuffer(pending, dtype=np.uint8), objects)
            place = 0
            for begin, end in objects[:num_objects].tolist():
                line += pending.count(b"\n", place, begin)
                yield line, pending[begin:end]
                line += pending.count(b"\n", begin, end)
                place = end
            line += pending.count(b"\n", place, done)
            pending = pending[done:]
            if ending == NO_OBJECT:
                raise InputError(
                    f"{self.where(line)}: the list holds something else than objects: give TAPE's records."
                )
            if ending == LIST_END:
                break
            if num_objects < _MAX_OBJECTS:
                more = stream.read(max(BLOCK_BYTES, len(pending)))  # doubling: a long object is not scanned too often
                if not more or len(pending) > MAX_OBJECT_BYTES:
                    raise InputError(f"{self.where(line)}: the list has no end: the file is truncated, copy it again.")
                pending += more
        if (pending + stream.read(BLOCK_BYTES)).strip():
            raise InputError(f"{self.where(line)}: more stands behind the list's end: give one list, or JSON lines.")
