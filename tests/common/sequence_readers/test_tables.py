"""Tables: CSV, TSV and parquet give the same records for the same rows, and say which row or column is wrong."""

import csv
import gzip
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns, Record, open_sequences, parquet

ALL = Columns("seq", "name", "pfam")
ROWS = [
    {"name": "a one", "seq": "ACD", "pfam": "PF00067.25", "note": 'a "quoted", note\nof two lines'},
    {"name": "b", "seq": "NA", "pfam": "", "note": ""},
    {"name": "c", "seq": "MKT", "pfam": "PF10417", "note": "x"},
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = ["\t".join(rows[0])] + ["\t".join(map(str, row.values())).replace("\n", " ") for row in rows]
    path.write_text("\n".join(lines))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "csv": write_csv,
    "tsv": write_tsv,
    "parquet": write_parquet,
}
LINES = {"csv": [2, 4, 5], "tsv": [2, 3, 4], "parquet": [1, 2, 3]}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_named_columns_are_read(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / f"file.{kind}", ROWS)
    reader = open_sequences(path, columns=ALL)
    assert list(reader) == [
        Record("a", "one PF00067;", b"ACD", LINES[kind][0]),
        Record("b", "", b"NA", LINES[kind][1]),
        Record("c", "PF10417;", b"MKT", LINES[kind][2]),
    ]
    assert (reader.num_bytes, reader.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert [block.families.tolist() for block in open_sequences(path, columns=ALL).blocks()] == [[67, -1, 10417]]


@pytest.mark.parametrize("kind", WRITERS)
def test_records_without_identifiers_are_numbered(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "file", ROWS)
    read = list(open_sequences(path, kind, Columns("seq")))  # type: ignore[arg-type]
    assert [record[:3] for record in read] == [
        (str(line), "", row["seq"].encode()) for line, row in zip(LINES[kind], ROWS, strict=True)
    ]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (Columns(), "has no column 'sequence' for columns.sequence: name one of 'name', 'seq', 'pfam', 'note'"),
        (Columns("seq", family="clan"), "has no column 'clan' for columns.family"),
        (Columns(""), "has no column '' for columns.sequence"),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, kind: str, columns: Columns, said: str) -> None:
    path = WRITERS[kind](tmp_path / f"file.{kind}", ROWS)
    with pytest.raises(InputError) as caught:
        list(open_sequences(path, columns=columns))
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seq": ""}, "record 'b' has no sequence"),
        ({"seq": "A\0C"}, "the record holds binary data"),
        ({"name": ""}, "the record has no identifier"),
        ({"name": " "}, "the record has no identifier"),
        ({"name": "b\0"}, "the record holds binary data"),
        ({"pfam": "CL0001"}, "the family 'CL0001' is not a Pfam accession such as PF00067"),
    ],
)
def test_a_bad_row_is_fatal_or_skipped_as_asked(tmp_path: Path, kind: str, changed: dict[str, str], said: str) -> None:
    path = WRITERS[kind](tmp_path / f"file.{kind}", [ROWS[0], ROWS[1] | changed, ROWS[2]])
    messages: list[str] = []
    read = list(open_sequences(path, columns=ALL, on_bad_record=messages.append))
    assert [(record.sequence, record.line) for record in read] == [(b"ACD", LINES[kind][0]), (b"MKT", LINES[kind][2])]
    place = ", row 2" if kind == "parquet" else f":{LINES[kind][1]}"
    assert messages == [f"{path}{place}: {said}"]
    with pytest.raises(InputError, match="correct it, or skip such records"):
        list(open_sequences(path, columns=ALL))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x,ACD,PF00001", "the row has 3 columns, the first line names 2"),
        ("x", "the row has 1 columns, the first line names 2"),
        ('"x"y,ACD', "the row cannot be split into columns ("),
        (f"x,{'A' * 200_000}", "the row cannot be split into columns (field larger"),
    ],
)
def test_a_malformed_row_of_csv_does_not_hide_the_next(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "file.csv"
    path.write_text(f"name,sequence\n\na,AC\n{row}\nb,DE\n")
    messages: list[str] = []
    read = list(open_sequences(path, on_bad_record=messages.append))
    assert [(record.sequence, record.line) for record in read] == [(b"AC", 3), (b"DE", 5)]
    assert [message.startswith(f"{path}:4: {said}") for message in messages] == [True]


def test_quotes_mean_nothing_in_tsv(tmp_path: Path) -> None:
    path = tmp_path / "file.tsv.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbfid\tsequence\tnote\r\n"a\tACD\t"half\r\nb\tDE\tx\r\n'))
    assert [record[::2] for record in open_sequences(path, columns=Columns(identifier="id"))] == [
        ('"a', b"ACD"),
        ("b", b"DE"),
    ]


@given(
    rows=st.lists(st.tuples(st.text("ACDEFx ", min_size=1), st.text("abé", min_size=1)), min_size=1, max_size=9),
    batch_rows=st.integers(1, 4),
    kind=st.sampled_from(["string", "large_string", "binary", "dictionary"]),
)
def test_parquet_gives_the_cells_of_any_type_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, str]], batch_rows: int, kind: str
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_ROWS", batch_rows)
    arrow_type = pa.dictionary(pa.int32(), pa.string()) if kind == "dictionary" else getattr(pa, kind)()
    cells = [[cell.encode() if kind == "binary" else cell for cell in column] for column in zip(*rows, strict=True)]
    arrays = [pa.array(column, arrow_type) for column in cells]
    pq.write_table(pa.table(arrays, names=["sequence", "id"]), tmp_path / "file", row_group_size=3)
    read = open_sequences(tmp_path / "file", columns=Columns(identifier="id"))
    assert [record[::2] for record in read] == [(name, sequence.encode()) for sequence, name in rows]


def test_parquet_takes_numbers_as_identifiers_but_not_as_sequences_and_nulls_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "file"
    pq.write_table(pa.table({"sequence": ["ACD", None, "DE"], "id": [7, 8, 9], "mass": [0.5, 1.0, 2.0]}), path)
    messages: list[str] = []
    reader = open_sequences(path, columns=Columns(identifier="id"), on_bad_record=messages.append)
    assert [record.identifier for record in reader] == ["7", "9"]
    assert messages == [f"{path}, row 2: record '8' has no sequence"]
    with pytest.raises(InputError, match="column 'mass' holds double, not text"):
        list(open_sequences(path, columns=Columns("mass")))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_without_rows_is_empty(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "file", ROWS)
    content = path.read_bytes().splitlines(keepends=True)[0]
    if kind == "parquet":
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="file: is empty"):
        list(open_sequences(path, kind, ALL))  # type: ignore[arg-type]


def test_broken_parquet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_parquet(tmp_path / "file", ROWS).read_bytes()
    zeroed = whole[:4] + bytes(60) + whole[64:]
    for content in (whole[:-9], whole[:20], b"PAR1", zeroed, b"", b"text"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InputError, match=r"file: is damaged or no parquet file \(.*\): copy it again\.$"):
            list(open_sequences(tmp_path / "file", "parquet", ALL))
    with pytest.raises(InputError, match="absent: cannot be read"):
        list(open_sequences(tmp_path / "absent", "parquet"))
    with pytest.raises(InputError, match="parquet cannot be read from standard input"):
        list(open_sequences("-", "parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow: pip install 'megaprot\[data\]'"):
        list(open_sequences(tmp_path / "file", "parquet"))
