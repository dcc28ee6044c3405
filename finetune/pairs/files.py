"""Pairs of proteins with labels, in the files people have them in.

A folder with ``train.tsv``, ``valid.tsv``, ``test.tsv`` (``a<TAB>b<TAB>label``) and one FASTA file; D-SCRIPT's
``pairs/human_train.tsv`` and ``seqs/human.fasta`` (Sledzieski et al. 2021); or PLM-interact's CSV ``query,text,label``
with the sequences themselves (Liu et al. 2025).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns, FastaReader
from megaprot.common.sequence_readers.source import Source
from megaprot.common.sequence_readers.tables import SeparatedReader, TableReader, TsvReader
from megaprot.common.vocabulary import BadSequence, Vocabulary
from megaprot.finetune.residues import encode

Residues = NDArray[np.unsignedinteger]
"""Ids of a protein's residues, the vocabulary's type [num_residues]."""
_PAIRS = re.compile(r"(.+)\.(tsv|csv)(?:\.gz|\.zst)?")
_FASTA = re.compile(r"(.+)\.(?:fasta|fa|faa)(?:\.gz|\.zst)?")
_ALIASES = {"valid": ("valid", "validation", "val", "dev")}
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
"""{label as written: label}; D-SCRIPT writes them as 0.0 and 1.0."""
_SAMPLED_NEGATIVE = "0.0"
"""How D-SCRIPT's files label a negative; they are drawn at random, and a few hold a protein with itself."""


@dataclass(frozen=True, eq=False, slots=True)
class PairExample:
    """One pair of a split.

    Attributes:
        number: Its place in the split, from 0.
        record: Its line in the file, from 1.
        first: Name of one protein.
        second: Name of the other.
        residues_first: Ids of the one's residues [num_residues].
        residues_second: Ids of the other's residues [num_residues].
        label: 1 where they bind, 0 where not, -1 where that is not known.
    """

    number: int
    record: int
    first: str
    second: str
    residues_first: Residues
    residues_second: Residues
    label: int


class _FixedColumns(TableReader):
    """A table whose columns have names of their own, which no flag changes."""

    def check_columns(self, names: list[str]) -> None:
        """Raise InputError unless the table has the columns."""
        for name in filter(None, vars(self.columns).values()):
            if name not in names:
                there = ", ".join(repr(other[:40]) for other in names[:20])
                raise InputError(f"{self.name}: has no column '{name}' in its first line ({there}); name it there.")


class FixedCsv(_FixedColumns, SeparatedReader):
    """CSV with columns of given names."""


class FixedTsv(_FixedColumns, TsvReader):
    """TSV with columns of given names."""


class Pair(NamedTuple):
    """One line of a file of pairs; ``label`` is None where the line has none."""

    line: int
    first: str
    second: str
    label: int | None


class ProteinTable(Mapping[str, Residues]):
    """Residue ids by a protein's name; each protein is encoded when it is first asked for.

    Args:
        vocabulary: The encoder's.
        name: What messages call it.
    """

    def __init__(self, vocabulary: Vocabulary, name: str) -> None:
        self.vocabulary, self.name = vocabulary, name
        self._letters: dict[str, bytes] = {}
        self._places: dict[str, str] = {}
        self._residues: dict[str, Residues] = {}

    @classmethod
    def read(cls, path: Path, vocabulary: Vocabulary) -> ProteinTable:
        """Return the proteins of a FASTA file; raises InputError where it is damaged or names a protein twice."""

        def stop(message: str) -> None:
            raise InputError(f"{message}; the file is truncated or damaged, restore it.")

        table = cls(vocabulary, str(path))
        reader = FastaReader(path, stop)
        for record in reader:
            table.add(record.identifier, record.sequence, reader.where(record.line))
        return table

    def add(self, identifier: str, sequence: bytes, place: str) -> None:
        """Add a protein read at ``place``; raises InputError where another sequence has its name."""
        if self._letters.setdefault(identifier, sequence) != sequence:
            raise InputError(f"{place}: {identifier} has another sequence at {self._places[identifier]}; rename one.")
        self._places.setdefault(identifier, place)

    def __getitem__(self, identifier: str) -> Residues:
        """Return a protein's residue ids; raises InputError where its sequence cannot be encoded."""
        if identifier not in self._residues:
            try:
                self._residues[identifier] = encode(self.vocabulary, self._letters[identifier])
            except BadSequence as error:
                place = self._places[identifier]
                raise InputError(f"{place}: the sequence of {identifier} {error}; correct or remove it.") from None
        return self._residues[identifier]

    def __iter__(self) -> Iterator[str]:
        return iter(self._letters)

    def __len__(self) -> int:
        return len(self._letters)

    def require(self, identifier: str, place: str) -> Residues:
        """Return the residue ids of a protein named at ``place``; raises InputError where it is not here."""
        if identifier not in self._letters:
            raise InputError(f"{place}: {identifier} has no sequence in {self.name}; add it or remove the pair.")
        return self[identifier]


