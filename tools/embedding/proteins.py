"""The proteins of an input under the keys their vectors are stored by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import (
    Columns,
    SequenceFormat,
    SequenceReader,
    open_sequences,
    stop_at_bad_record,
)
from megaprot.common.vocabulary import BadSequence, Vocabulary
from megaprot.finetune.residues import encode

_UNIPROT = re.compile(r"(?:sp|tr)\|([^|]+)\|")
_NUM_SHOWN = 5


class Protein(NamedTuple):
    """One protein: its place in the input, its key, its identifier there and its residues [num_residues]."""

    number: int
    key: str
    identifier: str
    residues: NDArray[np.unsignedinteger]


def key_of(identifier: str) -> str:
    """Return the key of a protein: ``P12345`` of ``sp|P12345|NAME``, else the identifier.

    ``/`` becomes ``_``, as it would open a group in HDF5; so does a lone ``.``, which names the group itself.
    """
    found = _UNIPROT.match(identifier)
    key = (found.group(1) if found else identifier).replace("/", "_")
    return "_" if key == "." else key


@dataclass
class Census:
    """What a first pass over the input found.

    Attributes:
        keys: The keys in the input's order.
        num_residues: Residues of all of them, cut ones as cut.
        num_cut: Proteins longer than was asked for.
        num_windowed: Proteins longer than the model's positions.
        duplicates: ``KEY (FILE:LINE)`` of each further protein of a key.
        bad_records: One clause for each record that was skipped.
        sha256: Checksum of the input as stored.
    """

    keys: dict[str, None] = field(default_factory=dict)
    num_residues: int = 0
    num_cut: int = 0
    num_windowed: int = 0
    duplicates: list[str] = field(default_factory=list)
    bad_records: list[str] = field(default_factory=list)
    sha256: str = ""

    def lines(self) -> list[str]:
        """Return what the user must know, a line each: nothing is left out in silence."""
        lines = [_counted(self.bad_records, "bad records skipped")] if self.bad_records else []
        if self.duplicates:
            lines.append(_counted(self.duplicates, "proteins left out whose key an earlier one has"))
        return lines


def _counted(found: list[str], what: str) -> str:
    more = ", ..." if len(found) > _NUM_SHOWN else ""
    return f"{len(found):,} {what}: {', '.join(found[:_NUM_SHOWN])}{more}"


class Proteins:
    """The proteins of one file, which is read twice: once to check it, once to embed.

    Args:
        path: File of any format that :func:`open_sequences` knows.
        format: Its format.
        columns: Which columns of a table are read.
        vocabulary: The model's.
        max_length: Residues that are kept of each; 0 keeps all.
        skip_bad: Skip records that cannot be used, and count them; else they end the run.
    """

    def __init__(
        self,
        path: str,
        format: SequenceFormat,
        columns: Columns,
        vocabulary: Vocabulary,
        max_length: int,
        skip_bad: bool,
    ) -> None:
        if path == "-":
            raise InputError("--input -: the input is read twice; give a file.")
        if not Path(path).exists():
            raise InputError(f"--input {path}: is missing; give a file of sequences.")
        self.path, self.format, self.columns, self.vocabulary = path, format, columns, vocabulary
        self.max_length, self.skip_bad = max_length, skip_bad

    def check(self, longest: int) -> Census:
        """Read the input once and return what is in it.

        Args:
            longest: Most residues the model takes at once; 0 for any number.

        Raises:
            InputError: The file or a record of it cannot be used.
        """
        census = Census()
        reader = self._open(census.bad_records.append)
        for protein, length in self._read(reader, census.duplicates.append, census.keys):
            census.num_residues += len(protein.residues)
            census.num_cut += length > len(protein.residues)
            census.num_windowed += bool(longest) and len(protein.residues) > longest
        if not census.keys:
            raise InputError(f"{self.path} holds no protein that can be used: {census.bad_records[0]}.")
        census.sha256 = reader.sha256
        return census

    def __iter__(self) -> Iterator[Protein]:
        """Yield the proteins in the input's order, the first of each key."""
        for protein, _ in self._read(self._open(_ignore), _ignore, {}):
            yield protein

    def _open(self, skipped: Callable[[str], None]) -> SequenceReader:
        """Return a reader of the input; ``skipped`` is told each bad record where those are skipped."""
        return open_sequences(self.path, self.format, self.columns, skipped if self.skip_bad else stop_at_bad_record)

    def _read(
        self, reader: SequenceReader, duplicate: Callable[[str], None], keys: dict[str, None]
    ) -> Iterator[tuple[Protein, int]]:
        """Yield each protein and its residues before it was cut; ``keys`` takes the keys met."""
        for record in reader:
            place = reader.where(record.line)
            key = key_of(record.identifier)
            try:
                residues = encode(self.vocabulary, record.sequence)
            except BadSequence as error:
                reader.on_bad_record(f"{place}: record '{record.identifier}' {error}")
                continue
            if key in keys:
                duplicate(f"{key} ({place})")
                continue
            keys[key] = None
            kept = residues[: self.max_length] if self.max_length else residues
            yield Protein(len(keys) - 1, key, record.identifier, kept), len(residues)


def _ignore(message: str) -> None:
    """Take a message that the first pass over the input has given already."""
