"""What is scored: wild types and their variants, of ProteinGym's tables or a sequence file and a list of mutations."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megaprot.common.errors import InputError
from megaprot.common.mutations import Mutation, check_wild_type, parse_mutations, undo
from megaprot.common.sequence_readers import open_sequences
from megaprot.common.vocabulary import GAPS_AND_STOPS, WHITESPACE


@dataclass(frozen=True)
class Variant:
    """One variant: its mutations as written and as read, its measured score (NaN for none), and where it stands."""

    text: str
    mutations: tuple[Mutation, ...]
    measured: float
    place: str


@dataclass
class Assay:
    """A wild type, as letters without gaps, and its variants."""

    identifier: str
    sequence: str
    variants: list[Variant] = field(default_factory=list)

    def mutated(self, variant: Variant) -> str:
        """Return the sequence of a variant."""
        letters = list(self.sequence)
        for mutation in variant.mutations:
            letters[mutation.position] = mutation.mutant
        return "".join(letters)


def read_proteingym(path: Path) -> Assay:
    """Return the assay of a table with the columns ``mutant``, ``mutated_sequence`` and, if measured, ``DMS_score``.

    The wild type is what undoing the mutations gives, which must be the same in all rows.

    Raises:
        InputError: A column is missing, or a row does not fit; the text names the line.
    """
    assay: Assay | None = None
    for place, row in _rows(path, ","):
        for column in ("mutant", "mutated_sequence"):
            if not row.get(column):
                raise InputError(f"{place}: has no {column}; give ProteinGym's columns mutant, mutated_sequence and "
                                 "DMS_score.")  # fmt: skip
        mutations = parse_mutations(row["mutant"], place)
        sequence = undo(plain_letters(row["mutated_sequence"].encode()), mutations, place)
        assay = assay or Assay(path.stem, sequence)
        if sequence != assay.sequence:
            raise InputError(f"{place}: undoing {row['mutant']} gives another wild type than the rows before; score "
                             "each wild type's table by itself.")  # fmt: skip
        assay.variants.append(Variant(row["mutant"], mutations, _number(row.get("DMS_score") or "", place), place))
    if assay is None:
        raise InputError(f"{path}: has no rows; give ProteinGym's columns mutant, mutated_sequence and DMS_score.")
    return assay


def read_wild_types(path: Path) -> list[Assay]:
    """Return the sequences of a file of any format that has identifiers, without variants yet."""
    return [Assay(record.identifier, plain_letters(record.sequence)) for record in open_sequences(path)]


def add_mutations(assays: list[Assay], path: Path) -> None:
    """Add the variants of a list: a header and the columns ``mutant``, ``identifier`` and ``DMS_score``, tab-separated.

    The last two may be missing; ``identifier`` only where there is one wild type. A file without a header is a list of
    mutations.

    Raises:
        InputError: A row does not fit; the text names the line.
    """
    known = {assay.identifier: assay for assay in assays}
    for place, row in _rows(path, "\t", default_column="mutant"):
        if not row.get("mutant"):
            raise InputError(f"{place}: has no mutant; give the columns mutant, identifier and DMS_score, or a "
                             "mutation a line.")  # fmt: skip
        identifier = row.get("identifier") or (assays[0].identifier if len(assays) == 1 else "")
        if identifier not in known:
            raise InputError(f"{place}: its wild type {identifier!r} is not in the input; name one that is in the "
                             "column identifier.")  # fmt: skip
        assay = known[identifier]
        mutations = parse_mutations(row["mutant"], place)
        check_wild_type(assay.sequence, mutations, identifier, place)
        assay.variants.append(Variant(row["mutant"], mutations, _number(row.get("DMS_score") or "", place), place))
    if not any(assay.variants for assay in assays):
        raise InputError(f"{path}: holds no mutation; give one a line.")


def plain_letters(sequence: bytes) -> str:
    """Return a sequence in upper case, without white space and without gaps and stops at its ends."""
    return sequence.translate(None, WHITESPACE).upper().strip(GAPS_AND_STOPS).decode("ascii", "replace")


def _rows(path: Path, separator: str, default_column: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (``FILE:LINE``, row by column names) of a table; a ``default_column`` may stand without a header."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=separator)
            names: list[str] = []
            for fields in reader:
                if not any(fields):
                    continue
                if not names:
                    is_header = not default_column or default_column in fields
                    names = [name.strip() for name in fields] if is_header else [default_column]
                    if is_header:
                        continue
                place = f"{path}:{reader.line_num}"
                if len(fields) != len(names):
                    raise InputError(f"{place}: has {len(fields)} fields instead of {len(names)}; correct it.")
                yield place, dict(zip(names, fields, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a table of text.") from None


def _number(text: str, place: str) -> float:
    """Return a measured score; NaN where there is none."""
    if not text.strip() or text.strip().lower() in ("na", "nan"):
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{place}: DMS_score {text!r} is no number; correct it.") from None