def sequence_name(sequence: bytes) -> str:
    """Return the name of a protein that is known by its sequence alone: the same for the same letters."""
    letters = b"".join(sequence.split()).upper()
    return "sequence_" + hashlib.blake2b(letters, digest_size=10).hexdigest()


def iterate_pairs(path: Path, proteins: ProteinTable | None = None) -> Iterator[Pair]:
    """Yield the pairs of a file one by one.

    Args:
        path: TSV without a line of names (two names, and a label where there is one), or CSV with the columns
            ``query``, ``text`` and perhaps ``label``; ``.gz`` and ``.zst`` too.
        proteins: Takes the sequences of a CSV file, under :func:`sequence_name`; None where they are not needed.

    Raises:
        InputError: A line is no pair, pairs a protein with itself, or has another label than 0 or 1; or there is none.
    """
    found = _PAIRS.fullmatch(path.name)
    lines = _csv_pairs(path, proteins) if found and found[2] == "csv" else _tsv_pairs(path)
    num_pairs = 0
    for line, first, second, label in lines:
        place = f"{path}:{line}"
        if not first or not second:
            raise InputError(f"{place}: names one protein only; give two and a label, with tabs between.")
        if label not in LABELS and label is not None:
            raise InputError(f"{place}: the label '{label[:40]}' is neither 0 nor 1; correct it.")
        if first == second and label != _SAMPLED_NEGATIVE:
            raise InputError(f"{place}: pairs {first} with itself; remove the line.")
        num_pairs += 1
        yield Pair(line, first, second, None if label is None else LABELS[label])
    if not num_pairs:
        raise InputError(f"{path} holds no pair; give lines of two names and a label, with tabs between.")


def _tsv_pairs(path: Path) -> Iterator[tuple[int, str, str, str | None]]:
    """Yield (line, name, name, label or None) of a TSV file."""
    with Source(path).content() as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="replace")
        for line, content in enumerate(text, start=1):
            if content.isspace():
                continue
            first, *rest = (cell.strip() for cell in content.split("\t"))
            if len(rest) not in (1, 2):
                raise InputError(f"{path}:{line}: has {1 + len(rest)} columns; give two names and a label, with tabs "
                                 "between.")  # fmt: skip
            yield line, first, rest[0], rest[1] if len(rest) == 2 else None


def _csv_pairs(path: Path, proteins: ProteinTable | None) -> Iterator[tuple[int, str, str, str | None]]:
    """Yield (line, name, name, label or None) of a CSV file of sequences."""

    def stop(message: str) -> None:
        raise InputError(f"{message}; correct or remove it.")

    for line, record in FixedCsv(path, Columns("query", "text"), stop).records():
        names = []
        for column in ("query", "text"):
            sequence = record[column].strip().encode("utf-8", "replace")
            names.append(sequence_name(sequence) if sequence else "")
            if proteins is not None and sequence:
                proteins.add(names[-1], b"".join(sequence.split()).upper(), f"{path}:{line}")
        yield line, *names, record["label"].strip() if "label" in record else None  # type: ignore[misc]


