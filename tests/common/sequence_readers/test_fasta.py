"""The FASTA reader against a loop over lines, on files as they come: wrapped, compressed, from Windows, and broken."""

import gzip
import hashlib
import io
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import FastaReader, Record, fasta, open_sequences, read_fasta
from megaprot.common.sequence_readers.block import NO_FAMILY

PFAM = b""">A0A087X1C5_HUMAN/12-80 A0A087X1C5.1 PF00067.25;p450;
MKTAYIAK
QRQISFVK
>Q9Y7F0/158-193 Q9Y7F0.1 PF10417.12;1-cysPrx_C;
AFQF
"""


def naive_records(content: bytes) -> list[tuple[str, str, bytes, int]]:
    """Parse line by line, as one would without thinking of speed."""
    records: list[tuple[str, str, bytes, int]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.replace(b"\r", b"")
        if line.startswith(b">"):
            name, _, description = line[1:].decode().strip().partition(" ")
            records.append((name, description.strip(), b"", number))
        elif records:
            name, description, sequence, header_line = records.pop()
            records.append((name, description, sequence + line, header_line))
    return records


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@st.composite
def fasta_files(draw: st.DrawFn) -> bytes:
    line_end = draw(st.sampled_from([b"\n", b"\r\n"]))
    lines = [b""] * draw(st.integers(0, 2))
    for _ in range(draw(st.integers(1, 6))):
        lines.append(b">" + draw(st.from_regex(rb"[A-Z0-9_/>]{1,8}( [a-z;>=0-9]{1,8}){0,2}", fullmatch=True)))
        lines += draw(st.lists(st.from_regex(rb"[A-Z*\t -][A-Z*\t >-]{0,11}", fullmatch=True), min_size=1, max_size=4))
        lines += [b""] * draw(st.integers(0, 2))
    return line_end.join(lines) + draw(st.sampled_from([b"", line_end]))


@given(content=fasta_files(), block_bytes=st.integers(1, 50), compress=st.sampled_from([bytes, gzip.compress]))
@example(content=b">a\nAC\n\n>b c\nDE", block_bytes=6, compress=bytes)
def test_records_are_those_of_a_loop_over_lines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    block_bytes: int,
    compress: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setattr(fasta, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "file", compress(content))
    assert [tuple(record) for record in read_fasta(path)] == naive_records(content)


@given(
    content=st.lists(st.sampled_from(list(b">>\n\n\r\0 \tAC")), max_size=40).map(bytes), block_bytes=st.integers(1, 9)
)
@example(content=b">a\r\nA\rC\0\n>\0\nA\n> \r\nA\n>b\n>c\n A\tC\n>", block_bytes=4)
def test_of_any_bytes_the_good_records_are_those_of_a_loop_over_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, block_bytes: int
) -> None:
    monkeypatch.setattr(fasta, "BLOCK_BYTES", block_bytes)
    good: list[tuple[bytes, bytes, int]] = []
    bad_lines = []
    texts = (b"\n" + content).split(b"\n>")
    line = texts[0].count(b"\n")
    for text in texts[1:]:
        line += 1
        header, _, body = text.partition(b"\n")
        sequence = body.replace(b"\n", b"").replace(b"\r", b"")
        if header.split() and sequence and b"\0" not in text:
            good.append((header.split()[0], sequence, line))
        else:
            bad_lines.append(line)
        line += text.count(b"\n")
    messages: list[str] = []
    path = write(tmp_path / "file", content)
    try:
        read = list(read_fasta(path, messages.append))
    except InputError as error:
        assert "is empty" in str(error)
        assert not content.strip()
        return
    assert [(record.identifier.encode(), record.sequence, record.line) for record in read] == good
    reported = [int(message.removeprefix(f"{path}:").partition(":")[0]) for message in messages]
    assert reported[bool(texts[0].strip()) :] == bad_lines


