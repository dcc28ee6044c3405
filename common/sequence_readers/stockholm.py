"""Stockholm alignments, many in one file as in Pfam-A.full and Pfam-A.seed, to the unaligned sequences of their rows.

Rows of an alignment may be broken into several groups, a blank line between them (interleaved). Gaps stand for the
alignment, not for unknown residues, and are removed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.block import NO_FAMILY
from megaprot.common.sequence_readers.lines import numbered_lines
from megaprot.common.sequence_readers.reader import Row, RowReader, shown
from megaprot.common.sequence_readers.record import family_number

FIRST_LINE = b"# STOCKHOLM"
GAPS = b".-_~"
MAX_HELD_LETTERS = 1 << 26  # of an alignment whose rows may go on in a second group


class StockholmReader(RowReader):
    """The rows of all alignments of a Stockholm file; ``#=GF AC PF10417.12`` gives an alignment its family.

    The header of a row is its name and, of a Pfam alignment, accession and identifier as in Pfam-A.fasta:
    ``Q9Y7F0/158-193 PF10417.12;1-cysPrx_C;``. Memory is bounded: an alignment is held back until it is known not to be
    interleaved, or until it has MAX_HELD_LETTERS; a larger one that is interleaved raises InputError.
    """

    def _rows(self) -> Iterator[Row]:
        alignment = _Alignment(self)
        is_open, number = False, 0
        with self.source.content() as stream:
            for number, line in numbered_lines(stream, self.name):
                if line.startswith(b"#"):
                    is_open = is_open or line.startswith(FIRST_LINE)
                    alignment.annotate(line)
                elif line.startswith(b"//"):
                    yield from alignment.finished()
                    alignment, is_open = _Alignment(self), False
                elif not line.strip():
                    alignment.end_group()
                elif is_open:
                    yield from alignment.add(number, line)
                else:
                    raise InputError(
                        f"{self.where(number)}: no '{FIRST_LINE.decode()} 1.0' stands before the rows: "
                        "give a Stockholm file."
                    )
        if is_open:
            raise InputError(
                f"{self.where(number)}: the alignment has no end, '//': the file is truncated, copy it again."
            )


@dataclass(slots=True)
class _HeldRow:
    """A row that may go on in the next group; ``name`` is emptied once a group had it wrong."""

    number: int
    name: bytes
    letters: bytes


class _Alignment:
    """The alignment being read: annotation, and the rows that are held back."""

    def __init__(self, reader: StockholmReader) -> None:
        self.reader = reader
        self.accession = self.identifier = self.description = b""
        self.family = NO_FAMILY
        self.held: list[_HeldRow] = []
        self.num_held_letters = 0
        self.held_by_name: dict[bytes, _HeldRow] = {}  # filled when there is a second group
        self.dropped: set[bytes] = set()
        self.width = -1  # of the group, in columns; -1 before its first row
        self.is_first_group = True
        self.is_streaming = False

    def annotate(self, line: bytes) -> None:
        """Take note of ``#=GF AC`` and ``#=GF ID``."""
        if line.startswith(b"#=GF AC"):
            self.accession = line[len(b"#=GF AC") :].strip()
            self.family = family_number(self.accession)
        elif line.startswith(b"#=GF ID"):
            self.identifier = line[len(b"#=GF ID") :].strip()
        if self.family != NO_FAMILY:
            self.description = b" %b;%b;" % (self.accession, self.identifier)

    def end_group(self) -> None:
        """Take note of a blank line: rows behind it go on with those before."""
        if self.width >= 0:
            self.is_first_group, self.width = False, -1

    def add(self, number: int, line: bytes) -> Iterator[Row]:
        """Take one row; yield what need not be held back any longer."""
        fields = line.split()
        if len(fields) != 2:
            self.reader.report(number, "the line is not 'name residues', as a row of an alignment is")
            return
        name, columns = fields
        letters = columns.translate(None, GAPS)
        self.width = len(columns) if self.width < 0 else self.width
        if len(columns) != self.width:
            self.reader.report(number, f"row '{shown(name)}' has {len(columns)} columns, those before it {self.width}")
            self._drop(name)
        elif not self.is_first_group:
            self._go_on(number, name, letters)
        elif self.is_streaming:
            yield self._row(_HeldRow(number, name, letters))
        else:
            self.held.append(_HeldRow(number, name, letters))
            self.num_held_letters += len(letters)
            if self.num_held_letters > MAX_HELD_LETTERS:
                yield from self.finished()
                self.held, self.is_streaming = [], True

    def finished(self) -> Iterator[Row]:
        """Yield the rows that are held back."""
        return (self._row(held) for held in self.held if held.name)

    def _row(self, held: _HeldRow) -> Row:
        return Row(held.number, held.name + self.description, held.letters, self.family)

    def _go_on(self, number: int, name: bytes, letters: bytes) -> None:
        if self.is_streaming:
            raise InputError(
                f"{self.reader.where(number)}: the alignment is interleaved and has more than "
                f"{MAX_HELD_LETTERS >> 20} Mi residues: write it with one line a sequence."
            )
        if not self.held_by_name:
            self.held_by_name = {held.name: held for held in self.held}
            if len(self.held_by_name) < len(self.held):
                raise InputError(f"{self.reader.where(number)}: the alignment is interleaved and has a name twice.")
        if name in self.held_by_name:
            self.held_by_name[name].letters += letters
        elif name not in self.dropped:
            self.reader.report(number, f"row '{shown(name)}' goes on with no row of the alignment's first group")

    def _drop(self, name: bytes) -> None:
        """Leave a row out of which a group was wrong, and whatever comes of it in further groups."""
        self.dropped.add(name)
        if not self.is_first_group and name in self.held_by_name:
            self.held_by_name.pop(name).name = b""
