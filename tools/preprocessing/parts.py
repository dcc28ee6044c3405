"""One unit of input to a part: encoded sequences and their columns, in a folder that the merge reads.

A part has ``ids`` (all sequences back to back), the columns ``lengths``, ``families``, ``hashes`` and, where asked for,
``identifiers``, one number a sequence, ``excluded`` (lines of the report) and ``report.json``.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megaprot.common.content_hash import content_hashes
from megaprot.common.errors import InputError
from megaprot.common.files import sha256_of
from megaprot.common.sequence_readers import (
    Columns,
    SequenceBlock,
    SequenceFormat,
    SequenceReader,
    open_sequences,
    stop_at_bad_record,
)
from megaprot.common.vocabulary import Vocabulary
from megaprot.tools.preprocessing.exclusion import Excluded, Search, batches
from megaprot.tools.preprocessing.kernels import gather, identifier_hashes
from megaprot.tools.preprocessing.units import Unit, num_bytes

NUM_SHOWN_BAD_RECORDS = 5
COLUMN_TYPES = {"lengths": "<i4", "families": "<i4", "hashes": "<u8", "identifiers": "<u8"}
BLOCK_RECORDS, BLOCK_IDS = 1 << 16, 1 << 24  # of a block of a part that is read, unless one sequence has more


@dataclass(frozen=True)
class PartSettings:
    """What every part is made with: ``split_by`` family or clan refuse records without one."""

    vocabulary: Vocabulary
    format: SequenceFormat
    columns: Columns
    split_by: str
    keep_identifiers: bool
    is_stopping: bool
    excluded: Excluded | None  # no sequences can be searched for none


@dataclass
class PartReport:
    """What became of a unit's records, and the stored bytes that were read (of a unit of a range: none)."""

    source: int
    num_sequences: int = 0
    num_ids: int = 0
    num_skipped: int = 0
    num_excluded: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    bad_records: list[str] = field(default_factory=list)
    num_bytes: int = 0
    sha256: str = ""


class BadRecords:
    """Stops at the first bad record or, when told to skip, counts all and keeps the messages of the first few."""

    def __init__(self, is_stopping: bool) -> None:
        self.is_stopping = is_stopping
        self.num_skipped = 0
        self.messages: list[str] = []

    def report(self, message: str) -> None:
        """Take note of one bad record; raises InputError when stopping."""
        if self.is_stopping:
            stop_at_bad_record(message)
        self.num_skipped += 1
        if self.num_skipped <= NUM_SHOWN_BAD_RECORDS:
            self.messages.append(message)


@dataclass(frozen=True)
class _Kept:
    """Sequences of a block that go on: ids back to back, ``lengths`` [n], and their ``records`` [n] in the block."""

    ids: NDArray[Any]
    lengths: NDArray[np.int32]
    records: NDArray[np.int64]

    @property
    def bounds(self) -> NDArray[np.int64]:
        """First id of each sequence, and the end of the last, int64 [n + 1]."""
        return _bounds(self.lengths)

    def only(self, is_wanted: NDArray[np.bool_]) -> "_Kept":
        """Return those of the sequences that are wanted, bool [n]."""
        if is_wanted.all():
            return self
        lengths = self.lengths[is_wanted]
        return _Kept(gather(self.ids, self.bounds[:-1][is_wanted], lengths), lengths, self.records[is_wanted])