@given(content=fasta_files(), block_bytes=st.integers(1, 50))
def test_blocks_hold_the_same_as_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, block_bytes: int
) -> None:
    monkeypatch.setattr(fasta, "BLOCK_BYTES", block_bytes)
    found = []
    for block in open_sequences(write(tmp_path / "file", content)).blocks():
        assert len(block.families) == len(block.header_bounds) == len(block.bounds) - 1 == block.num_records
        assert (block.bounds[0], block.bounds[-1]) == (0, len(block.letters))
        for record in range(block.num_records):
            sequence = block.letters[block.bounds[record] : block.bounds[record + 1]].tobytes()
            found.append((block.identifier(record), sequence, int(block.lines[record])))
            assert block.header(record).startswith(block.identifier(record))
    assert found == [(name, sequence, line) for name, _, sequence, line in naive_records(content)]


@given(
    content=fasta_files(),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    cuts=st.lists(st.integers(0, 200), max_size=5),
    block_bytes=st.integers(1, 50),
)
def test_any_partition_into_byte_ranges_gives_each_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, mark: bytes, cuts: list[int], block_bytes: int
) -> None:
    monkeypatch.setattr(fasta, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "file", mark + content)
    size = len(mark + content)
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    found = []
    for start, end in pairwise(bounds):
        reader = open_sequences(path, "fasta", byte_range=(start, end))
        for name, description, sequence, line in reader:
            found.append((name, description, sequence, int(reader.where(line).rpartition(":")[2])))
        assert (reader.num_bytes, reader.sha256) == (end - start, "")
    assert found == naive_records(content)


def test_a_byte_range_reports_the_bad_records_that_begin_in_it_with_the_lines_of_the_file(tmp_path: Path) -> None:
    content = b"\ntext\n>a\nAC\n>b\n>c\nDE\n>\nAC\n"
    path = write(tmp_path / "file", content)
    cut = content.index(b">c") + 1
    messages: list[str] = []
    names = [
        [record.identifier for record in open_sequences(path, "fasta", on_bad_record=messages.append, byte_range=part)]
        for part in [(0, 3), (3, cut), (cut, len(content))]
    ]
    assert names == [[], ["a", "c"], []]
    assert [message.removeprefix(str(path)) for message in messages] == [
        ":2: text stands before the first header line, '>name ...'",
        ":5: record 'b' has no sequence",
        ":8: the header names no sequence",
    ]


@pytest.mark.parametrize(("stored", "format_name"), [(gzip.compress(PFAM), "fasta"), (b"sequence\nACD\n", "csv")])
def test_byte_ranges_of_anything_but_plain_fasta_are_refused(tmp_path: Path, stored: bytes, format_name: Any) -> None:
    with pytest.raises(InputError, match="only a plain FASTA file can be read by byte ranges"):
        open_sequences(write(tmp_path / "file", stored), format_name, byte_range=(0, 10))


def test_byte_ranges_can_share_a_plain_file_only(tmp_path: Path) -> None:
    assert FastaReader(write(tmp_path / "plain", PFAM)).is_divisible
    assert not FastaReader(write(tmp_path / "zipped", gzip.compress(PFAM))).is_divisible
    assert not FastaReader("-").is_divisible


@given(
    description=st.lists(
        st.sampled_from(["PF", "F", "00067", "1", "123456", ".", "25", ";", " ", "\t", "x", "PF00067.25;"]), max_size=12
    ).map("".join)
)
@example(description="PF00067.;PF00012; PF00067;")
@example(description="PF1234567890; PF123456789;")
def test_the_family_of_a_block_is_that_of_the_record(tmp_path: Path, description: str) -> None:
    path = write(tmp_path / "file", f">name {description}\nACD\n".encode())
    (block,) = FastaReader(path).blocks()
    (record,) = read_fasta(path)
    assert record.description == description.strip()
    assert block.families.tolist() == [int(record.family[2:]) if record.family else NO_FAMILY]


def test_pfam_headers_give_the_family_without_its_version(tmp_path: Path) -> None:
    first, second = read_fasta(write(tmp_path / "pfam.fasta", PFAM))
    assert first == Record("A0A087X1C5_HUMAN/12-80", "A0A087X1C5.1 PF00067.25;p450;", b"MKTAYIAKQRQISFVK", 1)
    assert (first.family, second.family) == ("PF00067", "PF10417")


@pytest.mark.parametrize(
    "description",
    ["", "Cytochrome P450 OS=Homo sapiens OX=9606", "PF00067", "XPF00067.25;p450;", "like PF00067-containing; yes"],
)
def test_other_headers_give_no_family(description: str) -> None:
    assert Record("name", description, b"ACD", 1).family == ""