def read_pairs(data: Path, split: str, vocabulary: Vocabulary) -> list[PairExample]:
    """Return all pairs of a split, none left out; splits that share a FASTA file share its proteins' arrays.

    Args:
        data: Folder of the files.
        split: Name of the file without its suffix, or its last part (``train`` finds ``human_train.tsv``).
        vocabulary: The encoder's.

    Raises:
        InputError: A file is missing, damaged or empty, or a line cannot be used.
    """
    path = find_pairs(data, split)
    proteins = proteins_of(data, path, vocabulary)
    examples: list[PairExample] = []
    for pair in iterate_pairs(path, proteins):
        place = f"{path}:{pair.line}"
        if pair.label is None:
            raise InputError(f"{place}: has no label; give 0 or 1 as the third column.")
        both = proteins.require(pair.first, place), proteins.require(pair.second, place)
        examples.append(PairExample(len(examples), pair.line, pair.first, pair.second, *both, pair.label))
    return examples


def proteins_of(data: Path, pairs: Path, vocabulary: Vocabulary) -> ProteinTable:
    """Return the proteins that a file of pairs names: of the FASTA file that belongs to it, none yet for a CSV file."""
    found = _PAIRS.fullmatch(pairs.name)
    if found and found[2] == "csv":
        return ProteinTable(vocabulary, str(pairs))
    path = find_fasta(data, pairs)
    status = path.stat()
    return _cached(path, status.st_mtime_ns, status.st_size, vocabulary)


@lru_cache(maxsize=4)
def _cached(path: Path, _time: int, _size: int, vocabulary: Vocabulary) -> ProteinTable:
    """Return the proteins of a FASTA file, read once for all splits."""
    return ProteinTable.read(path, vocabulary)


def find_pairs(data: Path, split: str) -> Path:
    """Return the file of a split.

    Where no file is called ``split`` the only one whose name ends with ``_split`` is it. D-SCRIPT has no validation
    split of its own: ``valid`` is then the test split of the training species, as its authors use it.

    Raises:
        InputError: There is none, or more than one.
    """
    if not data.is_dir():
        raise InputError(f"--data {data} is no folder; name one with train.tsv, valid.tsv, test.tsv and their FASTA "
                         "file.")  # fmt: skip
    found: dict[str, list[Path]] = {}
    for path in (*sorted(data.iterdir()), *sorted((data / "pairs").glob("*"))):
        if matched := _PAIRS.fullmatch(path.name):
            found.setdefault(matched[1], []).append(path)
    names = [name for alias in _ALIASES.get(split, (split,)) for name in _called(list(found), alias)]
    if not names and split == "valid":
        trained = _called(list(found), "train")
        names = [name for name in found if len(trained) == 1 and name == trained[0].removesuffix("train") + "test"]
        names = [name for name in names if name != "test"]
    paths = [path for name in dict.fromkeys(names) for path in found[name]]
    if len(paths) == 1:
        return paths[0]
    there = ", ".join(sorted(found)) or "none"
    problem = "holds no pairs" if not paths else f"holds {len(paths)} files of pairs"
    raise InputError(f"{data} {problem} of the split '{split}'; name one of its files: {there}.")


def _called(names: list[str], split: str) -> list[str]:
    """Return the names that mean a split: itself, or those that end with it."""
    return [split] if split in names else [name for name in names if name.endswith(f"_{split}")]


def find_fasta(data: Path, pairs: Path) -> Path:
    """Return the FASTA file that belongs to a file of pairs.

    It lies beside the pairs, or in ``seqs`` as D-SCRIPT has it. Of several, ``sequences`` is taken, or the one whose
    name begins that of the pairs (``human.fasta`` of ``human_train.tsv``).

    Raises:
        InputError: There is none, or more than one.
    """
    for folder in (pairs.parent, data, data / "seqs"):
        found = {matched[1]: path for path in folder.glob("*") if (matched := _FASTA.fullmatch(path.name))}
        if found:
            break
    else:
        raise InputError(f"{data} has no FASTA file for {pairs.name}; put the proteins there as sequences.fasta.")
    if len(found) == 1:
        return next(iter(found.values()))
    stem = pairs.name.split(".")[0]
    fitting = [name for name in found if name == "sequences" or stem == name or stem.startswith(f"{name}_")]
    if len(fitting) != 1:
        raise InputError(f"{folder} has {len(found)} FASTA files ({', '.join(sorted(found))}) and none is named as "
                         f"{pairs.name} is; call one sequences.fasta.")  # fmt: skip
    return found[fitting[0]]