class PartMaker:
    """Writes the parts of any number of units; the search for excluded sequences is built once."""

    def __init__(self, settings: PartSettings) -> None:
        self.settings = settings
        self._search: Search | None = None

    def write(self, unit: Unit, folder: Path, on_progress: Callable[[int], None]) -> None:
        """Write the part of a unit into a new folder; ``on_progress`` is told the stored bytes read so far.

        Raises:
            InputError: for input that cannot be read, or a bad record where these are not skipped.
            OSError: where the part cannot be written.
        """
        folder.mkdir()
        if unit.is_checksum:
            report = PartReport(unit.source, num_bytes=num_bytes(unit.path), sha256=sha256_of(Path(unit.path)))
        else:
            report = self._write_sequences(unit, folder, on_progress)
        (folder / "report.json").write_text(json.dumps(asdict(report)))

    def _write_sequences(self, unit: Unit, folder: Path, on_progress: Callable[[int], None]) -> PartReport:
        settings = self.settings
        bad = BadRecords(settings.is_stopping)
        reader = open_sequences(unit.path, settings.format, settings.columns, bad.report, unit.byte_range)
        report = PartReport(unit.source)
        changes: Counter[str] = Counter()
        with ExitStack() as stack:
            names = ["ids", "excluded", *column_names(settings.keep_identifiers)]
            streams = {name: stack.enter_context(open(folder / name, "wb", buffering=0)) for name in names}
            blocks = reader.blocks()
            for block in blocks if settings.excluded is None else batches(blocks, settings.excluded.batch_letters):
                kept = self._encoded(block, reader, bad, changes)
                if settings.excluded is not None:
                    kept = self._without_excluded(kept, block, reader, report, streams["excluded"])
                self._append(kept, block, streams)
                report.num_sequences += len(kept.lengths)
                report.num_ids += len(kept.ids)
                on_progress(reader.num_bytes)
        on_progress(reader.num_bytes)
        report.changes, report.num_skipped, report.bad_records = dict(changes), bad.num_skipped, bad.messages
        if unit.byte_range is None:
            report.num_bytes, report.sha256 = reader.num_bytes, reader.sha256
        return report

    def _encoded(self, block: SequenceBlock, reader: SequenceReader, bad: BadRecords, changes: Counter[str]) -> _Kept:
        """Return the records that can be used; report the others."""
        encoded = self.settings.vocabulary.encode_block(block.letters, block.bounds)
        changes.update(encoded.changes)
        unusable = list(encoded.bad)
        kept = _Kept(encoded.ids, np.diff(encoded.bounds).astype(np.int32), encoded.kept)
        if self.settings.split_by in ("family", "clan"):
            has_family = block.families[kept.records] >= 0
            reason = f"names no Pfam family, which split.by {self.settings.split_by} needs"
            unusable += [(int(record), reason) for record in kept.records[~has_family]]
            kept = kept.only(has_family)
        for record, reason in sorted(unusable):
            bad.report(f"{reader.where(int(block.lines[record]))}: record '{block.identifier(record)}' {reason}")
        return kept

    def _without_excluded(
        self,
        kept: _Kept,
        block: SequenceBlock,
        reader: SequenceReader,
        report: PartReport,
        stream: BinaryIO,
    ) -> _Kept:
        """Return the sequences that are not nearly the same as an excluded one; write a line for each of the others."""
        excluded, vocabulary = self.settings.excluded, self.settings.vocabulary
        assert excluded is not None
        if self._search is None:
            self._search = excluded.search()
        if vocabulary.is_per_residue:
            found = self._search.matches(kept.ids, kept.bounds)
        else:
            lengths = np.diff(block.bounds)[kept.records].astype(np.int32)
            letters = gather(block.letters, block.bounds[kept.records], lengths)
            encoded = excluded.letters_of.encode_block(letters, _bounds(lengths))
            found = self._search.matches(encoded.ids, encoded.bounds)
        lines = [
            f"{block.identifier(int(kept.records[query]))}\t{reader.name}\t{excluded.identifiers[other]}\t{identity:.4f}\n"
            for query, other, identity in zip(found.queries, found.excluded, found.identities.tolist(), strict=True)
        ]
        _write_all(stream, "".join(lines).encode())
        report.num_excluded += len(lines)
        is_wanted = np.ones(len(kept.lengths), dtype=np.bool_)
        is_wanted[found.queries] = False
        return kept.only(is_wanted)

    def _append(self, kept: _Kept, block: SequenceBlock, streams: dict[str, Any]) -> None:
        item_bytes = kept.ids.dtype.itemsize
        columns: dict[str, NDArray[Any]] = {
            "lengths": kept.lengths,
            "families": block.families[kept.records],
            "hashes": content_hashes(kept.ids.view(np.uint8), kept.bounds * item_bytes),
        }
        if self.settings.keep_identifiers:
            columns["identifiers"] = identifier_hashes(block.headers, block.header_bounds[kept.records])
        _write_all(streams["ids"], kept.ids)
        for name, column in columns.items():
            _write_all(streams[name], column.astype(COLUMN_TYPES[name], copy=False))


