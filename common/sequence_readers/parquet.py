"""Parquet tables, a batch of rows at a time, straight from Arrow's buffers to columns."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.block import NO_FAMILY, SequenceBlock
from megaprot.common.sequence_readers.reader import Row, packed
from megaprot.common.sequence_readers.record import family_number
from megaprot.common.sequence_readers.tables import TableReader

_BATCH_ROWS = 1 << 13
_SPACE = 32  # no clean identifier begins with it or with a control character

Texts = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""The cells of one column: bytes back to back, and their bounds [num_rows + 1]."""


class ParquetReader(TableReader):
    """The rows of one parquet file; needs the package pyarrow. A record's "line" is its row, from 1."""

    def where(self, line: int) -> str:
        """Return ``file, row 3``, as messages begin."""
        return f"{self.name}, row {line}"

    def blocks(self) -> Iterator[SequenceBlock]:
        """Yield the good records in file order, many at a time, as columns; a clean batch is not copied."""
        num_before = 0
        for sequences, identifiers, accessions in self._batches():
            families = _families(accessions)
            if _is_clean(sequences, identifiers, accessions, families):
                bounds = identifiers[1]
                header_bounds = np.stack((bounds[:-1], bounds[1:]), axis=1)
                lines = np.arange(len(families), dtype=np.int64) + num_before + 1
                yield SequenceBlock(*sequences, identifiers[0], header_bounds, families, lines)
            else:
                made = self._table_rows(num_before, sequences, identifiers, accessions)
                if rows := self.good_rows(made):
                    yield packed(rows)
            num_before += len(families)
        if not num_before:
            raise InputError(f"{self.name}: is empty: give a file with at least one sequence.")

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (row from 1, all cells by column) of each row."""
        arrow, parquet = self._libraries()
        self.source.opened().close()
        try:
            with parquet.ParquetFile(self.path) as file:
                self.check_columns(file.schema_arrow.names)
                batches = file.iter_batches(_BATCH_ROWS, use_threads=False)
                yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1)
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{self.name}: is damaged or no parquet file ({reason}): copy it again.") from None

    def _table_rows(self, num_before: int, *columns: Texts) -> Iterator[Row]:
        for line, cells in enumerate(zip(*map(_cells, columns), strict=True), start=num_before + 1):
            if row := self.table_row(line, *cells):
                yield row

    def _batches(self) -> Iterator[tuple[Texts, Texts, Texts]]:
        """Yield sequence, identifier and accession of the rows of one batch after another."""
        arrow, parquet = self._libraries()
        self.source.opened().close()  # tells in the usual way where it is missing
        try:
            with self.source.passed_over(Path(self.path)) as pass_over, parquet.ParquetFile(self.path) as file:
                self.check_columns(file.schema_arrow.names)
                names = list(vars(self.columns).values())
                read = [name for name in names if name]
                num_rows = 0
                for batch in file.iter_batches(_BATCH_ROWS, columns=read, use_threads=False):
                    numbers = arrow.array(range(num_rows + 1, num_rows + 1 + len(batch)))
                    defaults = (numbers, numbers, arrow.nulls(len(batch), arrow.string()))
                    columns = [batch[name] if name else other for name, other in zip(names, defaults, strict=True)]
                    sequence, identifier, family = map(partial(self._texts, arrow), names, columns)
                    yield sequence, identifier, family
                    num_rows += len(batch)
                    pass_over(num_rows / file.metadata.num_rows)
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{self.name}: is damaged or no parquet file ({reason}): copy it again.") from None

    def _libraries(self) -> tuple[Any, Any]:
        if self.path == "-":
            raise InputError("parquet cannot be read from standard input: give the file.")
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise InputError(f"{self.name}: parquet needs the package pyarrow: pip install 'megaprot[data]'.") from None
        return pyarrow, parquet

    def _texts(self, arrow: Any, name: str, column: Any) -> Texts:
        """Return the cells of an Arrow array of text or numbers, empty where there is none, without copying text."""
        if arrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if arrow.types.is_integer(column.type):
            column = column.cast(arrow.string())
        kinds = ("is_string", "is_large_string", "is_binary", "is_large_binary")
        if not any(getattr(arrow.types, kind)(column.type) for kind in kinds):
            raise InputError(f"{self.name}: column '{name}' holds {column.type}, not text: name another column.")
        column = column.cast(arrow.large_binary()).fill_null(b"")
        _, offsets, data = column.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
        content = np.frombuffer(data or b"", dtype=np.uint8)[bounds[0] : bounds[-1]]
        return content, bounds - bounds[0]


def _cells(texts: Texts) -> list[bytes]:
    content = texts[0].tobytes()
    return [content[start:end] for start, end in pairwise(texts[1].tolist())]


def _families(accessions: Texts) -> NDArray[np.int32]:
    if not len(accessions[0]):
        return np.full(len(accessions[1]) - 1, NO_FAMILY, dtype=np.int32)
    return np.array([family_number(accession.strip()) for accession in _cells(accessions)], dtype=np.int32)


def _is_clean(sequences: Texts, identifiers: Texts, accessions: Texts, families: NDArray[np.int32]) -> bool:
    """Tell whether every row is good, so that none has to be looked at by itself."""
    for content, bounds in (sequences, identifiers):
        if not (np.diff(bounds) > 0).all() or not content.all():
            return False
    has_named_none = (families == NO_FAMILY) & (np.diff(accessions[1]) > 0)
    return bool((identifiers[0][identifiers[1][:-1]] > _SPACE).all()) and not has_named_none.any()