def test_the_checksum_and_size_are_those_of_the_stored_file(tmp_path: Path) -> None:
    stored = gzip.compress(PFAM) + gzip.compress(b">c\nACD\n")  # members one after the other, as bgzip writes them
    reader = FastaReader(write(tmp_path / "file.gz", stored))
    assert [record.identifier for record in reader][-1] == "c"
    assert (reader.num_bytes, reader.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())


@pytest.mark.parametrize("stored", [PFAM, gzip.compress(PFAM)])
def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, stored: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stored)))
    assert [record.sequence for record in read_fasta("-")] == [b"MKTAYIAKQRQISFVK", b"AFQF"]


def test_a_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input: is closed"):
        next(read_fasta("-"))


def test_a_byte_order_mark_is_no_part_of_the_first_header(tmp_path: Path) -> None:
    assert next(read_fasta(write(tmp_path / "file", b"\xef\xbb\xbf" + PFAM))).identifier == "A0A087X1C5_HUMAN/12-80"


BAD_RECORDS = [
    (b"ACD\n>a\nAC\n", ":1: text stands before the first header line", ["a"]),
    (b"\n\nACD\n", ":3: text stands before the first header line", []),
    (b"\x7fELF\0\0\n>a\nAC\n", ":1: binary data stands before the first header line", ["a"]),
    (b">a\n>b\nAC\n", ":1: record 'a' has no sequence", ["b"]),
    (b">a\nAC\n\n>b\n\n", ":4: record 'b' has no sequence", ["a"]),
    (b">\nACD\n>b\nAC\n", ":1: the header names no sequence", ["b"]),
    (b">a\nAC\n>b\nA\0C\n>c\nAC\n", ":3: the record holds binary data", ["a", "c"]),
]


@pytest.mark.parametrize(("content", "said", "good"), BAD_RECORDS)
def test_a_bad_record_stops_with_its_file_and_line(tmp_path: Path, content: bytes, said: str, good: list[str]) -> None:
    path = write(tmp_path / "bad.fasta", content)
    with pytest.raises(InputError) as caught:
        list(read_fasta(path))
    assert str(caught.value).startswith(f"{path}{said}")
    assert str(caught.value).endswith("correct it, or skip such records with --on_bad_record skip.")


@pytest.mark.parametrize(("content", "said", "good"), BAD_RECORDS)
def test_a_bad_record_is_skipped_where_the_callback_returns(
    tmp_path: Path, content: bytes, said: str, good: list[str]
) -> None:
    path = write(tmp_path / "bad.fasta", content)
    messages: list[str] = []
    assert [record.identifier for record in read_fasta(path, messages.append)] == good
    assert [message.startswith(f"{path}{said}") for message in messages] == [True]


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"", "is empty"),
        (b"\n \r\n", "is empty"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(PFAM)[:-5], "the compressed file is truncated"),
        (gzip.compress(PFAM)[:4], "the compressed file is truncated"),
        (gzip.compress(PFAM)[:-8] + b"\0" * 8, "the compressed file is damaged"),
        (gzip.compress(PFAM)[:10] + b"\xff" * 40, "the compressed file is damaged"),
        (gzip.compress(PFAM) + b"behind the end", "the compressed file is damaged"),
    ],
)
def test_a_broken_file_is_named_in_one_sentence(tmp_path: Path, stored: bytes, said: str) -> None:
    path = write(tmp_path / "file.fasta.gz", stored)
    with pytest.raises(InputError) as caught:
        list(read_fasta(path))
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.fasta: cannot be read \(No such file"):
        list(read_fasta(tmp_path / "nothing.fasta"))
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        list(read_fasta(tmp_path))


def test_a_file_without_headers_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(fasta, "MAX_RECORD_BYTES", 1 << 20)
    path = write(tmp_path / "file", b">a\nAC\n>b\n" + b"A" * (1 << 21) + b"\n>c\nAC\n")
    with pytest.raises(InputError, match=r"file:3: no header follows in 1 MiB: is this a FASTA file\?"):
        list(read_fasta(path))