@dataclass(frozen=True)
class PartBlock:
    """Consecutive sequences of a part: ``ids`` back to back, and columns [n], ``identifiers`` [0] if none are kept."""

    ids: NDArray[Any]
    lengths: NDArray[np.int32]
    families: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    identifiers: NDArray[np.uint64]


class Part:
    """A part on disk. Raises InputError where its report is damaged or a file of another size than it says."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, has_identifiers: bool) -> None:
        self.folder = folder
        self.id_type = np.dtype(vocabulary.dtype)
        self.has_identifiers = has_identifiers
        try:
            self.report = PartReport(**json.loads((folder / "report.json").read_text()))
            for name in self._names:
                num_items = self.report.num_ids if name == "ids" else self.report.num_sequences
                if (folder / name).stat().st_size != num_items * self._type(name).itemsize:
                    raise ValueError(f"'{name}' is truncated")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder}: is damaged ({error}): remove its shard folder and run the shard again."
            ) from None

    def column(self, name: str) -> NDArray[Any]:
        """Return ``ids`` or another column, mapped."""
        dtype = self._type(name)
        if self.report.num_sequences == 0:  # no file of no bytes can be mapped
            return np.empty(0, dtype=dtype)
        return np.memmap(self.folder / name, dtype=dtype, mode="r").view(np.ndarray)

    def blocks(self) -> Iterator[PartBlock]:
        """Yield the part's sequences in order, read and not mapped, so that memory stays small."""
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(self.folder / name, "rb")) for name in self._names}
            while files:
                columns = {
                    name: np.fromfile(files[name], COLUMN_TYPES[name], BLOCK_RECORDS) for name in self._names[1:]
                }
                for start, end in pieces(columns["lengths"], BLOCK_RECORDS):
                    cut = {name: column[start:end] for name, column in columns.items()}
                    ids = np.fromfile(files["ids"], self.id_type, int(cut["lengths"].sum(dtype=np.int64)))
                    yield PartBlock(ids=ids, **{"identifiers": np.empty(0, dtype=np.uint64), **cut})
                if len(columns["lengths"]) < BLOCK_RECORDS:
                    return

    def _type(self, name: str) -> np.dtype[Any]:
        return self.id_type if name == "ids" else np.dtype(COLUMN_TYPES[name])

    @property
    def _names(self) -> list[str]:
        return ["ids", *column_names(self.has_identifiers)] if self.report.num_sequences else []


def pieces(lengths: NDArray[np.int32], most_records: int) -> Iterator[tuple[int, int]]:
    """Yield (first, behind the last) of stretches of ``most_records`` sequences and BLOCK_IDS ids at most, or one."""
    start = 0
    while start < len(lengths):
        ends = np.cumsum(lengths[start : start + most_records], dtype=np.int64)
        end = start + max(1, int(np.searchsorted(ends, BLOCK_IDS, side="right")))
        yield start, end
        start = end


def column_names(has_identifiers: bool) -> list[str]:
    """Return the names of a part's columns of one number a sequence."""
    return [name for name in COLUMN_TYPES if has_identifiers or name != "identifiers"]


def _bounds(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def _write_all(stream: Any, content: Any) -> None:
    """Write to a raw stream, which may take a part only: to a full disk all but the last bytes."""
    rest = memoryview(content).cast("B") if len(content) else memoryview(b"")
    while len(rest):
        rest = rest[stream.write(rest) :]
