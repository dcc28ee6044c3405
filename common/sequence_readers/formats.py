"""One door to all formats: the reader of a source by its format, which its content tells."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.fasta import FastaReader
from megaprot.common.sequence_readers.json_files import ProteinLmReader, TapeJsonReader
from megaprot.common.sequence_readers.parquet import ParquetReader
from megaprot.common.sequence_readers.reader import RowReader, SequenceReader
from megaprot.common.sequence_readers.record import stop_at_bad_record
from megaprot.common.sequence_readers.source import BYTE_ORDER_MARK, HEAD_BYTES, Source
from megaprot.common.sequence_readers.stockholm import FIRST_LINE, StockholmReader
from megaprot.common.sequence_readers.tables import Columns, SeparatedReader, TableReader, TsvReader
from megaprot.common.sequence_readers.tape_lmdb import DATA_FILE, MAGIC, MAGIC_PLACE, TapeLmdbReader

SequenceFormat = Literal["auto", "fasta", "stockholm", "tape_lmdb", "tape_json", "proteinlm", "csv", "tsv", "parquet"]
ROW_READERS: dict[str, type[RowReader]] = {
    "stockholm": StockholmReader,
    "tape_lmdb": TapeLmdbReader,
    "tape_json": TapeJsonReader,
    "proteinlm": ProteinLmReader,
}
TABLE_READERS: dict[str, type[TableReader]] = {"csv": SeparatedReader, "tsv": TsvReader, "parquet": ParquetReader}

_JSON_KEY = re.compile(rb'"(text|primary)"\s*:')
_TABLE_NAME = re.compile(r"\.(csv|tsv)(?:\.gz|\.zst)?$", re.IGNORECASE)


def open_sequences(
    path: str | Path,
    format: SequenceFormat = "auto",
    columns: Columns = Columns(),  # noqa: B008 - frozen
    on_bad_record: Callable[[str], None] = stop_at_bad_record,
    byte_range: tuple[int, int] | None = None,
) -> SequenceReader:
    """Return the reader of a file (or LMDB folder) of sequences, or of standard input for ``-``.

    Args:
        path: The file, plain or gzip- or zstd-compressed, which its content tells.
        format: Its format; ``auto`` tells it by the content, and csv from tsv by the name.
        columns: Which columns of a table are read.
        on_bad_record: Told each bad record in one clause with its place; where it returns, the record is skipped.
        byte_range: See :class:`FastaReader`.

    Raises:
        InputError: The file cannot be opened, or its format cannot be told or does not go with ``byte_range``.
    """
    source = Source(path)
    name = detect_format(source) if format == "auto" else format
    if name == "fasta":
        return FastaReader(source, on_bad_record, byte_range)
    if byte_range is not None:
        raise InputError(f"{source.name}: is {name}: only a plain FASTA file can be read by byte ranges.")
    if name in TABLE_READERS:
        return TABLE_READERS[name](source, columns, on_bad_record)
    return ROW_READERS[name](source, on_bad_record)


def detect_format(source: Source) -> str:
    """Return the format of a source, which is left unread.

    Raises:
        InputError: where it cannot be opened, is empty, or is not known.
    """
    if (Path(source.path) / DATA_FILE).is_file():
        return "tape_lmdb"
    head = source.head()
    if head[MAGIC_PLACE] == MAGIC:
        return "tape_lmdb"
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if not text and len(head) < HEAD_BYTES:
        raise InputError(f"{source.name}: is empty: give a file with at least one sequence.")
    return _text_format(text, source.name)


def _text_format(text: bytes, name: str) -> str:
    for beginning, known in ((b">", "fasta"), (FIRST_LINE, "stockholm"), (b"[", "tape_json")):
        if text.startswith(beginning):
            return known
    key = _JSON_KEY.search(text) if text.startswith(b"{") else None
    if key:
        return "proteinlm" if key.group(1) == b"text" else "tape_json"
    if table := _TABLE_NAME.search(name):
        return table.group(1).lower()
    if b"\n>" in text:  # something stands before the first header, which the reader reports
        return "fasta"
    names = ", ".join(known for known in get_args(SequenceFormat) if known != "auto")
    raise InputError(f"{name}: its format cannot be told from its content: give --format, one of {names}.")
