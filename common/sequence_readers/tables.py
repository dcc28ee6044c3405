"""Tables with a line of column names, comma- or tab-separated: one column is the sequence."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.block import NO_FAMILY
from megaprot.common.sequence_readers.reader import Row, RowReader, SequenceReader
from megaprot.common.sequence_readers.record import family_number, stop_at_bad_record
from megaprot.common.sequence_readers.source import Source


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read.

    Args:
        sequence: Column of the sequences.
        identifier: Column of the identifiers; "" numbers the records by line (csv, tsv) or row (parquet).
        family: Column of Pfam accessions such as PF00067 or PF00067.25; "" for none.
    """

    sequence: str = "sequence"
    identifier: str = ""
    family: str = ""


class TableReader(SequenceReader):
    """A reader of tables; ``columns`` says which of them."""

    def __init__(
        self,
        source: str | Path | Source,
        columns: Columns,
        on_bad_record: Callable[[str], None] = stop_at_bad_record,
    ) -> None:
        super().__init__(source, on_bad_record)
        self.columns = columns

    def check_columns(self, names: list[str]) -> None:
        """Raise InputError unless the table has the named columns."""
        for key, name in vars(self.columns).items():
            if (name or key == "sequence") and name not in names:
                there = ", ".join(repr(other[:40]) for other in names[:20]) or "none"
                raise InputError(f"{self.name}: has no column '{name}' for columns.{key}: name one of {there}.")

    def table_row(self, line: int, sequence: bytes, identifier: bytes, family: bytes) -> Row | None:
        """Return the row of these cells, or None after reporting a family that is no Pfam accession."""
        number = family_number(family.strip())
        if family.strip() and number == NO_FAMILY:
            shown = family.decode("utf-8", "replace")
            self.report(line, f"the family '{shown}' is not a Pfam accession such as PF00067")
            return None
        return Row(line, identifier, sequence, number)


class SeparatedReader(TableReader, RowReader):
    """CSV with quotes as RFC 4180 has them, and TSV, in which a quote is a character like any other."""

    separator = ","
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL

    def _rows(self) -> Iterator[Row]:
        names = vars(self.columns).values()
        for number, record in self.records():
            found = [record[name].encode("utf-8", "surrogateescape") if name else b"" for name in names]
            sequence, identifier, family = found
            made = self.table_row(number, sequence, identifier if self.columns.identifier else b"%d" % number, family)
            if made:
                yield made

    def records(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield (line, all cells by column) of each row; report those with another number of columns."""
        with self.source.content() as stream:
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
            table = csv.reader(text, delimiter=self.separator, quoting=self.quoting, strict=True)
            cells = self._cells(table)
            number, names = next(cells, (1, []))
            if not names:
                return
            self.check_columns(names)
            for number, row in cells:
                if len(row) == len(names):
                    yield number, dict(zip(names, row, strict=True))
                else:
                    self.report(number, f"the row has {len(row)} columns, the first line names {len(names)}")

    def _cells(self, table: Any) -> Iterator[tuple[int, list[str]]]:
        """Yield (number of its first line, cells) of each row that is not blank; report what cannot be split."""
        while True:
            number = table.line_num + 1
            try:
                row = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                self.report(number, f"the row cannot be split into columns ({error})")
                continue
            if row:
                yield number, row


class TsvReader(SeparatedReader):
    """Tab-separated values."""

    separator = "\t"
    quoting = csv.QUOTE_NONE
