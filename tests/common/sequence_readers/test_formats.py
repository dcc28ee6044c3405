"""Which format a file is taken for, by what it holds."""

import gzip
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import SequenceFormat, open_sequences
from megaprot.common.sequence_readers.fasta import FastaReader
from megaprot.common.sequence_readers.formats import ROW_READERS, TABLE_READERS, detect_format
from megaprot.common.sequence_readers.source import Source

CONTENTS = [
    ("file", b">a\nACD\n", "fasta"),
    ("file.csv", b"\xef\xbb\xbf\n\r\n >a", "fasta"),
    ("file", b"text\n>a\nACD\n", "fasta"),
    ("file", b"# STOCKHOLM 1.0\n//\n", "stockholm"),
    ("file", b'{"text": "A C D"}\n', "proteinlm"),
    ("file", b'\n{"id": "x", "primary" : "ACD"}\n', "tape_json"),
    ("file", b'[\n{"text": "x", "primary": "ACD"}]', "tape_json"),
    ("file.csv", b"sequence\nACD\n", "csv"),
    ("FILE.TSV", b"sequence\nACD\n", "tsv"),
    ("file.csv", b'{"no": "key"}\n', "csv"),
    ("file", b"PAR1....", "parquet"),
    ("file", bytes(16) + b"\xde\xc0\xef\xbe", "tape_lmdb"),
]


@pytest.mark.parametrize(("name", "content", "expected"), CONTENTS)
def test_the_content_tells_the_format(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert detect_format(Source(path)) == expected


@pytest.mark.parametrize(("name", "content", "expected"), CONTENTS[:9])
def test_compression_hides_no_format(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(content))
    assert detect_format(Source(path)) == expected


def test_standard_input_is_told_and_still_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for stored in (b'{"text": "A C D"}\n', gzip.compress(b">a\nACD\n"), b'[{"primary": "ACD"}]'):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stored)))
        reader = open_sequences("-")
        assert [record.sequence for record in reader] == [b"ACD"]
        assert (reader.name, reader.num_bytes) == ("standard input", len(stored))


@pytest.mark.parametrize("content", [b"sequence\nACD\n", b"\x7fELF\0\0", b'{"no": "key"}', b"ACDEFGHIKL"])
def test_what_cannot_be_told_names_the_option(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.txt: its format cannot be told .* give --format, one of fasta, stock"):
        open_sequences(path)


@pytest.mark.parametrize("content", [b"", b"\n \r\n", gzip.compress(b"")])
def test_an_empty_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match="file: is empty"):
        open_sequences(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: cannot be read \(No such file"):
        open_sequences(tmp_path / "absent")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        open_sequences(tmp_path)


def test_every_format_has_its_reader() -> None:
    assert {"auto", "fasta", *ROW_READERS, *TABLE_READERS} == set(get_args(SequenceFormat))
    assert isinstance(open_sequences("absent", "fasta"), FastaReader)
